# Every target sets up what it needs on first use. `make help` lists them.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& command -v $$p && exit; done; echo python3)

# Nothing here reports home.
export DO_NOT_TRACK = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export VLLM_NO_USAGE_STATS = 1

# Jupyter, uv and the hub's client keep things in a home. A container's user may have none, or "/".
export HOME := $(shell if [ -d "$$HOME" ] && [ -w "$$HOME" ]; then echo "$$HOME"; \
	else echo "$(CURDIR)/workspace/home"; fi)

HAVE_PYTHON = command -v $(PYTHON) >/dev/null || { echo "No Python was found. Install Python 3.11 or \
	newer (on Debian or Ubuntu: apt install python3 python3-venv) and run the same command again." \
	>&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help doctor setup preflight run lab kernel book hand-in serve slides editions kit room \
	test test-faults test-acceptance test-smollm2 test-browser accept-gpu rehearse-gpu test-isa \
	lint notebooks full-size bench-cpu measure-formats lock clean

# A line "## group" heads the targets below it, and "target: ... ## words" describes one.
help:
	@sed -nE 's/^## (.*)/\n\1/p; s/^([a-z0-9-]+):.*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) \
		| expand -t 18

## For a reader

doctor:  ## what this machine will be able to run, before anything is installed
	@$(HAVE_PYTHON)
	@$(PYTHON) scripts/doctor.py

setup:  ## make the two environments, if they are not there
	@$(HAVE_PYTHON)
	@$(PYTHON) scripts/setup.py

preflight: setup  ## what this machine is, and how it serves FP8
	@.venv/bin/python -m helpers.preflight

accept-gpu: setup  ## you have a GPU: seven steps, ten minutes; send us what it prints
	@.venv/bin/python scripts/accept_gpu.py

# Rooted at the project, so that links from the notebooks to helpers/ and data/ open.
lab: setup  ## the notebooks in JupyterLab; EDITION=student · LAB_FLAGS="--port=8899"
	@.venv/bin/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/$(if $(EDITION),build/$(EDITION),notebooks) \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_FLAGS)

kernel: setup  ## a kernel for the Jupyter that is there already (a pod's, a hub's)
	@.venv/bin/python scripts/kernel.py

run: setup  ## run every notebook in order; ONLY=06 or ONLY=a1 runs one
	@.venv/bin/python scripts/run_notebooks.py run $(ONLY)

book: setup  ## the executed notebooks as pages with navigation and search, in build/book/
	@.venv/bin/python scripts/book.py

hand-in: setup  ## your results in one file for the instructor; ALIAS=name, if you like
	@PYTHONPATH=. .venv/bin/python scripts/room.py hand-in "$(ALIAS)"

## For an instructor

# Another address than this machine's own is taken from the command line, from no environment.
serve: setup  ## servers for a room until Ctrl-C: ARMS=bf16,fp8 PORT=8001 LISTEN=127.0.0.1
	@PYTHONPATH=. .venv/bin/python scripts/serve.py "$(or $(ARMS),bf16,fp8)" \
		"$(or $(if $(findstring command,$(origin LISTEN)),$(LISTEN)),127.0.0.1)" \
		"$(or $(if $(findstring command,$(origin PORT)),$(PORT)),8001)"

slides: setup  ## workshop/slides.ipynb as one HTML file, build/slides.html
	@.venv/bin/python scripts/slides.py

editions: setup  ## build/student without solutions; build/solutions, solved and run; ONLY=06
	@.venv/bin/python scripts/editions.py $(ONLY)

kit:  ## build/kit: sets up with no network; PYTHONS="3.11 3.12" names the versions
	@$(HAVE_PYTHON)
	@$(PYTHON) scripts/kit.py $(PYTHONS)

room: setup  ## one page of what a room handed in: LEDGERS=folder
	@PYTHONPATH=. .venv/bin/python scripts/room.py page "$(LEDGERS)"

test: setup  ## check a machine before a course: every test, and every notebook
	@.venv/bin/python scripts/run_tests.py

test-faults: setup  ## provoke every known fault, and show how each is met
	@.venv/bin/python -m pytest -q --all-faults tests/faults

bench-cpu: setup  ## FP8 on this CPU beside bf16 and others, on three models (7 minutes)
	@PYTHONPATH=. .venv/bin/python scripts/bench_cpu.py

measure-formats: setup  ## what formats and schemes cost two models, and short sums (an hour)
	@PYTHONPATH=. .venv/bin/python scripts/measure_formats.py
	@PYTHONPATH=. .venv/bin/python scripts/measure_accumulation.py

full-size: setup  ## quantize a random checkpoint of Phi-4's size (45 GB of disk), and time it
	@PYTHONPATH=. .venv/bin/python scripts/full_size.py

## For a maintainer

notebooks: export CUDA_VISIBLE_DEVICES =
notebooks: setup  ## run the notebooks on the CPU and write them back with their outputs
	@.venv/bin/python scripts/run_notebooks.py refresh

test-acceptance: setup  ## the steps of accept-gpu, walked on a CPU (two minutes)
	@.venv/bin/python -m pytest -q -m slow tests/test_accept_gpu.py

test-smollm2: setup  ## notebooks 01 to 05 on SmolLM2-135M, out of a Python package of 93 MB
	@.venv/bin/python scripts/run_tests.py smollm2

test-browser: setup  ## all notebooks in JupyterLab, controls of 00 and 03 turned; screenshots
	@.venv/bin/python scripts/browser.py

rehearse-gpu: setup  ## the GPU path without a GPU, by vLLM's own code (9.1 GB of disk, 10 min)
	@PYTHONPATH=. .venv/bin/python scripts/rehearse_gpu.py

test-isa: setup  ## the CPU kernels' tests and a served answer, as each kind of CPU
	@PYTHONPATH=. .venv/bin/python scripts/test_isa.py

lint: setup  ## ruff
	@.venv/bin/ruff check .

lock: setup  ## resolve the requirements anew into requirements/constraints/
	@.venv/bin/python scripts/lock.py .uv/bin/uv

clean:  ## remove build/ and caches; the environments and the workspace stay
	@rm -rf build .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv*' -type d -prune -exec rm -rf {} +

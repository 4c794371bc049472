"""What runs in vLLM's environment, .venv-serve or .venv-serve-gpu, or wraps a process of it.

Everything else in `helpers` runs in the notebook's environment, .venv.
"""

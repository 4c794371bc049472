"""What the project decided for a machine, held to what vLLM says of it; and the table's row."""

from rehearsal.cases import Case

from helpers import arm_names

# The kernel that the documentation of a mode promises, for the four Linears of a layer.
PROMISED = {"gpu-w8a8": "CutlassFP8ScaledMMLinearKernel",
            "gpu-w8a16": "MarlinFP8ScaledMMLinearKernel"}
LINEARS = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
# FlashInfer compiles with nvcc, or fetches what it does not compile: no machine may need it.
COMPILED_WITH_NVCC = {"FLASHINFER"}


def judge(case: Case, decision: dict, answer: dict, with_toolkit: dict | None) -> list[str]:
    """What is wrong, a sentence each; empty where all is well."""
    faults = [f"{key} is {decision.get(key)!r}, and should be {wanted!r}"
              for key, wanted in case.expects.items()
              if not _as_expected(decision.get(key), wanted)]
    if not answer:
        return faults
    if "failed" in answer:
        return [*faults, f"vLLM's process ended: {answer['failed']}"]
    if answer["capability"] != decision["capability"]:
        faults.append(f"vLLM takes a GPU of capability {answer['capability']}, and the plan is for "
                      f"{decision['capability']}")
    if decision["mode"] == "none":
        accepted = [serve["name"] for serve in answer["serves"] if "refused" not in serve]
        return faults + [f"the project offers no FP8, and vLLM would serve {arm}"
                         for arm in accepted]
    faults += [f"{what} compiles nothing: {answer[f'{what} compiles']}"
               for what in ("Triton", "FlashAttention 4")
               if answer[f"{what} compiles"].startswith("no")]
    for serve in answer["serves"]:
        faults += _of_arm(serve, decision)
    for serve in with_toolkit["serves"] if with_toolkit and "failed" not in with_toolkit else ():
        same = next(each for each in answer["serves"] if each["name"] == serve["name"])
        if serve.get("kernels") != same.get("kernels"):
            faults.append(f"with a CUDA toolkit {serve['name']} gets other kernels: "
                          f"{serve.get('kernels')}")
        faults += _gates(serve, with_toolkit=True)
    if with_toolkit and "failed" in with_toolkit:
        faults.append(f"with a CUDA toolkit vLLM's process ended: {with_toolkit['failed']}")
    if with_toolkit:
        faults += [f"nvcc was called: {call}" for call in with_toolkit["nvcc called"]
                   if call not in ("-V", "--version")]  # as flashinfer asks for its version
    return faults + _plan(decision)


def _as_expected(found, wanted) -> bool:
    both = isinstance(wanted, str) and isinstance(found, str)
    return wanted in found if both else found == wanted


def _of_arm(serve: dict, decision: dict) -> list[str]:
    arm = serve["name"]
    offered = arm.partition(" ")[0] in decision["arms"]
    if "refused" in serve:
        if not offered and serve["at"] == "memory":
            return _gates(serve)  # it does not fit, as the project says
        return [f"{arm} is {'offered' if offered else 'held back'}, and vLLM refuses its "
                f"{serve['at']}: {serve['refused'][:300]}"]
    faults = _gates(serve)
    if not offered:
        faults.append(f"{arm} is held back, and vLLM would serve it with "
                      f"{serve['memory']['tokens']} tokens of KV cache")
    if serve["dtype"] != decision["dtype"]:
        faults.append(f"{arm} is served in {serve['dtype']}, and the project says "
                      f"{decision['dtype']}")
    if serve["ranks"] != (1 if "tiny" in arm else decision["gpus"]):
        faults.append(f"{arm} is divided over {serve['ranks']} GPUs, not {decision['gpus']}")
    wanted = ("UnquantizedLinearMethod" if arm == "bf16" else
              PROMISED["gpu-w8a16" if arm == "fp8 W8A16" else decision["mode"]])
    if {name: kernel for name, (kernel, _) in serve["kernels"].items()} != dict.fromkeys(
            LINEARS, wanted):
        faults.append(f"{arm}: {wanted} is promised for {sorted(LINEARS)}, and vLLM takes "
                      f"{serve['kernels']}")
    return faults


def _gates(serve: dict, with_toolkit: bool = False) -> list[str]:
    """Which components would compile something with what a machine may not have."""
    gates, arm = serve.get("gates"), serve["name"]
    if not gates:
        return []
    faults = []
    if gates["FlashInfer sampler"] is not False:
        faults.append(f"{arm}: FlashInfer's sampler is on, and compiles with nvcc")
    if gates["FlashInfer kernels"] and not with_toolkit:
        faults.append(f"{arm}: FlashInfer's kernels are on without a toolkit")
    if gates["attention"] in COMPILED_WITH_NVCC:
        faults.append(f"{arm}: attention by {gates['attention']}, which compiles with nvcc or "
                      "downloads")
    if not gates["Triton"]:
        faults.append(f"{arm}: vLLM has turned Triton off")
    return faults + [f"{arm}: {gates[name]} {name} would be compiled"
                     for name in ("DeepGEMM kernels", "CuTe DSL kernels") if gates[name]]


def _plan(decision: dict) -> list[str]:
    """The plan's sentence and tokens, of a GPU of the list, beside the choice of arms."""
    if "plan" not in decision or decision.get("profile") not in (None, "phi-4"):
        return []
    planned = {arm for arm, tokens in decision["plan"]["tokens"].items() if tokens}
    if planned != set(decision["arms"]):
        return [f"the plan has {sorted(planned)}, and the choice of arms {decision['arms']}"]
    return []


def row(case: Case, decision: dict, answer: dict, faults: list[str]) -> dict:
    """The table's row: what a machine gets, in the words of vLLM where it was asked."""
    served = {serve["name"]: serve for serve in answer.get("serves", ())}
    fp8 = served.get("fp8", {})
    arms = [] if decision["set-up"] else decision.get("arms", [])
    return {
        "machine": case.name, "listed": "plan" in decision, "mode": decision["mode"],
        "profile": decision.get("profile", "") if arms else "", "arms": arms,
        "gpus": decision.get("gpus", 0), "dtype": decision["dtype"], "flags": decision.get("flags"),
        "kernel": sorted({kernel for kernel, _ in fp8.get("kernels", {}).values()}),
        "attention": fp8.get("gates", {}).get("attention", ""),
        "kv_tokens": {arm: served[arm]["memory"]["tokens"] for arm in arms
                      if "memory" in served.get(arm, {})},
        "refused": {name: serve["refused"].partition(". ")[0] for name, serve in served.items()
                      if "refused" in serve},
        "verdict": "; ".join(faults) or _verdict(decision, served)}


def _verdict(decision: dict, served: dict) -> str:
    if decision["set-up"]:
        return f"the set-up stops: {decision['set-up'].partition(', so ')[0]}"
    if decision["mode"] == "none":
        return "no FP8, as in vLLM"
    if not served:
        return "the CPU's environments"
    if "refused" in served["bf16"]:
        return f"as in vLLM, which refuses {arm_names.sixteen_bits(decision['dtype'])}"
    return "as in vLLM"

"""The machines of the rehearsal: each GPU of data/gpus.json alone, and the odd ones.

A machine is described as NVML would: no figure of a GPU is written here but a MIG slice's.
"""

from dataclasses import dataclass, field

from helpers import roofline

MIB = 2**20
DRIVER = ("580.95.05", 13000)  # the oldest branch that runs CUDA 13
# nvidia-smi of an A100-SXM4-80GB in slices of 2g.20gb, in github.com/XuehaiPan/nvitop/pull/8
SLICE_MIB = 19968


@dataclass(frozen=True)
class Card:
    """One GPU as NVML tells it; `slices`: the bytes of each MIG slice."""

    name: str
    total: int
    capability: tuple[int, int]
    used: int = 0
    slices: tuple[int, ...] = ()
    mig: int = 0  # -1: NVML has no answer
    energy: int = 1_000_000  # -1: NVML has no answer


@dataclass(frozen=True)
class Case:
    """A machine, the variables its reader has set, and what must come out of it.

    `expects`: of the project's decisions, a part of each string, or the value itself.
    """

    name: str
    cards: tuple[Card, ...]
    expects: dict = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    driver: tuple[str, int] = DRIVER

    def described(self) -> str:
        """The text that nvml.c reads."""
        lines = [("driver", *self.driver)]
        for index, card in enumerate(self.cards):
            lines.append(("gpu", card.name, f"GPU-{index}", card.total, card.used,
                          *card.capability, card.mig, card.energy))
            lines += [("slice", f"{card.name} MIG 2g.20gb", f"MIG-{index}-{at}", size, 0)
                      for at, size in enumerate(card.slices)]
        return "".join("\t".join(map(str, line)) + "\n" for line in lines)


def card(name: str, **more) -> Card:
    """A GPU of data/gpus.json by its name there."""
    gpu = roofline.listed(roofline.named(name))
    return Card(gpu.name, gpu.memory_bytes, gpu.compute_capability, **more)


def listed() -> list[Case]:
    """One machine for each GPU of data/gpus.json; what they can serve is vLLM's to judge."""
    return [Case(gpu["name"], (card(gpu["name"]),)) for gpu in roofline.gpus()]


def odd() -> list[Case]:
    desktop = 3 * 10**9
    slices = (SLICE_MIB * MIB,) * 3
    return [
        Case("MIG, an A100 80 GB in three", (card("A100 SXM 80 GB", slices=slices, mig=1),),
             {"profile": "phi-4", "arms": ["fp8"], "note": "CUDA uses one at a time"}),
        Case("two unequal, A40 beside T4", (card("T4"), card("A40")),
             {"mode": "gpu-w8a16", "profile": "phi-4", "arms": ["bf16", "fp8"]}),
        Case("two equal, RTX 3090", (card("RTX 3090"),) * 2,
             {"profile": "phi-4", "arms": ["bf16", "fp8"], "gpus": 2}),
        Case("driver 535, A40", (card("A40"),),
             {"set-up": "install driver 580 or newer"}, driver=("535.54.03", 12020)),
        Case("a desktop on an RTX 4090 takes 3 GB", (card("RTX 4090", used=desktop),),
             {"mode": "gpu-w8a8", "profile": "phi-4", "arms": ["fp8"]}),
        Case("WSL 2, RTX 4090", (card("RTX 4090", mig=-1, energy=-1),),
             {"mode": "gpu-w8a8", "profile": "phi-4", "energy": None}),
        Case("the GPU hidden", (card("A40"),), {"mode": "cpu", "environment": ".venv-serve"},
             {"CUDA_VISIBLE_DEVICES": ""}),
        Case("a driver without a GPU", (), {"mode": "cpu", "environment": ".venv-serve"}),
    ]

"""Makes a vLLM process take this CPU for an older one: `scripts/test_isa.py` puts it on its path.

vLLM calls `become` as a platform plugin, before it loads the build of its C++ library that fits the
CPU; it hides what the variable OTHER_CPU_LACKS names, beginnings of features as torch names them.
What the libraries find out by themselves is held back by their own variables beside it.
"""

import os

import torch


def become() -> None:
    """No platform: vLLM goes on with its own for a CPU."""
    hidden = tuple(os.environ["OTHER_CPU_LACKS"].split())
    has = {name: value and not name.startswith(hidden) if isinstance(value, bool) else value
           for name, value in torch.cpu.get_capabilities().items()}
    torch.cpu.get_capabilities = lambda: has
    if not has["avx512_f"]:
        # torch asks the CPU itself whether oneDNN can multiply bf16; without AVX512 it cannot, and
        # torch does it alone.
        torch.backends.mkldnn.set_flags(False)

"""``fastgen info``: what runs on this machine, and why not the rest."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from fastgen.cli import show

__all__ = ["ENVIRONMENT", "info"]

ENVIRONMENT = {
    "FASTGEN_BACKEND": "run every op on reference, cpp or triton; unset: the fastest that can serve",
    "FASTGEN_MATH": "normals in the exact (same bits everywhere) or fast mode; unset: exact",
    "FASTGEN_ISA": "force the CPU kernels of scalar, avx2, avx512 or neon; unset: the fastest this CPU has",
    "FASTGEN_CACHE": "folder of parsed data sets, safe to delete; unset: ~/.cache/fastgen",
    "FASTGEN_DEBUG": "1: the command line shows the traceback of input errors too",
    "TRITON_INTERPRET": "1: Triton kernels run on CPU tensors, slowly, for tests",
}
"""Every environment variable that fastgen reads."""


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for text in cpuinfo.read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def info() -> None:
    """Show what runs here, and why not the rest.

    Versions, processors, the backends of each op, and all environment variables.
    """
    import torch

    from fastgen import __version__, ops

    state = ops.info()
    isas = state["isas"]
    show.pairs(
        {
            "fastgen": __version__,
            "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
            "torch": torch.__version__,
            "CPU": f"{_cpu_name()}, {os.cpu_count()} logical cores",
            "GPU": _gpu_names(),
            "threads": state["threads"],
            "fastgen._C": state["cpp"],
            "ISA": f"{state['isa']} (available: {', '.join(isas)})" if isas else "none: the CPU kernels are not loaded",
            "triton": state["triton"],
            "backend": state["backend"],
            "math": state["math"],
        }
    )
    show.line()
    rows = []
    for name, backends in state["ops"].items():
        runs = [b for b, reason in backends.items() if reason == "can serve"]
        others = [f"{b}: {reason}" for b, reason in backends.items() if reason != "can serve"]
        rows.append((name, " > ".join(runs), "; ".join(others) or "-"))
    show.table(rows, ("op", f"backends on {state['device']}", "not available"))
    show.line()
    show.table(
        [(name, os.environ.get(name) or "-", meaning) for name, meaning in ENVIRONMENT.items()],
        ("variable", "now", "meaning"),
    )

"""The machine and the code that a figure belongs to, and whether the machine was idle."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from fastgen.ops import info

__all__ = ["ROOT", "LoadWatch", "caches", "describe", "level_of"]

ROOT = Path(__file__).resolve().parents[1]
_FOREIGN = 0.1
"""CPU time of other processes, in cores, from which a timing counts as contended."""


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Bytes of the data caches that one core sees: {"L1": ..., "L2": ..., "L3": ...}; empty where Linux does not say."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (folder / "type").read_text().strip() != "Instruction":
            text = (folder / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
            found[f"L{(folder / 'level').read_text().strip()}"] = int(text.rstrip("KM")) * unit
    return found


def level_of(working_set: int) -> str:
    """The smallest cache that holds so many bytes, or DRAM."""
    for name, size in caches().items():
        if working_set <= size:
            return name
    return "DRAM"


def _git(*args: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def describe(device: str) -> dict[str, Any]:
    """CPU, GPU, caches, versions, ISA, threads, commit, date."""
    state = info()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "isa": state["isa"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": state["triton"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain")),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }


def _busy_seconds() -> float | None:
    """CPU time that the whole machine has spent working, from /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class LoadWatch:
    """Watches for other work on the machine from its creation on."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = _busy_seconds(), time.process_time(), time.monotonic()

    def foreign(self) -> float:
        """Cores that other processes, or the host, kept busy since creation; NaN where Linux does not say."""
        busy = _busy_seconds()
        wall = time.monotonic() - self._wall
        if busy is None or self._busy is None or wall <= 0:
            return float("nan")
        # /proc/stat counts in hundredths of a second
        return max(0.0, (busy - self._busy) - (time.process_time() - self._own) - 0.02) / wall

    def contended(self) -> bool:
        """Whether others took more than a tenth of a core."""
        return self.foreign() > _FOREIGN

    @staticmethod
    def busy_before(threads: int, started: bool) -> str | None:
        """What is wrong with the machine before a timing: a sentence, or None if it is idle.

        ``started``: this process has worked already, so that the one-minute load may hold its own threads.
        """
        try:
            load = os.getloadavg()[0]
        except OSError:
            return None
        if load > 0.3 + (threads if started else 0):
            return f"the one-minute load is {load:.2f}"
        loadavg = Path("/proc/loadavg")
        if loadavg.is_file():
            time.sleep(0.02)  # OpenMP's threads spin for a moment after a parallel region
            samples = []
            for _ in range(5):
                samples.append(int(loadavg.read_text().split()[3].partition("/")[0]))
                time.sleep(0.002)
            if sorted(samples)[2] > 1:
                return f"{sorted(samples)[2] - 1} other processes are running"
        return None

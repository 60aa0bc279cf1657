"""The processes that train together: one without ``torchrun``, ``WORLD_SIZE`` of them under it."""

from __future__ import annotations

import atexit
import dataclasses
import os

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World", "world"]


@dataclasses.dataclass(frozen=True)
class World:
    """Where this process stands among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over all processes; they all must call this."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
            values = values / self.size
        return values.cpu()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; they all must call this."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)

    def gather(self, values: Tensor) -> list[Tensor]:
        """``values`` of every process, on the CPU; they all must call this, with one shape."""
        if self.size == 1:
            return [values.cpu()]
        values = values.to(self.device)
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values)
        return [v.cpu() for v in found]

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world(device: torch.device | str | None) -> World:
    """The processes of this run; joins the group that ``torchrun`` describes, unless the process is in one already.

    A group that was joined here is kept to the end of the process: gloo and NCCL hang now and then where a group is joined
    a second time under the same address, and a program may train more than once.

    Args:
        device: None for CUDA where there is one (under ``torchrun`` the local rank's), else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    started = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return World(dist.get_rank(), size, device)

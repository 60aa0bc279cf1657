"""The order of the data: a pure function of (seed, epoch), so that a resume needs to know the step alone.

The samples of all epochs, each epoch a permutation of its own, form one endless sequence that is cut into batches:
no sample is dropped at the end of an epoch, and a batch may be larger than the data set.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["Order", "mix", "permutation"]


def mix(seed: int, epoch: int) -> int:
    """A seed for torch's generators, which keep 32 bits of it on the CPU, from the two numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:4], "little")


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of ``n`` samples in one epoch, int64 [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))


class Order:
    """Indices of the samples in each batch.

    Args:
        n: number of samples, at least 1.
        batch_size: samples in a batch, at least 1.
        seed: any integer.

    >>> order = Order(4, 3, seed=0)
    >>> sorted(torch.cat([order.batch(0), order.batch(1)])[:4].tolist())
    [0, 1, 2, 3]
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1:
            raise ValueError("the data set is empty")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._indices = torch.empty(0, dtype=torch.int64)

    def batch(self, number: int) -> Tensor:
        """Indices of batch ``number`` (from 0), int64 [batch_size]."""
        position, end = number * self.batch_size, (number + 1) * self.batch_size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, self.n)
            if epoch != self._epoch:
                self._epoch, self._indices = epoch, permutation(self.n, self.seed, epoch)
            piece = self._indices[offset : offset + end - position]
            pieces.append(piece)
            position += len(piece)
        return torch.cat(pieces)

"""Batches by number: what the trainer reads, from any source, in an order that a resume can take up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.data import Source, as_source, load
from fastgen.data.source import StreamSource
from fastgen.training.distributed import World
from fastgen.training.order import Order, mix

__all__ = ["Batches", "open_source"]


def open_source(data: Any, event_shape: tuple[int, ...], split: str = "train") -> Source:
    """``data`` as a source of samples of ``event_shape``; named image data are brought to that size.

    ``split`` is the part to take of data that have a name or a path.

    Raises:
        ValueError: the samples have another shape; or whatever :mod:`fastgen.data` has to say.
    """
    if isinstance(data, (str, Path)):
        square = len(event_shape) == 3 and event_shape[1] == event_shape[2]
        size, channels = (event_shape[1], event_shape[0]) if square else (None, None)
        source = load(data, split=split, image_size=size, channels=channels)
    else:
        source = as_source(data)
    if source.event_shape != tuple(event_shape):
        raise ValueError(f"{source.name} has samples of shape {source.event_shape}, the model takes {tuple(event_shape)}")
    return source


class Batches:
    """Batch 0, 1, 2, ... of a run; each process gets its slice, on its device.

    Args:
        source: where samples come from. A stream gives its own batches, again from the start when it ends.
        batch_size: samples in a batch, over all processes.
        seed: decides the order.
        world: the processes of the run.

    Raises:
        ValueError: the processes cannot share ``batch_size`` evenly.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, world: World) -> None:
        if batch_size % world.size:
            raise ValueError(f"batch_size {batch_size} cannot be shared by {world.size} processes: it must be a multiple")
        self._source = source
        self._stream_source = source if isinstance(source, StreamSource) else None
        self._world = world
        self._seed = seed
        self._order = None if self._stream_source is not None else Order(len(source), batch_size, seed)
        self._epoch = -1
        self._position = 0
        self._stream: Iterator[tuple[Tensor, ...]] = iter(())

    def skip(self, number: int) -> None:
        """Go forward to batch ``number``: a stream is read up to there, anything else needs no work."""
        if self._order is None:
            with torch.random.fork_rng(devices=[]):
                while self._position < number:
                    self._next()

    def _next(self) -> tuple[Tensor, ...]:
        """The next batch of the stream."""
        self._position += 1
        batch = next(self._stream, None)
        if batch is None:
            self._epoch += 1
            # A shuffling DataLoader takes its order from torch's generator as a pass starts: fixed here, per pass.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mix(self._seed, self._epoch))
                self._stream = iter(self._source.batches())  # type: ignore[attr-defined]
                batch = next(self._stream, None)
        if batch is None:
            raise ValueError(f"{self._source.name} gives no more batches: it can be gone through once only")
        return batch

    def batch(self, number: int) -> Tensor | tuple[Tensor, ...]:
        """This process's slice of batch ``number``: ``x``, or ``(x, y)``. Streams must be read in order."""
        rank, size = self._world.rank, self._world.size
        if self._order is not None:
            parts = self._source.batch(self._order.batch(number).chunk(size)[rank])
        else:
            parts = self._next()
            if len(parts[0]) % size:
                raise ValueError(f"a batch of {len(parts[0])} from {self._source.name} cannot be shared by {size} processes")
            parts = tuple(p.chunk(size)[rank] for p in parts)
        parts = tuple(self._move(p) for p in parts)
        return parts if len(parts) > 1 else parts[0]

    def _move(self, part: Tensor) -> Tensor:
        device = self._world.device
        if device.type == "cuda" and part.device.type == "cpu":
            part = part.pin_memory()
        return part.to(device, non_blocking=True)

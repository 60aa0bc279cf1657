"""What is timed: one op or composite at one shape in one mode, and the calls that do it on rotating inputs."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.composites import measured
from fastgen.ops import OpSpec

__all__ = ["MODES", "SETS", "Workload", "bind", "sweep", "tensors_of"]

MODES = ("fwd", "fwdbwd")
SETS = 8
"""Input sets that a timing goes round, so that inputs beyond the cache are read from memory."""
_INTENSE = 100
"""Operations per byte from which memory does not matter, and one input set does."""
_NAMES = ("small", "middle", "large")


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """The outputs of a call as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def bind(function: Callable[..., Any], inputs: Mapping[str, Any], mode: str, gradients: Sequence[str]) -> Callable[[], Any]:
    """A call without arguments: ``function(**inputs)``, in mode "fwdbwd" followed by its gradients.

    Gradients are those of a fixed random combination of the outputs, the same for every function of these inputs, and come
    from ``torch.autograd.grad``, so that nothing accumulates. A "fwdbwd" call returns outputs and gradients.
    """
    if mode == "fwd":
        return lambda: function(**inputs)
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in gradients if inputs.get(name) is not None}
    arguments = {**inputs, **leaves}
    wanted = list(leaves.values())
    results = tensors_of(function(**arguments))
    live = [i for i, output in enumerate(results) if output.requires_grad]
    generator = torch.Generator().manual_seed(7)
    # odd multiples of 1/8: never zero, and the same in every storage type
    draws = [(2 * torch.randint(-8, 8, results[i].shape, generator=generator) + 1) / 8 for i in live]
    weights = [draw.to(results[i].device, results[i].dtype) for i, draw in zip(live, draws, strict=True)]
    del results

    def call() -> Any:
        outputs = tensors_of(function(**arguments))
        return (*outputs, *torch.autograd.grad([outputs[i] for i in live], wanted, weights))

    return call


@dataclasses.dataclass(frozen=True)
class Workload:
    """One op or composite, shape, mode, storage type and choice of flags."""

    op: str
    """The name of its description among :func:`benchmarks.composites.measured`."""
    rows: int
    event: tuple[int, ...]
    mode: str = "fwd"
    flags: tuple[tuple[str, Any], ...] = ()
    """Those that differ from the default."""
    dtype: str = "float32"

    @property
    def spec(self) -> OpSpec:
        return measured()[self.op]

    @property
    def shape(self) -> str:
        """Like 64x3x32x32."""
        return "x".join(map(str, (self.rows, *self.event)))

    @property
    def size(self) -> str:
        """small, middle or large for the shapes of the SPEC, else "extra"."""
        shapes = list(self.spec.shapes)
        here = (self.rows, self.event)
        return _NAMES[min(shapes.index(here), 2)] if here in shapes else "extra"

    @property
    def title(self) -> str:
        flags = "".join(f" {name}={value}" for name, value in self.flags)
        return f"{self.op} {self.shape} {self.dtype} {self.mode}{flags}"

    def has_mode(self) -> bool:
        """Whether the op has gradients to time, where the mode asks for them."""
        return self.mode == "fwd" or bool(self.spec.gradients)

    def inputs(self, device: str, sets: int | None = None) -> list[dict[str, Any]]:
        """Input sets of this workload, each drawn from its own seed; as many as a timing needs, or ``sets``."""
        first = self._draw(device, 0)
        if sets is None:
            sets = 1 if self.operations(first) > _INTENSE * self.bytes_moved(first) else SETS
        return [first, *(self._draw(device, i) for i in range(1, sets))]

    def _draw(self, device: str, seed: int) -> dict[str, Any]:
        flags = {**{name: values[0] for name, values in self.spec.flags.items()}, **dict(self.flags)}
        return self.spec.example_inputs(
            self.rows,
            self.event,
            dtype=getattr(torch, self.dtype),
            device=device,
            generator=torch.Generator().manual_seed(1000 + seed),
            **flags,
        )

    def bytes_moved(self, inputs: dict[str, Any]) -> int:
        """What a perfect kernel reads and writes in one call."""
        return self.spec.bytes_moved(inputs, self.mode)

    def operations(self, inputs: dict[str, Any]) -> int:
        """Additions and multiplications of one call; 0 where the description leaves them out, since memory is the limit."""
        return self.spec.operations(inputs, self.mode) if self.spec.operations else 0

    def for_reference(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the inputs that the reference takes too: it has no math modes and no choices of memory."""
        known = inspect.signature(self.spec.reference).parameters
        return {name: value for name, value in inputs.items() if name in known}


def sweep(
    ops: Sequence[str], modes: Sequence[str], extra: Sequence[Workload] = (), dtype: str = "float32", size: str | None = None
) -> list[Workload]:
    """Every shape of every description in every mode, then those of ``extra`` that are not among them; ``size`` filters.

    ``size`` is part of a shape or the name of a size: "64x3", "large".
    """
    found = [
        Workload(op, rows, event, mode, dtype=dtype)
        for op in ops
        for rows, event in sorted(measured()[op].shapes, key=lambda shape: shape[0] * math.prod(shape[1]))
        for mode in modes
    ]
    found += [w for w in dict.fromkeys(extra) if w not in found and w.op in ops and w.mode in modes]
    return [w for w in found if w.has_mode() and (not size or size in w.shape or size == w.size)]

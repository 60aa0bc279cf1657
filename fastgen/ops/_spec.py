"""``OpSpec``: what contract tests, benchmarks, ``fastgen bench`` and ``explain`` know about an op."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["OpSpec", "all_specs", "get_spec"]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """Everything about an op that is not its mathematics.

    Attributes:
        name: the stem: fastgen/ops/NAME.py, kernels/NAME.py, csrc/ops/NAME.h, tests/ops/test_NAME.py.
        function: the public function; takes ``backend=`` besides the inputs.
        reference: plain PyTorch with the same arguments; its own autograd is the truth for gradients.
        outputs: name of each output -> precision class: "exact", "elementwise", "reduction", "cancelling",
            "iterative", "filtering" or "conditioned".
        extra_outputs: the same for outputs that an option adds after those.
        gradients: names of the inputs that gradients flow to.
        example_inputs: ``(rows, event, *, dtype, device, generator, **flags)`` -> keyword arguments of ``function``.
        flags: values that the options of ``example_inputs`` may take; tests draw from them, the first is the default.
        event_ranks: number of dimensions an event may have.
        sizes: lengths of an event of one dimension that tests draw; None takes the usual ones, up to several thousand.
        backends: the fused backends that the op has kernels for; none where libraries under PyTorch do all the work.
        shapes: (rows, event) of the benchmark, from latency-bound to memory-bound.
        bytes_moved: ``(inputs, mode)`` -> bytes a perfect kernel reads and writes; mode "fwd" or "fwdbwd".
        operations: ``(inputs, mode)`` -> additions and multiplications that the op takes, where they and not the bytes are its
            limit.
        dtypes: storage types of the fused backends.
        gradient_precision: precision class of the gradients.
        double_backward: the gradients have gradients of their own, as penalties on gradients need.
        samplewise: row i of the outputs depends on row i of the inputs alone.
        needs_key: there is no default for ``key``: the op repeats noise that another has drawn.
        stops_gradient: something that depends on the inputs counts as a constant, which finite differences cannot know.
        supports: ``(backend, inputs)`` -> None, or a sentence that says why that backend cannot serve.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    outputs: Mapping[str, str]
    gradients: tuple[str, ...]
    example_inputs: Callable[..., dict[str, Any]]
    shapes: tuple[tuple[int, tuple[int, ...]], ...]
    bytes_moved: Callable[[dict[str, Any], str], int]
    extra_outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flags: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    event_ranks: tuple[int, ...] = (0, 1, 3)
    sizes: tuple[int, ...] | None = None
    backends: tuple[str, ...] = ("triton", "cpp")
    operations: Callable[[dict[str, Any], str], int] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    gradient_precision: str = "elementwise"
    double_backward: bool = False
    samplewise: bool = True
    needs_key: bool = False
    stops_gradient: bool = False
    supports: Callable[[str, dict[str, Any]], str | None] | None = None

    def __post_init__(self) -> None:
        if self.name in _specs:
            raise ValueError(f"op {self.name!r} is defined twice")
        _specs[self.name] = self

    def outputs_of(self, result: Any) -> dict[str, Tensor]:
        """The outputs of one call by name."""
        values = (result,) if isinstance(result, Tensor) else tuple(result)
        return dict(zip(self.precisions(len(values)), values, strict=True))

    def precisions(self, count: int) -> dict[str, str]:
        """Name -> precision class of the outputs of a call that returns ``count`` of them."""
        return dict(self.outputs) if count == len(self.outputs) else {**self.outputs, **self.extra_outputs}


_specs: dict[str, OpSpec] = {}


def all_specs() -> dict[str, OpSpec]:
    """Every op by name."""
    import fastgen.ops  # noqa: F401 - importing the package defines the specs

    return dict(sorted(_specs.items()))


def get_spec(name: str) -> OpSpec:
    """The spec of one op; ``ValueError`` for an unknown name."""
    specs = all_specs()
    if name not in specs:
        raise ValueError(f"unknown op {name!r}; known: {', '.join(specs)}")
    return specs[name]

"""Composites: ops that are used together, timed together.

A composite is described as an op is, by an :class:`fastgen.ops.OpSpec`, and goes through the same gate: parity with its
reference on the inputs to be timed, the control, the roofline. It is no op of fastgen, and is not registered as one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fastgen import random
from fastgen.ops import OpSpec, WinogradWeight, all_specs, diffuse, diffusion_loss, get_spec, nearest_code, winograd_conv2d
from fastgen.ops.diffuse import diffuse_reference
from fastgen.ops.diffusion_loss import diffusion_loss_reference
from fastgen.ops.nearest_code import CodeStatistics, nearest_code_reference
from fastgen.ops.winograd_conv2d import winograd_conv2d_reference, winograd_weight

__all__ = [
    "Composite",
    "codebook_step",
    "codebook_step_reference",
    "composites",
    "diffusion_objective",
    "diffusion_objective_reference",
    "measured",
    "ready_conv2d",
    "ready_conv2d_reference",
]

_composites: dict[str, OpSpec] = {}


@dataclasses.dataclass(frozen=True)
class Composite(OpSpec):
    """What an OpSpec says, of several ops at once."""

    def __post_init__(self) -> None:
        if self.name in _composites:
            raise ValueError(f"composite {self.name!r} is defined twice")
        _composites[self.name] = self


def composites() -> dict[str, OpSpec]:
    """Every composite by name."""
    return dict(sorted(_composites.items()))


def measured() -> dict[str, OpSpec]:
    """What can be timed, by name: every op, then every composite."""
    return {**all_specs(), **composites()}


def diffusion_objective(
    x0: Tensor, model_out: Tensor, coefficients: Tensor, key: Tensor, *, kept: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """What a training step of diffusion does besides the network: (the noised input x_t, the mean squared error).

    With ``kept`` the noise is kept for the loss, else it is drawn again, which saves its memory.
    """
    x_t, noise = diffuse(x0, coefficients, key, target=kept, backend=backend)
    losses = diffusion_loss(model_out, x0, coefficients, None if kept else key, noise=noise, backend=backend)
    return x_t, losses.mean()


def diffusion_objective_reference(
    x0: Tensor, model_out: Tensor, coefficients: Tensor, key: Tensor | None = None, *, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`diffusion_objective` in plain PyTorch."""
    x_t = diffuse_reference(x0, coefficients, key, noise=noise).x_t
    return x_t, diffusion_loss_reference(model_out, x0, coefficients, key, noise=noise).mean()


def _objective_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
    kept: bool = True,
) -> dict[str, Any]:
    x0, model_out = (torch.randn(rows, *event, generator=generator).to(device, dtype) for _ in range(2))
    angle = torch.rand(rows, generator=generator) * math.pi / 2
    table = torch.stack([angle.cos(), angle.sin(), torch.zeros(rows), torch.ones(rows)], 1).to(device)
    seed = int(torch.randint(2**62, (), generator=generator))
    key = random.key(seed, stream=random.Stream.TRAIN, device=device)
    return {"x0": x0, "model_out": model_out, "coefficients": table, "key": key, "kept": kept}


def _objective_bytes(inputs: dict[str, Any], mode: str) -> int:
    # x0 -> x_t; the network runs; model_out -> a number, its gradient. Noise need not be stored
    return inputs["x0"].nbytes * (3 if mode == "fwd" else 4)


Composite(
    name="diffusion_objective",
    function=diffusion_objective,
    reference=diffusion_objective_reference,
    outputs={"x_t": "elementwise", "loss": "reduction"},
    gradients=("model_out",),
    example_inputs=_objective_inputs,
    flags={"kept": (True, False)},
    shapes=((64, (3, 32, 32)),),
    bytes_moved=_objective_bytes,
    samplewise=False,
    needs_key=True,
)


def codebook_step(
    z: Tensor, codebook: Tensor, counts: Tensor, sums: Tensor, *, decay: float, eps: float, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A training step of a codebook that learns by moving averages: assign, look up, average, renew the codes.

    Args:
        z: vectors [N, D].
        codebook: [K, D].
        counts, sums: moving averages of the vectors that chose each code, [K], and of their sums, [K, D].
        decay: of the averages.
        eps: of the Laplace smoothing of the counts.

    Returns:
        (index [N], the chosen codes [N, D], counts, sums, codebook), the last three renewed.
    """
    found = nearest_code(z, codebook, statistics=True, backend=backend)
    return found.index, codebook[found.index], *_renewed(found.counts, found.sums, counts, sums, decay, eps)


def codebook_step_reference(
    z: Tensor, codebook: Tensor, counts: Tensor, sums: Tensor, *, decay: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`codebook_step` in plain PyTorch."""
    found = nearest_code_reference(z, codebook, statistics=True)
    assert isinstance(found, CodeStatistics)
    return found.index, codebook[found.index], *_renewed(found.counts, found.sums, counts, sums, decay, eps)


def _renewed(
    chosen: Tensor, total: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    counts = counts.lerp(chosen.to(counts.dtype), 1 - decay)
    sums = sums.lerp(total, 1 - decay)
    everything = counts.sum()
    smoothed = (counts + eps) * (everything / (everything + len(counts) * eps))
    return counts, sums, sums / smoothed[:, None]


def _codebook_inputs(
    rows: int,
    event: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    z, codebook = (torch.randn(rows, *event, generator=generator).to(device, dtype) for _ in range(2))
    counts = torch.ones(rows, device=device)
    return {"z": z, "codebook": codebook, "counts": counts, "sums": codebook.clone(), "decay": 0.8, "eps": 1e-5}


def _codebook_bytes(inputs: dict[str, Any], mode: str) -> int:
    # z, codebook, counts, sums -> indices, chosen codes, counts, sums, codebook
    return (
        2 * sum(inputs[name].nbytes for name in ("z", "counts", "sums")) + 2 * inputs["codebook"].nbytes + 8 * len(inputs["z"])
    )


Composite(
    name="codebook_step",
    function=codebook_step,
    reference=codebook_step_reference,
    outputs={"index": "exact", "codes": "exact", "counts": "elementwise", "sums": "reduction", "codebook": "reduction"},
    gradients=(),
    example_inputs=_codebook_inputs,
    event_ranks=(1,),
    shapes=((8192, (32,)),),
    bytes_moved=_codebook_bytes,
    operations=lambda inputs, mode: 2 * inputs["z"].numel() * len(inputs["codebook"]),
    samplewise=False,
)


def ready_conv2d(x: Tensor, weight: Tensor, bias: Tensor, ready: WinogradWeight, *, backend: str | None = None) -> Tensor:
    """A 3x3 convolution of a network that is evaluated many times: its weight was transformed beforehand.

    Args:
        x: [N, C, H, W], channels last.
        weight: [O, C, 3, 3].
        bias: [O].
        ready: the transformed weight.
    """
    if backend == "reference":
        return ready_conv2d_reference(x, weight, bias)
    return winograd_conv2d(x, ready, bias)


def ready_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`ready_conv2d` in plain PyTorch."""
    return winograd_conv2d_reference(x, weight, bias)


def _ready_conv2d_inputs(rows: int, event: tuple[int, ...], **options: Any) -> dict[str, Any]:
    spec = get_spec("winograd_conv2d")
    inputs = spec.example_inputs(rows, event, outputs=event[0], channels_last=True, **options)
    weight = inputs["weight"]
    return {"x": inputs["x"], "weight": weight, "bias": inputs["bias"], "ready": winograd_weight(weight)}


Composite(
    name="ready_conv2d",
    function=ready_conv2d,
    reference=ready_conv2d_reference,
    outputs={"y": "filtering"},
    gradients=(),
    example_inputs=_ready_conv2d_inputs,
    event_ranks=(3,),
    backends=("cpp",),
    shapes=((64, (32, 28, 28)), (8, (256, 16, 16)), (8, (128, 32, 32))),
    bytes_moved=lambda inputs, mode: 2 * inputs["x"].nbytes + inputs["weight"].nbytes,
    operations=lambda inputs, mode: 18 * inputs["x"].numel() * len(inputs["weight"]),
    dtypes=(torch.float32,),
)

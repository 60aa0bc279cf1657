"""Linear layers of flows: normalisation by the first batch, and invertible matrices over the channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from fastgen import ops
from fastgen.flows.transform import Bijection

__all__ = ["ActNorm", "LULinear"]


class ActNorm(Bijection):
    """y = x * exp(log_scale) + shift, a scale and a shift per channel; of vectors [N, C] or images [N, C, H, W].

    They start so that the first batch seen in training mode comes out with mean 0 and variance 1 in every channel, over all
    processes that train together.

    Source: Kingma and Dhariwal (2018), "Glow: generative flow with invertible 1x1 convolutions", section 3.1.
    """

    initialized: Tensor

    def __init__(self, channels: int, dims: int = 1) -> None:
        super().__init__()
        self.event_dims = (dims, dims)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._ready = False  # the same, where reading it does not wait for the device

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.initialized)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        values = x.transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        sums = torch.stack([values.sum(1), values.square().sum(1), values.new_full((len(values),), values.shape[1])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        mean = sums[0] / sums[2]
        # a constant channel is shifted and left at its scale
        variance = sums[1] / sums[2] - mean.square()
        scale = torch.where(variance > 1e-6, variance, 1.0).rsqrt()
        self.log_scale.copy_(scale.log())
        self.shift.copy_(-mean * scale)
        self.initialized.fill_(True)
        self._ready = True

    def _shaped(self, parameter: Tensor) -> Tensor:
        return parameter if self.event_dims[0] == 1 else parameter[:, None, None]

    def _ladj(self, x: Tensor) -> Tensor:
        return (self.log_scale.sum() * x[0, 0].numel()).expand(len(x))

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self._ready:
            self._initialize(x)
        return torch.addcmul(self._shaped(self.shift), x, self._shaped(self.log_scale.exp())), self._ladj(x)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (y - self._shaped(self.shift)) * self._shaped((-self.log_scale).exp()), -self._ladj(y)

    @torch.no_grad()
    def rebuild(
        self, y: Tensor, context: Tensor | None, grad_y: Tensor, grad_ladj: Tensor, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """In closed form, as :func:`fastgen.ops.affine_coupling_rebuild` has it."""
        moved = y - self._shaped(self.shift)
        others = [d for d in range(y.dim()) if d != 1]
        grad_log_scale = (grad_y * moved).sum(others) + grad_ladj.sum() * y[0, 0].numel()
        grads = {self.log_scale: grad_log_scale, self.shift: grad_y.sum(others)}
        x = moved.mul_(self._shaped((-self.log_scale).exp()))
        return x, grad_y * self._shaped(self.log_scale.exp()), [*(grads[p] for p in parameters), None]


class LULinear(Bijection):
    """Multiply the channels of every pixel by an invertible matrix, learned as its LU factors; it starts as a rotation.

    See :func:`fastgen.ops.lu_linear`; of vectors [N, C] or images [N, C, H, W].
    """

    sign: Tensor
    permutation: Tensor

    def __init__(self, channels: int, dims: int = 1) -> None:
        super().__init__()
        self.event_dims = (dims, dims)
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
        matrix, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())
        self.register_buffer("sign", diagonal.sign().float())
        self.register_buffer("permutation", matrix.argmax(1))

    def _multiply(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        factors = self.lower, self.upper, self.log_diagonal, self.sign
        return ops.lu_linear(x, *factors, self.permutation, inverse=inverse)

    @torch.no_grad()
    def rebuild(
        self, y: Tensor, context: Tensor | None, grad_y: Tensor, grad_ladj: Tensor, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """By one fused pass, :func:`fastgen.ops.lu_linear_rebuild`."""
        factors = self.lower, self.upper, self.log_diagonal
        x, grad_x, *grads = ops.lu_linear_rebuild(y, *factors, self.sign, self.permutation, grad_y, grad_ladj)
        found = dict(zip(factors, grads, strict=True))
        return x, grad_x, [*(found[p].to(p.dtype) for p in parameters), None]

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._multiply(x, inverse=False)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._multiply(y, inverse=True)

"""Images for flows: grey levels to real numbers and back, and reshaping without loss.

An image x in [0, 1] of L grey levels holds integers k = x (L - 1). Dequantised (:mod:`fastgen.nn.pixels`) it is
v = (k + u) / L with u uniform on (0, 1), so that E log2 p(v) - log2 L bounds the log-probability of a pixel from below, in
bits: what bits/dim of a flow are. Pixels v then go to the real line by :class:`Logit`, or are centred by :class:`Centre`.

Sources: Theis, van den Oord and Bethge (2016), "A note on the evaluation of generative models"; Dinh, Sohl-Dickstein and Bengio
(2017), "Density estimation using Real NVP", section 4.1 (logit) and figure 3 (squeeze).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from fastgen.flows.transform import Bijection
from fastgen.nn.conditioner import LIMIT

__all__ = ["Centre", "Flatten", "Logit", "Squeeze", "pixels"]


class Logit(Bijection):
    """y = logit(p), p = alpha + (1 - 2 alpha) x, of every element of x.

    [0, 1] and a margin on both sides go to the real line, which keeps 0 and 1 finite. Beyond, where p is not in (0, 1), the
    log-determinant is -inf.

    Args:
        alpha: in (0, 0.5).
        dims: dimensions of an event.
    """

    def __init__(self, alpha: float, dims: int = 3) -> None:
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must be in (0, 0.5), got {alpha}")
        self.alpha = alpha
        self.event_dims = (dims, dims)

    @property
    def domain(self) -> Constraint:
        """Where p is in (0, 1)."""
        margin = self.alpha / (1 - 2 * self.alpha)
        return constraints.independent(constraints.interval(-margin, 1 + margin), self.event_dims[0])

    def _log_slope(self, y: Tensor, sign: float) -> Tensor:
        """``sign`` * log dy/dx, summed over the event."""
        # dy/dx = (1 - 2 alpha) / (p (1 - p)) with p = sigmoid(y)
        slope = torch.nn.functional.softplus(y) + torch.nn.functional.softplus(-y)
        return sign * (slope.flatten(1).sum(1) + slope[0].numel() * math.log1p(-2 * self.alpha))

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p, eps = self.alpha + (1 - 2 * self.alpha) * x, torch.finfo(x.dtype).eps
        y = torch.logit(p, eps)
        inside = ((p > 0) & (p < 1)).flatten(1).all(1)
        return y, torch.where(inside, self._log_slope(y, 1.0), -math.inf)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha), self._log_slope(y, -1.0)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Centre(Bijection):
    """y = x - 1/2; what is no pixel at all saturates, so that later sums do not overflow."""

    event_dims = (3, 3)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.clamp(-LIMIT, LIMIT) - 0.5, x.new_zeros(len(x))

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y + 0.5, y.new_zeros(len(y))


class Flatten(Bijection):
    """[N, *shape] -> [N, D]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.event_dims = (len(shape), 1)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.reshape(len(x), math.prod(self.shape)), x.new_zeros(len(x))

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.reshape(len(y), *self.shape), y.new_zeros(len(y))

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class Squeeze(Bijection):
    """Blocks of 2 x 2 pixels into channels: [N, C, H, W] -> [N, 4 C, H / 2, W / 2].

    The channels of the blocks' main diagonal come first, those of the other diagonal last, so that the halves of the channels
    are the colours of a checkerboard.
    """

    event_dims = (3, 3)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        first, others, last = blocks.reshape(n, 4 * c, h // 2, w // 2).split((c, 2 * c, c), 1)
        return torch.cat((first, last, others), 1), x.new_zeros(n)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, c, h, w = y.shape
        first, last, others = y.split((c // 4, c // 4, c // 2), 1)
        blocks = torch.cat((first, others, last), 1).reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return blocks.reshape(n, c // 4, 2 * h, 2 * w), y.new_zeros(n)


def pixels(alpha: float | None) -> Bijection:
    """From pixels in [0, 1] to real numbers: :class:`Logit`, or :class:`Centre` where ``alpha`` is None."""
    return Centre() if alpha is None else Logit(alpha)

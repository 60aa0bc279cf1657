"""What all flows are: a bijection from data to noise, and the density that the change of variables gives.

    log p(x) = log p_base(t(x)) + log |det dt/dx|        nats

Training minimises -log p(x). A flow is a :class:`fastgen.nn.model.Model` and, called with a context, a
``torch.distributions.Distribution``, as zuko's are: ``flow(context).log_prob(x)``, ``.sample(shape)``, ``.rsample(shape)``,
``.rsample_and_log_prob(shape)``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.nn.functional import one_hot

from fastgen.flows import images
from fastgen.flows.base import BASES
from fastgen.flows.diagnose import Report, diagnose
from fastgen.flows.stack import Stack
from fastgen.flows.transform import Bijection, Compose, GivenContext
from fastgen.nn.model import Batch, Config, Model, split_batch
from fastgen.nn.pixels import dequantize, quantize

__all__ = ["Context", "Flow", "FlowConfig", "FlowDistribution", "FlowLoss", "ImageFlowLoss"]

Context = Tensor | Sequence[float] | int
"""A context as users give it: features [C] or [N, C]; labels, integers [N] or one, which stand for one-hot features."""

_ROWS = 4096  # samples that are inverted at a time: their activations stay in the cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig(Config):
    """Options shared by all flows."""

    context: int = 0
    """Features of the context that the density is conditional on; integer labels count as one-hot features. 0: none."""
    base: Literal["normal", "logistic"] = "normal"
    """Distribution of the noise."""
    memory: Literal["standard", "invertible"] = "standard"
    """"invertible" trains in memory that does not grow with depth; see :mod:`fastgen.flows.stack`."""
    stored: float = 0.0
    """With memory="invertible": share of the layers whose activations are stored all the same, for less time."""
    grey_levels: int = 256
    """Images alone: their grey levels, dequantised by uniform noise; 0 for images of real values in [0, 1]."""
    alpha: float | None = 0.05
    """Images alone: pixels v go to the real line as logit(alpha + (1 - 2 alpha) v); None: as v - 1/2."""
    learning_rate: float = 1e-3

    @property
    def is_image(self) -> bool:
        """Whether events are images (C, H, W)."""
        return len(self.event_shape) == 3

    def stack(self, layers: Iterable[Bijection]) -> Stack:
        """The layers as a stack with these options."""
        return Stack(layers, memory=self.memory, stored=self.stored)

    def __post_init__(self) -> None:
        if not 0 <= self.stored <= 1:
            raise ValueError(f"stored must be in 0 .. 1, got {self.stored}")
        if self.context < 0:
            raise ValueError(f"context must be at least 0, got {self.context}")
        if self.base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {self.base!r}")
        if self.grey_levels < 0 or self.grey_levels == 1:
            raise ValueError(f"grey_levels must be 0 or at least 2, got {self.grey_levels}")


class FlowLoss(NamedTuple):
    """The loss of a flow."""

    loss: Tensor
    """Mean negative log-likelihood in nats per sample."""


class ImageFlowLoss(NamedTuple):
    """The loss of a flow of images."""

    loss: Tensor
    """Mean negative log-likelihood of the dequantised pixels in nats per sample."""
    bits_per_dim: Tensor
    """The same as a code length of the grey levels, in bits per pixel and channel; upper bound."""


class Flow(Model):
    """Base of all flows.

    Args:
        config: the flow's config.
        layers: bijection from data to noise [N, D], D the number of elements of an event. It takes vectors [N, D], or, where
            its ``event_dims`` say so, events as they are; images come as real numbers.

    Attributes:
        transform: all the layers as one bijection.
        base: the distribution of the noise.
    """

    config: FlowConfig

    def __init__(self, config: FlowConfig, layers: Bijection) -> None:
        super().__init__(config)
        before: list[Bijection] = [images.pixels(config.alpha)] if config.is_image else []
        if layers.event_dims[0] == 1 and len(config.event_shape) > 1:
            before.append(images.Flatten(config.event_shape))
        self.transform = Compose([*before, layers]) if before else layers
        self.base = BASES[config.base]

    @property
    def features(self) -> int:
        """Elements of an event, and dimensions of the noise."""
        return math.prod(self.event_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def _context(self, context: Context | None, n: int | None = None) -> Tensor | None:
        """The context as features: [*, C], or [n, C]."""
        size = self.config.context
        if context is None:
            if size:
                raise ValueError(f"this flow is conditional: it needs a context of {size} features, or labels")
            return None
        if not size:
            raise ValueError("this flow takes no context: its config has context=0")
        values = torch.as_tensor(context, device=self.device)
        if not values.is_floating_point():
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < size:
                raise ValueError(f"labels must be in 0 .. {size - 1}, got {int(values.min())} .. {int(values.max())}")
            values = one_hot(values.long(), size)
        if not values.dim() or values.shape[-1] != size:
            raise ValueError(f"context must have {size} features, got shape {list(values.shape)}")
        values = values.to(self.dtype)
        if n is None:
            return values
        if values.dim() > 2 or (values.dim() == 2 and len(values) not in (1, n)):
            raise ValueError(f"context must be [{size}] or [{n}, {size}], got shape {list(values.shape)}")
        return values.expand(n, size)

    def forward(self, context: Context | None = None) -> FlowDistribution:
        """The density, given a context [*batch, C] or integer labels [*batch]."""
        return FlowDistribution(self, self._context(context))

    def _dequantized(self, x: Tensor, key: Tensor | None) -> Tensor:
        return dequantize(x, self.config.grey_levels, key) if self.config.is_image and self.config.grey_levels else x

    def log_prob(self, x: Tensor, context: Context | None = None, *, key: Tensor | None = None) -> Tensor:
        """log p(x | context) in nats, for x [N, *event_shape]: [N].

        Images are dequantised with the noise at ``key`` (None: PyTorch's generator), and the density is that of the pixels
        on (0, 1): ``flow().log_prob`` takes them dequantised.
        """
        self.check_samples(x)
        z, ladj = self.transform.call_and_ladj(self._dequantized(x, key), self._context(context, len(x)))
        return self.base.log_prob(z) + ladj

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> FlowLoss | ImageFlowLoss:
        """Mean negative log-likelihood of a batch x, or (x, context) where the flow is conditional."""
        x, context = split_batch(batch)
        nats = -self.log_prob(x, context if self.config.context else None, key=key).mean()
        if not self.config.is_image:
            return FlowLoss(nats)
        levels = math.log2(self.config.grey_levels) if self.config.grey_levels else 0.0
        return ImageFlowLoss(nats, nats.detach() / (self.features * math.log(2)) + levels)

    def encode(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The noise z [N, D] that x [N, *event_shape] comes from; of an image, the middle of its grey levels."""
        self.check_samples(x)
        if self.config.is_image and self.config.grey_levels:
            x = (x * (self.config.grey_levels - 1) + 0.5) / self.config.grey_levels
        return self.transform(x, self._context(context, len(x)))

    def decode(self, z: Tensor, context: Context | None = None) -> Tensor:
        """The sample x [N, *event_shape] that noise z [N, D] becomes: of images, the grey levels in [0, 1]."""
        if z.dim() != 2 or z.shape[1] != self.features:
            raise ValueError(f"z must be [N, {self.features}], got {list(z.shape)}")
        x = self.invert(z, self._context(context, len(z)))
        return quantize(x, self.config.grey_levels) if self.config.is_image and self.config.grey_levels else x

    def invert(self, z: Tensor, context: Tensor | None) -> Tensor:
        """t.inv(z) for z [N, D] and context [N, C] or None; without gradients, a cache's worth of samples at a time."""
        if torch.is_grad_enabled() or len(z) <= _ROWS:
            return self.transform.inv_and_ladj(z, context)[0]
        contexts = itertools.repeat(None) if context is None else context.split(_ROWS)
        return torch.cat([self.transform.inv_and_ladj(*part)[0] for part in zip(z.split(_ROWS), contexts, strict=False)])

    def diagnose(
        self, x: Tensor, context: Context | None = None, *, inverse: bool = False, key: Tensor | None = None
    ) -> Report:
        """What every layer does to a batch, and the first one that gives something not finite.

        Args:
            x: data [N, *event_shape]; noise [N, D] with ``inverse``.
            inverse: look at sampling instead of at the density.
            key: of the noise that dequantises images.

        >>> print(flow.diagnose(x))  # doctest: +SKIP
        """
        if not inverse:
            self.check_samples(x)
            x = self._dequantized(x, key)
        return diagnose(self.transform, x, self._context(context, len(x)), inverse=inverse)

    @torch.no_grad()
    def sample(self, n: int, *, key: Tensor | None = None, context: Context | None = None, temperature: float = 1.0) -> Tensor:
        """Draw x = t.inv(temperature * z), z from the base distribution: [n, *event_shape].

        Args:
            key: sample i depends on the noise at index ``key.sample + i`` alone; None draws from PyTorch's generator.
            context: [C] for all, [n, C], or integer labels.
            temperature: scale of the noise; below 1 nearer to the modes.
        """
        z = self.base.draw((n, self.features), key, self.device, self.dtype)
        return self.decode(z if temperature == 1 else z * temperature, context)


class FlowDistribution(Distribution):
    """A flow at one context, of batch shape ``context.shape[:-1]`` and the flow's event shape.

    Attributes:
        transform: from data to noise, a ``torch.distributions.Transform``.
        base: the distribution of the noise [D].
    """

    arg_constraints: dict[str, Constraint] = {}  # noqa: RUF012 - declared so by torch
    has_rsample = True

    def __init__(self, flow: Flow, context: Tensor | None = None) -> None:
        self._flow = flow
        self._context = context
        self.transform = GivenContext(flow.transform, context)
        batch = () if context is None else context.shape[:-1]
        super().__init__(torch.Size(batch), torch.Size(flow.event_shape), validate_args=False)

    @property
    def base(self) -> Distribution:
        """The distribution of the noise."""
        flow = self._flow
        return flow.base.distribution(torch.zeros(flow.features, device=flow.device, dtype=flow.dtype))

    @property
    def support(self) -> Constraint:
        """Where the density is positive."""
        return self.transform.domain

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) in nats, for x [*shape, *event_shape]: ``shape`` broadcast with the batch shape."""
        event = value.shape[max(0, value.dim() - len(self.event_shape)) :]
        if not value.is_floating_point() or tuple(event) != tuple(self.event_shape):
            expected = ", ".join(map(str, self.event_shape))
            raise ValueError(f"x must be floats [..., {expected}], got {value.dtype} {list(value.shape)}")
        z, ladj = self.transform.call_and_ladj(value)
        return self._flow.base.log_prob(z.reshape(-1, z.shape[-1])).reshape(ladj.shape) + ladj

    def rsample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        """Draws [*sample_shape, *batch_shape, *event_shape] with gradients to parameters and context."""
        return self.rsample_and_log_prob(sample_shape, key=key)[0]

    def sample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        """:meth:`rsample` without gradients."""
        flow, shape = self._flow, (*sample_shape, *self.batch_shape)
        with torch.no_grad():
            context = None if self._context is None else self._context.expand(*shape, -1).flatten(0, -2)
            return flow.invert(self._noise(shape, key), context).reshape(*shape, *self.event_shape)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws as :meth:`rsample`, and their log-densities [*sample_shape, *batch_shape] from the same pass."""
        shape = (*sample_shape, *self.batch_shape)
        z = self._noise(shape, key)
        x, ladj = self.transform.inv_and_ladj(z.reshape(*shape, self._flow.features))
        return x, self._flow.base.log_prob(z).reshape(shape) - ladj

    def _noise(self, shape: tuple[int, ...], key: Tensor | None) -> Tensor:
        """Noise for draws of ``shape``: [N, D]."""
        flow = self._flow
        return flow.base.draw((math.prod(shape), flow.features), key, flow.device, flow.dtype)

"""Diffusion in the latent space of an autoencoder.

    z = (encode(x) - m) / s,    loss = E_t,eps |f(z_t, t) - target|^2,    sample: decode(s z + m)

The autoencoder is any of the registry that has ``encode`` and ``decode``. It is trained beside the diffusion, each step one
update of either, or comes trained and stays as it is (:meth:`LatentDiffusion.over`). Mean m and standard deviation s of the
latents, per channel, are running averages over the training batches, so that the diffusion sees unit variance.

Source: Rombach et al. (2022), "High-resolution image synthesis with latent diffusion models".
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from fastgen import ops, random, registry
from fastgen.diffusion.ddpm import DDPM, DDPMConfig
from fastgen.diffusion.model import DiffusionLoss, Given, given_mask, given_samples
from fastgen.nn.model import Batch, Model, Phase, split_batch
from fastgen.random import Stream
from fastgen.registry import register

__all__ = ["LatentDiffusion", "LatentDiffusionConfig"]

_MOMENTUM = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig(DDPMConfig):
    """Options of :class:`LatentDiffusion`; those of the network are for latents."""

    autoencoder: str = "vae"
    """Name in the registry."""
    autoencoder_options: tuple[tuple[str, Any], ...] = ()
    """(name, value) of fields of its config."""
    train_autoencoder: bool = True
    """False for one that comes trained."""


class _LatentPrior(DDPM):
    """DDPM of latents: of any range, even where they have the shape of images."""

    @property
    def is_image(self) -> bool:
        return False


@register("latent_diffusion", config=LatentDiffusionConfig, paper="Rombach et al. (2022), arXiv:2112.10752", data="mnist5k")
class LatentDiffusion(Model):
    """DDPM in the latent space of an autoencoder.

    Shapes: x [N, *event_shape]; latents as the autoencoder has them.

    >>> model = LatentDiffusion(LatentDiffusionConfig(event_shape=(1, 8, 8), autoencoder_options=(("latent", 4),)))
    >>> model.sample(5, steps=4).shape
    torch.Size([5, 1, 8, 8])
    """

    config: LatentDiffusionConfig

    def __init__(self, config: LatentDiffusionConfig, autoencoder: Model | None = None) -> None:
        super().__init__(config)
        if autoencoder is None:
            options = dict(config.autoencoder_options)
            autoencoder = registry.create(config.autoencoder, event_shape=config.event_shape, **options)
        if not (callable(getattr(autoencoder, "encode", None)) and callable(getattr(autoencoder, "decode", None))):
            raise ValueError(f"autoencoder must have encode and decode; {config.autoencoder!r} lacks them")
        self.autoencoder: Any = autoencoder
        with torch.no_grad():
            shape = tuple(self._latents(torch.zeros(1, *config.event_shape, device=autoencoder.device)).shape[1:])
        inner = {f.name: getattr(config, f.name) for f in dataclasses.fields(DDPMConfig)}
        self.prior = _LatentPrior(DDPMConfig(**{**inner, "event_shape": shape}))
        channel = (shape[0], *[1] * (len(shape) - 1))
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.batches: Tensor
        self.register_buffer("latent_mean", torch.zeros(channel))
        self.register_buffer("latent_std", torch.ones(channel))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        if not config.train_autoencoder:
            self.autoencoder.requires_grad_(False)

    @classmethod
    def over(cls, autoencoder: Model, name: str, **config: Any) -> LatentDiffusion:
        """Diffusion over a trained autoencoder, such as ``fastgen.load`` gives; it is not trained further.

        Args:
            autoencoder: the model; becomes part of this one.
            name: its name in the registry.
            **config: fields of :class:`LatentDiffusionConfig`.
        """
        options = dataclasses.asdict(autoencoder.config)
        shape = options.pop("event_shape")
        full = LatentDiffusionConfig(
            event_shape=shape,
            autoencoder=name,
            autoencoder_options=tuple(options.items()),
            train_autoencoder=False,
            **config,
        )
        return cls(full, autoencoder)

    def _latents(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """A draw of q(z | x) at the key, where the autoencoder has a distribution; its mean without a key."""
        code = self.autoencoder.encode(x)
        if isinstance(code, Tensor):
            return code
        if key is None:
            return code[0]
        return ops.reparameterize(code[0], code[1], random.at(key, stream=Stream.LATENT)).z

    def encode(self, x: Tensor) -> Tensor:
        """Latents of unit variance, as the diffusion sees them; the mean of q(z | x)."""
        return (self._latents(x) - self.latent_mean) / self.latent_std

    def decode(self, z: Tensor) -> Tensor:
        """Samples [N, *event_shape] of latents of unit variance."""
        return self.autoencoder.decode(z * self.latent_std + self.latent_mean)

    def phases(self) -> list[Phase]:
        """An update of the autoencoder, unless it came trained, and one of the diffusion."""
        rate = self.config.learning_rate
        own = Phase("diffusion", list(self.prior.parameters()), self.loss, lambda p: torch.optim.Adam(p, lr=rate))
        if not self.config.train_autoencoder:
            return [own]
        theirs = [dataclasses.replace(p, name=f"autoencoder_{p.name}") for p in cast(Model, self.autoencoder).phases()]
        return [*theirs, own]

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> DiffusionLoss:
        """The loss of the diffusion on latents; nothing of it reaches the autoencoder."""
        x, y = split_batch(batch)
        key = random.fresh_key(x.device) if key is None else key
        with torch.no_grad():
            z = self._latents(x, key)
            if self.training:
                self._follow(z)
            z = (z - self.latent_mean) / self.latent_std
        return self.prior.loss(z if y is None else (z, y), key=key)

    def _follow(self, z: Tensor) -> None:
        """Move the running mean and deviation towards those of a batch."""
        self.batches.add_(1)
        weight = self.batches.reciprocal().clamp(min=_MOMENTUM)  # a plain average at first
        dims = [0, *range(2, z.dim())]
        mean = z.mean(dims, keepdim=True)[0]
        self.latent_mean.lerp_(mean, weight)
        spread = (z - self.latent_mean).square().mean(dims, keepdim=True)[0]
        variance = self.latent_std.square().lerp(spread, weight)
        self.latent_std.copy_(variance.clamp(min=1e-8).sqrt())

    def _given(self, given: Given, name: str, indices: Tensor) -> Tensor:
        shape = self.config.event_shape
        return given_samples(given, indices, shape, name, images=len(shape) == 3)

    @torch.no_grad()
    @functools.wraps(DDPM.sample)  # its options
    def sample(  # type: ignore[override]
        self,
        n: int,
        *,
        key: Tensor | None = None,
        init: Given | None = None,
        inpaint: Given | None = None,
        mask: Given | None = None,
        **options: Any,
    ) -> Tensor:
        shape = self.config.event_shape
        if init is not None:
            options["init"] = lambda indices: self.encode(self._given(init, "init", indices))
        if inpaint is None or mask is None:
            return self.decode(self.prior.sample(n, key=key, inpaint=inpaint, mask=mask, **options))
        size = self.prior.event_shape[1:]
        if len(size) != 2:
            raise ValueError(
                f"inpainting needs latents laid out as an image, those of {self.config.autoencoder!r} have shape "
                f"{self.prior.event_shape}"
            )
        key = random.fresh_key(self.device) if key is None else key

        def known(indices: Tensor) -> Tensor:
            return self._given(inpaint, "inpaint", indices)

        def paint(indices: Tensor) -> Tensor:
            return given_mask(mask, indices, shape)

        def of_latents(indices: Tensor) -> Tensor:
            """A latent is painted where any pixel under it is."""
            return functional.adaptive_max_pool2d(paint(indices).any(1, keepdim=True).float(), size)

        z = self.prior.sample(n, key=key, inpaint=lambda i: self.encode(known(i)), mask=of_latents, **options)
        indices = self.prior.sample_indices(n, key)
        return torch.where(paint(indices), self.decode(z), known(indices))

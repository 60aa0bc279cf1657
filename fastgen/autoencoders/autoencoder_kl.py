"""Autoencoder of latent diffusion: residual encoder and decoder, a small image of latents, a faint KL divergence.

    loss = -log p(x | z) + kl_weight * KL(q(z | x) || N(0, I)),    p(x | z) = N(decode(z), exp(log_scale)^2)

in nats per sample, summed over the event. Rombach et al. train theirs with a perceptual and an adversarial term besides;
those need networks of their own and are not part of this model, whose weights fit theirs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.autoencoders.vae import Posterior, VAELoss
from fastgen.nn.autoencoder import ImageDecoder, ImageEncoder
from fastgen.nn.conv import Conv2d
from fastgen.nn.model import Batch, Config, Model, split_batch
from fastgen.registry import register

__all__ = ["AutoencoderKL", "AutoencoderKLConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(Config):
    """Options of :class:`AutoencoderKL`."""

    latent_channels: int = 4
    """Channels of z."""
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level, finest first; each level but the last halves the image."""
    layers: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""
    attention_levels: tuple[int, ...] = ()
    """Levels with attention, 0 the finest."""
    middle_attention: bool = True
    """Attention at the coarsest level."""
    groups: int = 32
    """Of the group normalisation."""
    quantisation: bool = True
    """1x1 convolutions on both sides of z, as the first models have."""
    scaling_factor: float = 0.18215
    """A diffusion model over z sees ``(z - shift_factor) * scaling_factor``, about unit variance."""
    shift_factor: float = 0.0
    kl_weight: float = 1e-6
    """Weight of the KL divergence."""
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.widths) - 1)
        if len(self.event_shape) != 3 or any(size % factor for size in self.event_shape[1:]):
            raise ValueError(
                f"{len(self.widths)} widths need images (C, H, W) with H and W divisible by {factor}, got {self.event_shape}"
            )
        if self.latent_channels < 1:
            raise ValueError(f"latent_channels must be at least 1, got {self.latent_channels}")


@register("autoencoder_kl", config=AutoencoderKLConfig, paper="Rombach et al. (2022), arXiv:2112.10752", data="mnist5k",
          widths=(32, 64, 64), layers=1)  # fmt: skip
class AutoencoderKL(Model):
    """Convolutional autoencoder with a Gaussian posterior over a small image of latents, for latent diffusion.

    Shapes: x [N, C, H, W] in [0, 1]; z [N, latent_channels, H / 2^L, W / 2^L] for L + 1 widths. ``encode`` and ``decode`` take
    other image sizes too, as long as 2^L divides them.

    >>> model = AutoencoderKL(AutoencoderKLConfig(event_shape=(1, 8, 8), widths=(8, 16), groups=4))
    >>> model.encode(torch.rand(2, 1, 8, 8)).mean.shape
    torch.Size([2, 4, 4, 4])
    """

    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__(config)
        channels, z = config.event_shape[0], config.latent_channels
        options: dict[str, Any] = {
            "widths": config.widths,
            "layers": config.layers,
            "attention_levels": config.attention_levels,
            "middle_attention": config.middle_attention,
            "groups": config.groups,
        }
        self.encoder = ImageEncoder(channels, 2 * z, **options)
        self.decoder = ImageDecoder(z, channels, **options)
        self.after_encoder = Conv2d(2 * z, 2 * z, 1) if config.quantisation else None
        self.before_decoder = Conv2d(z, z, 1) if config.quantisation else None
        self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one z."""
        _, height, width = self.event_shape
        factor = 2 ** (len(self.config.widths) - 1)
        return self.config.latent_channels, height // factor, width // factor

    def encode(self, x: Tensor) -> Posterior:
        """The posterior q(z | x); its logarithmic variance is held in [-30, 20]."""
        h = self.encoder(2 * x - 1)
        mean, log_var = (h if self.after_encoder is None else self.after_encoder(h)).chunk(2, 1)
        return Posterior(mean, log_var.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """The image of z, about in [0, 1] but not clamped: it is the mean of a Gaussian."""
        return (self.decoder(z if self.before_decoder is None else self.before_decoder(z)) + 1) / 2

    def scale_latent(self, z: Tensor) -> Tensor:
        """z as a diffusion model sees it."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def unscale_latent(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`scale_latent`."""
        return z / self.config.scaling_factor + self.config.shift_factor

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> VAELoss:
        """-log p(x | z) + kl_weight * KL, by one draw of z at ``key``."""
        x, _ = split_batch(batch)
        mean, log_var = self.encode(x)
        z, kl = ops.reparameterize(mean.flatten(1), log_var.flatten(1), key)
        scaled = (x - self.decode(z.view_as(mean))) * torch.exp(-self.log_scale)
        nats = (0.5 * scaled.square() + self.log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        reconstruction, divergence = nats.mean(), kl.mean()
        return VAELoss(reconstruction + self.config.kl_weight * divergence, reconstruction, divergence)

    @torch.no_grad()
    def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
        """Images of z ~ N(0, I), in the scale of a diffusion model: [n, *event_shape]."""
        z = ops.normal((n, *self.latent_shape), key, device=self.device if key is None else None)
        return self.decode(self.unscale_latent(z)).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"latent_shape={self.latent_shape}"

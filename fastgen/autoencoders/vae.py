"""Variational autoencoder, and its beta-weighted form.

    ELBO(x) = E_q(z|x) log p(x | z) - KL(q(z | x) || N(0, I)),    q(z | x) = N(mean(x), diag exp(log_var(x)))

Training minimises ``reconstruction + beta * kl`` with reconstruction = -log p(x | z) at one reparameterised draw; at beta = 1
that is the negative ELBO. Both parts are nats per sample, summed over the event, averaged over the batch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops
from fastgen.nn.mlp import MLP
from fastgen.nn.model import Batch, Config, Model, split_batch
from fastgen.nn.pyramid import ConvDecoder, ConvEncoder
from fastgen.registry import register

__all__ = ["VAE", "Posterior", "VAEConfig", "VAELoss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(Config):
    """Options of :class:`VAE`."""

    latent: int = 16
    """Dimensions of z."""
    network: Literal["mlp", "conv"] = "mlp"
    """"mlp" takes any event, "conv" images (C, H, W) of any size."""
    hidden: tuple[int, ...] = (512, 256)
    """Widths of the MLP encoder; the decoder mirrors them."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the convolutional encoder, one per halving; the decoder mirrors them."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """p(x | z): Bernoulli for x in [0, 1], Gaussian with one learned scale for any real x."""
    beta: float = 1.0
    """Weight of the KL divergence."""
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.network not in ("mlp", "conv"):
            raise ValueError(f"network must be 'mlp' or 'conv', got {self.network!r}")
        if self.likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be 'bernoulli' or 'gaussian', got {self.likelihood!r}")
        if self.network == "conv" and len(self.event_shape) != 3:
            raise ValueError(f"network='conv' needs images (C, H, W), got event_shape {self.event_shape}")
        if self.latent < 1:
            raise ValueError(f"latent must be at least 1, got {self.latent}")
        if not self.beta >= 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")


class Posterior(NamedTuple):
    """q(z | x) = N(mean, diag exp(log_var)), both [N, latent]."""

    mean: Tensor
    log_var: Tensor


class VAELoss(NamedTuple):
    """Parts of the loss in nats per sample: summed over the event, averaged over the batch."""

    loss: Tensor
    """reconstruction + beta * kl; the negative ELBO at beta = 1."""
    reconstruction: Tensor
    """-log p(x | z) at one draw of z."""
    kl: Tensor
    """KL(q(z | x) || N(0, I))."""


@register("vae", config=VAEConfig, paper="Kingma & Welling (2014), arXiv:1312.6114", data="mnist5k")
@register("beta_vae", config=VAEConfig, paper="Higgins et al. (2017), ICLR, openreview Sy2fzU9gl", data="mnist5k", beta=4.0)
class VAE(Model):
    """Variational autoencoder with a Bernoulli or Gaussian decoder; ``beta`` > 1 trades reconstruction for disentanglement.

    Shapes: x [N, *event_shape], images in [0, 1]; z [N, latent]. With the Bernoulli likelihood a grey value counts as the
    probability of a white pixel: log p(x | z) is the mean over that binarisation.

    >>> model = VAE(VAEConfig(event_shape=(1, 28, 28), latent=2))
    >>> model.sample(5).shape
    torch.Size([5, 1, 28, 28])
    """

    config: VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.encoder: nn.Module
        self.decoder: nn.Module
        if config.network == "conv":
            self.encoder = ConvEncoder(config.event_shape, config.widths, self.encoded)
            self.decoder = ConvDecoder(config.latent, config.event_shape, config.widths)
        else:
            self.encoder = MLP(config.event_shape, config.hidden, self.encoded)
            self.decoder = MLP(config.latent, config.hidden[::-1], config.event_shape)
        self.log_scale = nn.Parameter(torch.zeros(())) if config.likelihood == "gaussian" else None

    @property
    def encoded(self) -> int:
        """Outputs of the encoder."""
        return 2 * self.config.latent

    def encode(self, x: Tensor) -> Posterior:
        """The posterior q(z | x)."""
        return Posterior(*self.encoder(x).chunk(2, 1))

    def draw(self, x: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A draw of z from q(z | x), [N, latent], and the divergence from the prior in nats, [N]."""
        return ops.reparameterize(*self.encode(x), key)

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], in the range of the data: [N, latent] -> [N, *event_shape]."""
        out = self.decoder(z)
        return out.sigmoid() if self.log_scale is None else out

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) per sample in nats, summed over the event: [N]."""
        out = self.decoder(z).float()
        if self.log_scale is None:
            return -F.binary_cross_entropy_with_logits(out, x, reduction="none").flatten(1).sum(1)
        scaled = (x - out) * torch.exp(-self.log_scale)
        return -(0.5 * scaled.square() + self.log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def loss(self, batch: Batch, *, key: Tensor | None = None) -> VAELoss:
        """Negative ELBO with weight ``beta`` on the divergence, by one draw at ``key``."""
        x, _ = split_batch(batch)
        self.check_samples(x)
        z, kl = self.draw(x, key)
        reconstruction, divergence = -self.log_likelihood(x, z).mean(), kl.mean()
        return VAELoss(reconstruction + self.config.beta * divergence, reconstruction, divergence)

    @torch.no_grad()
    def sample(self, n: int, *, key: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """E[x | z] for z ~ N(0, temperature^2 I): [n, *event_shape]."""
        z = ops.normal((n, self.config.latent), key, device=self.device if key is None else None)
        return self.decode(z * temperature)

    def extra_repr(self) -> str:
        c = self.config
        return f"latent={c.latent}, likelihood={c.likelihood!r}, beta={c.beta}"

"""Variational autoencoder whose posterior is a normalizing flow.

    z_0 ~ N(mean(x), diag exp(log_var(x))),    z_K = f_K( ... f_1(z_0)),    log q(z_K|x) = log q(z_0|x) - sum_k log|det df_k|

with planar or radial maps f_k whose parameters the encoder puts out for each x. The divergence of the ELBO is

    KL(q(z_0|x) || N(0, I)) + E[(|z_K|^2 - |z_0|^2) / 2 - sum_k log|det df_k|]

the first term in closed form, the second at the one draw. Where all maps are the identity it is the ELBO of the VAE.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from fastgen import ops
from fastgen.autoencoders.vae import VAE, Posterior, VAEConfig
from fastgen.nn.residual_maps import planar, planar_size, radial, radial_size
from fastgen.registry import register

__all__ = ["FlowVAE", "FlowVAEConfig"]

_MAPS = {"planar": (planar, planar_size), "radial": (radial, radial_size)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowVAEConfig(VAEConfig):
    """Options of :class:`FlowVAE`."""

    posterior_flow: Literal["planar", "radial"] = "planar"
    """Maps that the posterior goes through; see :mod:`fastgen.nn.residual_maps`."""
    flow_layers: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.posterior_flow not in _MAPS:
            raise ValueError(f"posterior_flow must be one of {', '.join(_MAPS)}, got {self.posterior_flow!r}")
        if self.flow_layers < 1:
            raise ValueError(f"flow_layers must be at least 1, got {self.flow_layers}")


@register("flow_vae", config=FlowVAEConfig, paper="Rezende & Mohamed (2015), arXiv:1505.05770", data="mnist5k")
class FlowVAE(VAE):
    """Variational autoencoder with planar or radial flows from the Gaussian to a richer posterior.

    ``encode`` gives the Gaussian of z_0, ``transform_posterior`` what the flow makes of its draws; ``decode`` takes z_K.

    >>> model = FlowVAE(FlowVAEConfig(event_shape=(1, 8, 8), latent=2, hidden=(16,)))
    >>> model.sample(5).shape
    torch.Size([5, 1, 8, 8])
    """

    config: FlowVAEConfig

    @property
    def encoded(self) -> int:
        """Outputs of the encoder: mean, log-variance and the parameters of all maps."""
        config = self.config
        return 2 * config.latent + config.flow_layers * _MAPS[config.posterior_flow][1](config.latent)

    def encode(self, x: Tensor) -> Posterior:
        """The Gaussian q(z_0 | x) that the flow starts from."""
        return Posterior(*self.encoder(x)[:, : 2 * self.config.latent].chunk(2, 1))

    def transform_posterior(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """z_K of z_0 = ``z`` [N, latent], and the log-determinant of the maps in nats [N]."""
        return self._transform(self.encoder(x), z)

    def draw(self, x: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z_K of each x, and the divergence at this draw in nats [N]."""
        encoded = self.encoder(x)
        mean, log_var = encoded[:, : 2 * self.config.latent].chunk(2, 1)
        start, kl = ops.reparameterize(mean, log_var, key)
        z, log_det = self._transform(encoded, start)
        return z, kl + (z.square() - start.square()).sum(1) / 2 - log_det

    def _transform(self, encoded: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        function, _ = _MAPS[self.config.posterior_flow]
        log_det = z.new_zeros(len(z))
        for parameters in encoded[:, 2 * self.config.latent :].chunk(self.config.flow_layers, 1):
            z, more = function(z, parameters)
            log_det = log_det + more
        return z, log_det

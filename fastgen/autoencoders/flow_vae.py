"""Variational autoencoder whose posterior is a normalizing flow.

    z_0 ~ N(mean(x), diag exp(log_var(x))),    z_K = f_K( ... f_1(z_0)),    log q(z_K|x) = log q(z_0|x) - sum_k log|det df_k|

with planar or radial maps f_k whose parameters the encoder puts out for each x, or inverse autoregressive ones ("iaf"), masked
networks that see the draw and a context which the encoder puts out. The divergence of the ELBO is

    KL(q(z_0|x) || N(0, I)) + E[(|z_K|^2 - |z_0|^2) / 2 - sum_k log|det df_k|]

the first term in closed form, the second at the one draw. Where all maps are the identity it is the ELBO of the VAE.

Sources: Rezende and Mohamed (2015), "Variational inference with normalizing flows"; Kingma, Salimans, Jozefowicz, Chen,
Sutskever and Welling (2016), "Improved variational inference with inverse autoregressive flow".
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

from torch import Tensor, nn

from fastgen import ops
from fastgen.autoencoders.vae import VAE, Posterior, VAEConfig
from fastgen.nn.masked import MADE
from fastgen.nn.residual_maps import planar, planar_size, radial, radial_size
from fastgen.registry import register

__all__ = ["AutoregressiveMaps", "FlowVAE", "FlowVAEConfig"]

_MAPS = {"planar": (planar, planar_size), "radial": (radial, radial_size)}
_KINDS = (*_MAPS, "iaf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowVAEConfig(VAEConfig):
    """Options of :class:`FlowVAE`."""

    posterior_flow: Literal["planar", "radial", "iaf"] = "planar"
    """Maps that the posterior goes through; see :mod:`fastgen.nn.residual_maps` and :class:`AutoregressiveMaps`."""
    flow_layers: int = 8
    flow_hidden: tuple[int, ...] = (64, 64)
    """With "iaf": widths of the masked networks' hidden layers."""
    flow_context: int = 64
    """With "iaf": features of the context that the encoder gives them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.posterior_flow not in _KINDS:
            raise ValueError(f"posterior_flow must be one of {', '.join(_KINDS)}, got {self.posterior_flow!r}")
        for name in ("flow_layers", "flow_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class AutoregressiveMaps(nn.Module):
    """Inverse autoregressive maps: z_d <- z_d sigmoid(s + 2) + m, where a masked network sets m and s from z_1 .. z_{d-1} and
    the context; the order turns around from each map to the next.

    The outputs start at zero, so that the maps start as a common scale.

    Shape: z [N, D], context [N, C] -> z [N, D] and the log-determinant in nats [N].
    """

    def __init__(self, features: int, hidden: tuple[int, ...], context: int, layers: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(MADE(features, hidden, (1, 1), context) for _ in range(layers))
        for network in self.networks:
            for parameter in cast("MADE", network).heads.parameters():
                nn.init.zeros_(parameter)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        z = z.to(context.dtype)  # draws may be narrower than the networks
        log_det = z.new_zeros(len(z))
        for network in self.networks:
            z, more = ops.affine_coupling(z, *network(z, context), bound="sigmoid")
            z, log_det = z.flip(1), log_det + more
        return z, log_det


@register("flow_vae", config=FlowVAEConfig, paper="Rezende & Mohamed (2015), arXiv:1505.05770", data="mnist5k")
class FlowVAE(VAE):
    """Variational autoencoder with planar, radial or inverse autoregressive flows from the Gaussian to a richer posterior.

    ``encode`` gives the Gaussian of z_0, ``transform_posterior`` what the flow makes of its draws; ``decode`` takes z_K.

    >>> model = FlowVAE(FlowVAEConfig(event_shape=(1, 8, 8), latent=2, hidden=(16,)))
    >>> model.sample(5).shape
    torch.Size([5, 1, 8, 8])
    """

    config: FlowVAEConfig

    def __init__(self, config: FlowVAEConfig) -> None:
        super().__init__(config)
        if config.posterior_flow == "iaf":
            self.maps = AutoregressiveMaps(config.latent, config.flow_hidden, config.flow_context, config.flow_layers)

    @property
    def encoded(self) -> int:
        """Outputs of the encoder: mean, log-variance, and the parameters of all maps or their context."""
        config = self.config
        if config.posterior_flow == "iaf":
            return 2 * config.latent + config.flow_context
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
        told = encoded[:, 2 * self.config.latent :]
        if self.config.posterior_flow == "iaf":
            return self.maps(z, told)
        function, _ = _MAPS[self.config.posterior_flow]
        log_det = z.new_zeros(len(z))
        for parameters in told.chunk(self.config.flow_layers, 1):
            z, more = function(z, parameters)
            log_det = log_det + more
        return z, log_det

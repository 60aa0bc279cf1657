"""Inverse autoregressive flow: the layers of :mod:`fastgen.flows.maf` turned around. Sampling is one pass; the density of given
data finds the noise feature by feature.
"""

from __future__ import annotations

from fastgen.flows.flow import Flow
from fastgen.flows.maf import MAFConfig, affine_layer
from fastgen.registry import register

__all__ = ["IAF"]


@register("iaf", config=MAFConfig, paper="Kingma et al. (2016), arXiv:1606.04934", data="moons")
class IAF(Flow):
    """Inverse autoregressive flow: each feature of a sample is an affine map of its noise given the noise before it.

    >>> flow = IAF(MAFConfig(event_shape=(6,), layers=2))
    >>> x, log_prob = flow().rsample_and_log_prob((4,))
    >>> x.shape, log_prob.shape
    (torch.Size([4, 6]), torch.Size([4]))
    """

    config: MAFConfig

    def __init__(self, config: MAFConfig) -> None:
        super().__init__(config, config.stack(affine_layer(config, i).inv for i in range(config.layers)))

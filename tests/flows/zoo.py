"""Tiny flows of every kind, for tests that all must pass."""

from __future__ import annotations

import torch

import fastgen
from fastgen.flows.residual import ResidualFlow

FLOWS = {
    "nice": ("nice", {"event_shape": (5,), "layers": 3, "hidden": (8,)}),
    "nice-context": ("nice", {"event_shape": (4,), "layers": 2, "hidden": (8,), "context": 3}),
    "realnvp": ("realnvp", {"event_shape": (5,), "layers": 3, "hidden": (8, 8)}),
    "realnvp-context": ("realnvp", {"event_shape": (4,), "layers": 2, "hidden": (8,), "context": 3, "bound": "sigmoid"}),
    "nsf": ("nsf", {"event_shape": (5,), "layers": 3, "bins": 4, "hidden": (8, 8)}),
    "nsf-nflows": ("nsf", {"event_shape": (2,), "layers": 2, "bins": 3, "hidden": (8,), "convention": "nflows"}),
    "nsf-context": ("nsf", {"event_shape": (4,), "layers": 2, "bins": 4, "hidden": (8,), "context": 3}),
    "nsf-image": ("nsf", {"event_shape": (1, 2, 2), "layers": 2, "bins": 4, "hidden": (8,)}),
    "nsf-autoregressive": ("nsf", {"event_shape": (4,), "layers": 2, "bins": 4, "hidden": (9, 8), "kind": "autoregressive"}),
    "nsf-autoregressive-context": (
        "nsf",
        {"event_shape": (3,), "layers": 2, "bins": 3, "hidden": (8,), "kind": "autoregressive", "context": 3},
    ),
    "maf": ("maf", {"event_shape": (5,), "layers": 3, "hidden": (8, 8)}),
    "maf-context": ("maf", {"event_shape": (3,), "layers": 2, "hidden": (8,), "context": 3, "inversion": "jacobi"}),
    "maf-image": ("maf", {"event_shape": (1, 2, 2), "layers": 2, "hidden": (8,)}),
    "iaf": ("iaf", {"event_shape": (4,), "layers": 2, "hidden": (8, 8)}),
    "iaf-context": ("iaf", {"event_shape": (3,), "layers": 2, "hidden": (8,), "context": 3}),
    "planar": ("planar", {"event_shape": (3,), "layers": 4}),
    "planar-context": ("planar", {"event_shape": (2,), "layers": 2, "context": 3}),
    "radial": ("radial", {"event_shape": (3,), "layers": 4}),
    "radial-context": ("radial", {"event_shape": (2,), "layers": 2, "context": 3}),
    "cnf": ("cnf", {"event_shape": (3,), "hidden": (5,), "tolerance": 1e-11}),
    "cnf-context": (
        "cnf",
        {"event_shape": (2,), "hidden": (4,), "tolerance": 1e-12, "context": 3, "adjoint": True},
    ),
    "residual": ("residual_flow", {"event_shape": (3,), "hidden": (8, 6), "layers": 2}),
    "residual-context": ("residual_flow", {"event_shape": (2,), "hidden": (6,), "layers": 2, "context": 3}),
    "realnvp-image": ("realnvp", {"event_shape": (1, 4, 8), "channels": 4, "blocks": 1}),
    "glow": ("glow", {"event_shape": (2, 4, 4), "steps": 2, "channels": 6}),
    "glow-context": (
        "glow",
        {"event_shape": (1, 4, 4), "steps": 1, "channels": 6, "context": 3, "levels": 1, "bound": "sigmoid"},
    ),
}
"""Case -> name and config of the model."""


def make(case, dtype=torch.float32, **options):
    """The model of a case with random parameters: none is zero, whatever the model starts from.

    Those of images are smaller, since the logistic function that ends on pixels cannot be inverted far out.
    """
    name, config = FLOWS[case]
    torch.manual_seed(1)
    model = fastgen.create(name, **{**config, **options})
    for parameter in model.parameters():
        parameter.data += (0.05 if model.config.is_image else 0.2) * torch.randn_like(parameter)
    if isinstance(model, ResidualFlow):
        model.settle().eval()
    return model.to(dtype)


def draw(model, n, seed=0):
    """Data the model could have seen, and a context where it takes one."""
    generator = torch.Generator().manual_seed(seed)
    shape, size = model.event_shape, model.config.context
    x = torch.rand(n, *shape, generator=generator) if len(shape) == 3 else torch.randn(n, *shape, generator=generator)
    context = torch.randn(n, size, generator=generator).to(model.dtype) if size else None
    return x.to(model.dtype), context

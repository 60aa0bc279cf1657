"""Small networks of each kind, with every parameter in use."""

from __future__ import annotations

import torch

from fastgen.nn.dit import DiT
from fastgen.nn.mlp import TimeMLP
from fastgen.nn.unet import UNet

SMALL_UNET = {"widths": (8, 12), "layers": 1, "attention_levels": (1,), "groups": 4, "head_channels": 4}
SMALL_DIT = {"width": 16, "depth": 2, "head_channels": 8}
FULL = {"num_classes": 3, "context_channels": 5}
KINDS = {
    "unet": (UNet, SMALL_UNET),
    "unet_scale_shift": (UNet, SMALL_UNET | {"modulation": "scale_shift", "downsample": "residual", "upsample": "residual"}),
    "unet_fourier": (UNet, SMALL_UNET | {"time": "fourier", "divide_by_time": True, "downsample_padding": 0}),
    "dit": (DiT, SMALL_DIT),
    "mlp": (TimeMLP, {"width": 16, "layers": 2}),
}


def randomise(net, seed=1):
    """Layers made zero hide what is before them: give every parameter a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


def build(kind, **options):
    cls, small = KINDS[kind]
    torch.manual_seed(0)
    return randomise(cls(2, **{**small, **options}))


def inputs(kind, n=3, size=(8, 6), seed=2, **given):
    """x and time; with labels and context where ``given`` has them true."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((n, 2) if kind == "mlp" else (n, 2, *size), generator=generator)
    named = {}
    if given.get("labels"):
        named["labels"] = torch.arange(n) % 4
    if given.get("context"):
        named["context"] = torch.randn(n, 4, 5, generator=generator)
    return x, 1 + 40 * torch.rand(n, generator=generator), named

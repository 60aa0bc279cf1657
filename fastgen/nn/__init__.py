"""Blocks and networks that models share."""

from fastgen.nn.dit import DiT
from fastgen.nn.inference import optimize, relative_error
from fastgen.nn.mlp import MLP, TimeMLP
from fastgen.nn.model import Batch, Config, Model, Phase, split_batch
from fastgen.nn.network import Network
from fastgen.nn.unet import UNet

__all__ = [
    "MLP",
    "Batch",
    "Config",
    "DiT",
    "Model",
    "Network",
    "Phase",
    "TimeMLP",
    "UNet",
    "optimize",
    "relative_error",
    "split_batch",
]

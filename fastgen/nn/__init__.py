"""Blocks and networks that models share."""

from fastgen.nn.model import Batch, Config, Model, Phase, split_batch

__all__ = ["Batch", "Config", "Model", "Phase", "split_batch"]

"""Weights of diffusers: a folder of ``save_pretrained`` (config.json and safetensors) becomes a network of ours.

The two have the same layers under other names. A table of rewrites turns one name into the other; query, key and value of
self-attention become one matrix. Both spellings of attention are read: ``to_q, to_k, to_v, to_out.0`` and the older
``query, key, value, proj_attn``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.autoencoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from fastgen.nn.unet import UNet

__all__ = [
    "autoencoder_kl_from_diffusers",
    "load",
    "load_autoencoder_kl",
    "load_unet",
    "our_names",
    "read",
    "unet_from_diffusers",
]

_UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
_KL_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}

# pattern -> what stands there in our names, applied in order; {place} of a block is the same in both
_RENAMES = [
    (r"^time_proj\.weight$", "conditioning.features.weight"),
    (r"^class_embedding\.weight$", "conditioning.label.table.weight"),
    (r"^time_embedding\b", "conditioning.time"),
    (r"^class_embedding\b", "conditioning.label"),
    (r"linear_1\.", "first."),
    (r"linear_2\.", "second."),
    (r"mid_block\.resnets\.(\d+)", r"middle.\1.residual"),
    (r"mid_block\.attentions\.(\d+)", r"middle.\1.attention"),
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.blocks.\3.residual"),
    (r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)", r"\1.\2.blocks.\3.attention"),
    (r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0", r"\1.\2.resample"),
    (r"\.resample\.Conv2d_0\.", ".resample.conv."),
    (r"\.time_emb_proj\.", ".project."),
    (r"\.conv_shortcut\.", ".carry."),
    (r"\.attention\.group_norm\.", ".attention.norm."),
    (r"\.attention\.(?:to_q|query)\.", ".attention.attention.query."),
    (r"\.attention\.(?:to_k|key)\.", ".attention.attention.key."),
    (r"\.attention\.(?:to_v|value)\.", ".attention.attention.value."),
    (r"\.attention\.(?:to_out\.0|proj_attn)\.", ".attention.attention.out."),
    (r"(^|\.)conv_norm_out\.", r"\1norm_out."),
    (r"^quant_conv\b", "after_encoder"),
    (r"^post_quant_conv\b", "before_decoder"),
]


def our_names(theirs: str, autoencoder: AutoencoderKL | None = None) -> str:
    """The name in our networks of a parameter or module of diffusers; query, key and value keep theirs until they are joined.

    Args:
        theirs: the name there.
        autoencoder: ours, where the name is of an autoencoder: its decoder's levels are sequences.

    >>> our_names("down_blocks.1.attentions.0.to_out.0.weight")
    'down.1.blocks.0.attention.attention.out.weight'
    """
    for pattern, replacement in _RENAMES:
        theirs = re.sub(pattern, replacement, theirs)
    if autoencoder is not None:
        theirs = re.sub(r"^(decoder\.up\.\d+)\.blocks", r"\1", theirs)
        theirs = re.sub(r"^(decoder\.up\.\d+)\.resample", rf"\1.{autoencoder.config.layers + 1}", theirs)
    return theirs


def _translate(weights: Mapping[str, Tensor], autoencoder: AutoencoderKL | None = None) -> dict[str, Tensor]:
    ours = {our_names(name, autoencoder): w for name, w in weights.items()}
    for name in [n for n in ours if n.endswith((".query.weight", ".query.bias"))]:
        stem, _, kind = name.rpartition(".query.")
        parts = [ours.pop(f"{stem}.{part}.{kind}") for part in ("query", "key", "value")]
        ours[f"{stem}.to_rest.{kind}"] = torch.cat(parts).flatten(1) if kind == "weight" else torch.cat(parts)
    for name in [n for n in ours if n.endswith(".attention.out.weight")]:
        ours[name] = ours[name].flatten(1)  # the oldest files hold 1x1 convolutions
    return ours


def _options(config: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    unknown = [key for key in config if key not in defaults and not key.startswith("_")]
    if unknown:
        raise ValueError(f"{name} has options that fastgen does not know: {', '.join(unknown)}")
    options = {**defaults, **{k: v for k, v in config.items() if k in defaults}}
    if options["act_fn"] not in ("silu", "swish"):
        raise ValueError(f"{name} with act_fn={options['act_fn']!r} has no counterpart here: only 'silu' has")
    return options


def _kind(block: str, table: Mapping[str, Any]) -> Any:
    block = block.removeprefix("UNetRes")
    if block not in table:
        raise ValueError(f"diffusers' {block} has no counterpart here; known: {', '.join(table)}")
    return table[block]


def unet_from_diffusers(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> UNet:
    """Our U-Net with the options and weights of a ``UNet2DModel``, in eval mode.

    ``net(x, t)`` gives ``UNet2DModel(x, t).sample``. A network with ``num_class_embeds`` = K takes labels 0..K-1 as it did; the
    null label K, and ``labels=None``, add nothing.

    Args:
        config: its config.json.
        weights: its state dict, in either spelling of attention.

    Raises:
        ValueError: a block type or activation that our U-Net does not have, or weights that do not fit the config.
    """
    c = _options(config, _UNET_DEFAULTS, "UNet2DModel")
    down, up = c["down_block_types"], c["up_block_types"]
    last = len(c["block_out_channels"]) - 1
    kinds_down = {"DownBlock2D": (False, "conv"), "AttnDownBlock2D": (True, c["downsample_type"] or "conv"),
                  "ResnetDownsampleBlock2D": (False, "resnet")}  # fmt: skip
    kinds_up = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, c["upsample_type"] or "conv"),
                "ResnetUpsampleBlock2D": (False, "resnet")}  # fmt: skip
    downs, ups = [_kind(b, kinds_down) for b in down], [_kind(b, kinds_up) for b in up]
    resample = {"conv": "conv", "resnet": "residual"}
    modulation = {"default": "add", "scale_shift": "scale_shift"}
    if c["mid_block_type"] not in (None, "UNetMidBlock2D"):
        raise ValueError(f"diffusers' {c['mid_block_type']} has no counterpart here; known: UNetMidBlock2D")
    if c["resnet_time_scale_shift"] not in modulation:
        raise ValueError(f"resnet_time_scale_shift={c['resnet_time_scale_shift']!r} has no counterpart here")
    middle_groups = c["attn_norm_num_groups"]
    if middle_groups is None:
        middle_groups = c["norm_num_groups"] if c["resnet_time_scale_shift"] == "default" else 0
    labels = {None: "index", "timestep": "number", "identity": "vector"}
    net = UNet(
        c["in_channels"],
        c["out_channels"],
        widths=c["block_out_channels"],
        layers=c["layers_per_block"],
        attention_levels=[i for i, (attends, _) in enumerate(downs) if attends],
        attention_levels_up=[last - i for i, (attends, _) in enumerate(ups) if attends],
        middle="none" if c["mid_block_type"] is None else "attention" if c["add_attention"] else "residual",
        head_channels=c["attention_head_dim"],
        num_classes=c["num_class_embeds"] if c["class_embed_type"] is None else None,
        groups=c["norm_num_groups"],
        eps=c["norm_eps"],
        middle_groups=middle_groups,
        modulation=modulation[c["resnet_time_scale_shift"]],  # type: ignore[arg-type]
        dropout=c["dropout"],
        downsample=[resample[kind] for _, kind in downs[:-1]],  # type: ignore[misc]
        upsample=[resample[kind] for _, kind in ups[:-1]],  # type: ignore[misc]
        downsample_padding=c["downsample_padding"],
        middle_divisor=c["mid_block_scale_factor"],
        time={"positional": "sinusoidal"}.get(c["time_embedding_type"], c["time_embedding_type"]),
        flip_sin_to_cos=c["flip_sin_to_cos"] and c["time_embedding_type"] == "positional",
        freq_shift=c["freq_shift"],
        time_steps=c["num_train_timesteps"],
        embedding=c["time_embedding_dim"],
        labels=labels[c["class_embed_type"]],  # type: ignore[arg-type]
        center_input=c["center_input_sample"],
        divide_by_time=c["time_embedding_type"] == "fourier",
    )
    ours = _translate(weights)
    features = ours.pop("conditioning.features.weight", None)
    if features is not None:
        ours["conditioning.features." + ("frequency" if features.ndim == 1 else "table.weight")] = features
    if (table := ours.get("conditioning.label.table.weight")) is not None:
        ours["conditioning.label.table.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    return _fill(net, ours)


def autoencoder_kl_from_diffusers(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> AutoencoderKL:
    """Our autoencoder with the options and weights of diffusers' ``AutoencoderKL``, in eval mode.

    Images are in [0, 1] here and in [-1, 1] there: ``encode((x + 1) / 2)`` gives the parameters of ``encode(x).latent_dist``,
    ``2 * decode(z) - 1`` gives ``decode(z).sample``. ``scaling_factor`` and ``shift_factor`` stay in the config;
    ``latents_mean`` and ``latents_std``, which the network does not use, are not kept.

    Args:
        config: its config.json.
        weights: its state dict, in either spelling of attention.

    Raises:
        ValueError: a block type or activation that ours does not have, or weights that do not fit the config.
    """
    c = _options(config, _KL_DEFAULTS, "AutoencoderKL")
    last = len(c["block_out_channels"]) - 1
    down = [_kind(b, {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}) for b in c["down_block_types"]]
    up = [_kind(b, {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}) for b in c["up_block_types"]]
    size = c["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    unlike = [
        name
        for name, differs in {
            "in_channels and out_channels": c["in_channels"] != c["out_channels"],
            "use_quant_conv and use_post_quant_conv": c["use_quant_conv"] != c["use_post_quant_conv"],
            "attention of encoder and decoder": down != up[::-1],
        }.items()
        if differs
    ]
    if unlike:
        raise ValueError(f"AutoencoderKL with different {' and different '.join(unlike)} has no counterpart here")
    model = AutoencoderKL(
        AutoencoderKLConfig(
            event_shape=(c["in_channels"], height // 2**last * 2**last, width // 2**last * 2**last),
            latent_channels=c["latent_channels"],
            widths=tuple(c["block_out_channels"]),
            layers=c["layers_per_block"],
            attention_levels=tuple(i for i, attends in enumerate(down) if attends),
            middle_attention=c["mid_block_add_attention"],
            groups=c["norm_num_groups"],
            quantisation=c["use_quant_conv"],
            scaling_factor=c["scaling_factor"],
            shift_factor=c["shift_factor"] or 0.0,
        )
    )
    ours = _translate(weights, model)
    ours["log_scale"] = torch.zeros(())
    return _fill(model, ours)


def _fill(net: Any, weights: Mapping[str, Tensor]) -> Any:
    own = net.state_dict()
    wrong = [f"{n} is missing" for n in own if n not in weights]
    wrong += [f"{n} is left over" for n in weights if n not in own]
    wrong += [
        f"{n} is {list(w.shape)}, not {list(own[n].shape)}" for n, w in weights.items() if n in own and w.shape != own[n].shape
    ]
    if wrong:
        raise ValueError(
            f"the weights do not fit the config: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else "")
        )
    net.load_state_dict(weights)
    return net.eval()


_FOLDERS = {"UNet2DModel": ("unet",), "AutoencoderKL": ("vae", "vqvae")}
_STEM = "diffusion_pytorch_model"


def read(path: str | Path, kind: str | None = None) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Class name, config.json and float32 weights of a folder of ``save_pretrained``, or of the part of a pipeline's folder
    that holds a ``kind`` (None: the first that fastgen loads).

    Raises:
        FileNotFoundError: no config.json or no safetensors there.
        ValueError: another class than ``kind``, or than those that fastgen loads.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    if not (folder / "config.json").is_file():
        wanted = [part for name, parts in _FOLDERS.items() if kind in (None, name) for part in parts]
        parts = [folder / part for part in wanted if (folder / part / "config.json").is_file()]
        if not parts:
            raise FileNotFoundError(f"{folder} holds no {kind or ' and no '.join(_FOLDERS)}: there is no config.json")
        folder = parts[0]
    config = json.loads((folder / "config.json").read_text())
    name = config.get("_class_name", kind)
    if name not in _FOLDERS or kind not in (None, name):
        held = f"a {name}" if name else "no model of diffusers"
        raise ValueError(f"{folder} holds {held}, expected {kind or ' or '.join(_FOLDERS)}")
    index = folder / f"{_STEM}.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = [p.name for p in sorted(folder.glob(f"{_STEM}*.safetensors"), key=lambda p: len(p.name))[:1]]
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {_STEM}.safetensors; a pickled .bin is not read: save it again with safe_serialization=True"
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= {n: w.float() for n, w in load_file(folder / file).items()}
    return name, config, weights


def load_unet(path: str | Path) -> UNet:
    """The ``UNet2DModel`` of a folder of ``save_pretrained``, or of a whole pipeline's, as our U-Net: float32, eval mode.

    Raises: as :func:`read` and :func:`unet_from_diffusers` do.
    """
    _, config, weights = read(path, "UNet2DModel")
    return unet_from_diffusers(config, weights)


def load_autoencoder_kl(path: str | Path) -> AutoencoderKL:
    """The ``AutoencoderKL`` of a folder of ``save_pretrained``, or of a whole pipeline's, as ours: float32, eval mode.

    Raises: as :func:`read` and :func:`autoencoder_kl_from_diffusers` do.
    """
    _, config, weights = read(path, "AutoencoderKL")
    return autoencoder_kl_from_diffusers(config, weights)


def load(path: str | Path) -> UNet | AutoencoderKL:
    """What a folder of ``save_pretrained`` holds, by the class that its config.json names."""
    name, config, weights = read(path)
    return unet_from_diffusers(config, weights) if name == "UNet2DModel" else autoencoder_kl_from_diffusers(config, weights)

"""Networks of diffusers, built small at random, against ours with their weights."""

from __future__ import annotations

import json

import pytest
import torch

from fastgen.interop import diffusers as interop
from fastgen.interop.diffusers.weights import autoencoder_kl_from_diffusers, our_names, unet_from_diffusers

diffusers = pytest.importorskip("diffusers")

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
ONE_ATTENTION = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
UNETS = {
    "plain": ONE_ATTENTION,
    "ddpm_cifar10": {
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    "one_sided_attention": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "scale_shift": ONE_ATTENTION | {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_middle_groups": ONE_ATTENTION | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "no_middle_attention": ONE_ATTENTION | {"add_attention": False},
    "no_middle": ONE_ATTENTION | {"mid_block_type": None},
    "middle_scale_and_centre": ONE_ATTENTION | {"mid_block_scale_factor": 1.7, "center_input_sample": True},
    "resampling_blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    },
    "resampling_of_attention_levels": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "time_embedding_dim": 24,
    },
    "classes": ONE_ATTENTION | {"num_class_embeds": 5},
    "class_numbers": ONE_ATTENTION | {"class_embed_type": "timestep"},
    "class_vectors": ONE_ATTENTION | {"class_embed_type": "identity"},
    "fourier": ONE_ATTENTION | {"time_embedding_type": "fourier"},
    "learned": ONE_ATTENTION | {"time_embedding_type": "learned", "num_train_timesteps": 50},
    "odd_channels": {"in_channels": 1, "out_channels": 2, "block_out_channels": (12, 20), **ONE_ATTENTION},
}
OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
AUTOENCODERS = {
    "plain": {},
    "one_level": {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
    "no_quantisation": {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1, "scaling_factor": 0.36},
    "no_middle_attention": {"mid_block_add_attention": False, "layers_per_block": 2},
    "attention": {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
}


def randomised(net):
    """diffusers leaves some biases zero: every parameter must count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def unet(**options):
    torch.manual_seed(0)
    return randomised(diffusers.UNet2DModel(**{**SMALL, **ONE_ATTENTION, **options}))


def autoencoder(**options):
    torch.manual_seed(0)
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16}
    return randomised(diffusers.AutoencoderKL(**{**two, **small, **options}))


def old_style(weights):
    for new, old in OLD.items():
        weights = {name.replace(new, old): w for name, w in weights.items()}
    return weights


def same(ours, theirs):
    """Equal to 1e-5 of the largest value."""
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
@torch.no_grad()
def test_unet_gives_what_diffusers_gives(options):
    theirs = unet(**options)
    ours = unet_from_diffusers(theirs.config, theirs.state_dict())
    torch.manual_seed(2)
    x = torch.randn(3, theirs.config.in_channels, 16, 8)
    kind = options.get("class_embed_type")
    labels = None
    if "num_class_embeds" in options:
        labels = torch.tensor([0, 4, 2])
    elif kind is not None:
        labels = torch.tensor([0.0, 4.0, 2.0]) if kind == "timestep" else torch.randn(3, 32)
    for t in (torch.tensor([1, 7, 31]), torch.tensor([13])):
        same(
            ours(x, t.float(), labels=labels),
            theirs(x, t, labels).sample if kind or labels is not None else theirs(x, t).sample,
        )


@torch.no_grad()
def test_null_label_adds_nothing():
    theirs = unet(num_class_embeds=5)
    ours = unet_from_diffusers(theirs.config, theirs.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 9.0])
    without = diffusers.UNet2DModel(**{**SMALL, **ONE_ATTENTION}).eval()
    without.load_state_dict({n: w for n, w in theirs.state_dict().items() if "class_embedding" not in n})
    same(ours(x, t), without(x, t).sample)
    same(ours(x, t, labels=torch.tensor([5, 5])), without(x, t).sample)


@pytest.mark.parametrize("options", AUTOENCODERS.values(), ids=AUTOENCODERS)
@torch.no_grad()
def test_autoencoder_gives_what_diffusers_gives(options):
    theirs = autoencoder(**options)
    ours = autoencoder_kl_from_diffusers(theirs.config, theirs.state_dict())
    torch.manual_seed(2)
    x, z = 2 * torch.rand(2, 3, 16, 24) - 1, torch.randn(2, 4, 4, 6)
    posterior, expected = ours.encode((x + 1) / 2), theirs.encode(x).latent_dist
    same(posterior.mean, expected.mean)
    same(posterior.log_var, expected.logvar)
    same(2 * ours.decode(z) - 1, theirs.decode(z).sample)
    assert ours.config.scaling_factor == theirs.config.scaling_factor
    assert ours.config.shift_factor == (theirs.config.shift_factor or 0.0)


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize("make", [unet, autoencoder])
@torch.no_grad()
def test_both_attention_spellings_from_disk(make, style, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = make()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    if style == "old":
        weights = old_style(load_file(file))
        assert any(".proj_attn." in name for name in weights)
        save_file(weights, file)
    ours = interop.load(tmp_path)
    fresh = unet_from_diffusers if make is unet else autoencoder_kl_from_diffusers
    expected = fresh(theirs.config, theirs.state_dict()).state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(w, expected[name]) for name, w in ours.state_dict().items())
    assert not ours.training


def test_pipeline_folder_and_shards(tmp_path):
    theirs = unet()
    diffusers.DDPMPipeline(unet=theirs, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, many = interop.load(tmp_path / "pipeline").state_dict(), interop.load_unet(tmp_path / "shards").state_dict()
    assert all(torch.equal(w, many[name]) for name, w in one.items())


def test_every_name_has_one_counterpart():
    names = [*unet(num_class_embeds=3).state_dict(), *autoencoder().state_dict()]
    assert len({our_names(name) for name in names}) == len(set(names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D has no counterpart"),
        ({"act_fn": "mish"}, "act_fn='mish' has no counterpart"),
        ({"novelty": 1}, "does not know: novelty"),
        ({"block_out_channels": [8, 24]}, "do not fit the config"),
        ({"_class_name": "VQModel"}, "holds a VQModel"),
    ],
)
def test_what_cannot_be_loaded_says_so(change, message, tmp_path):
    unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        interop.load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    unet().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match="safe_serialization"):
        interop.load_unet(tmp_path)
    with pytest.raises(FileNotFoundError, match="no config"):
        interop.load_unet(tmp_path / "nowhere")

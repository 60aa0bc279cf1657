"""``fastgen parity diffusers``: the report on networks saved by diffusers, and its exit codes."""

from __future__ import annotations

import re

import pytest
import torch

from fastgen.cli import main
from fastgen.interop import diffusers as interop
from fastgen.interop.diffusers.parity import layer_differences, load_pair, timings
from tests.interop.test_diffusers_weights import autoencoder, unet

diffusers = pytest.importorskip("diffusers")

SHORT = ["--batch-size", "2", "--size", "8", "--rounds", "1"]


@pytest.mark.parametrize("make", [unet, autoencoder])
def test_report(make, tmp_path, capsys):
    make().save_pretrained(tmp_path)
    assert main(["parity", "diffusers", str(tmp_path), *SHORT]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^(\S+)\s+\d+(?: x \d+)+\s+\S+e[-+]\d+\s+\S+e[-+]\d+$", out, re.MULTILINE)
    first = "conv_in" if make is unet else "encoder.conv_in"
    assert rows[-1] == "output"
    assert first in rows
    assert len(rows) > 10
    assert "equal to 1e-05" in out
    assert re.search(r"^fastgen, optimised, float32\s+\d", out, re.MULTILINE)


SCHEDULERS = {
    "DDPMScheduler": {},
    "DDIMScheduler": {"clip_sample": False},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
}


def pipeline(path, name="DDPMScheduler"):
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    diffusers.DDPMPipeline(unet=unet(), scheduler=scheduler).save_pretrained(path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pipeline_folder(name, tmp_path, capsys, monkeypatch):
    """The comparison itself: diffusers' own scheduler is on both sides, the networks are not."""
    pipeline(tmp_path, name)
    monkeypatch.setattr(interop, name, getattr(diffusers, name), raising=False)
    assert main(["parity", "diffusers", str(tmp_path), *SHORT[:-1], "0", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^step \d from t = ", out, re.MULTILINE)) == 3
    assert "equal to 0.0001" in out
    assert "optimised" not in out


def test_another_trajectory_is_found(tmp_path, capsys, monkeypatch):
    pipeline(tmp_path)

    class Other(diffusers.DDPMScheduler):
        def __init__(self, **config):
            super().__init__(beta_end=0.03)

        @classmethod
        def from_config(cls, config):
            return cls()

    monkeypatch.setattr(interop, "DDPMScheduler", Other, raising=False)
    assert main(["parity", "diffusers", str(tmp_path), *SHORT[:-1], "0", "--steps", "3"]) == 1
    assert "NOT equal to 0.0001" in capsys.readouterr().out


def test_scheduler_without_a_counterpart_is_named(tmp_path, capsys):
    pipeline(tmp_path)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("DDPMScheduler", "RePaintScheduler"))
    assert main(["parity", "diffusers", str(tmp_path), *SHORT[:-1], "0"]) == 0
    assert "RePaintScheduler has no counterpart" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [{"num_class_embeds": 4}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}]
)
def test_labels_are_drawn_where_the_network_takes_them(options, tmp_path):
    unet(**options).save_pretrained(tmp_path)
    assert max(d.relative for d in layer_differences(load_pair(tmp_path, batch_size=2, size=8))) < 1e-5


def test_a_wrong_layer_is_found(tmp_path, capsys, monkeypatch):
    unet().save_pretrained(tmp_path)
    pair = load_pair(tmp_path, batch_size=2, size=8)
    with torch.no_grad():
        pair.ours.middle[0].residual.conv2.bias += 0.01
    differences = layer_differences(pair)
    wrong = [d.name for d in differences if d.relative > 1e-5]
    assert wrong[0] == "mid_block.resnets.0"
    assert wrong[-1] == "output"
    monkeypatch.setattr("fastgen.interop.diffusers.parity.load_pair", lambda *args, **named: pair)
    assert main(["parity", "diffusers", str(tmp_path), "--rounds", "0"]) == 1
    assert "NOT equal" in capsys.readouterr().out


def test_timings_compare_with_theirs(tmp_path):
    unet().save_pretrained(tmp_path)
    rows = timings(load_pair(tmp_path, batch_size=1, size=8), rounds=2)
    assert rows[0].name == "diffusers"
    assert rows[0].ratio == 1
    assert rows[0].relative_error == 0
    assert all(r.relative_error < 1e-5 for r in rows if "float32" in r.name or r.name == "fastgen")


def test_no_network_is_one_line(tmp_path, capsys):
    assert main(["parity", "diffusers", str(tmp_path)]) == 2
    assert "there is no config.json" in capsys.readouterr().err

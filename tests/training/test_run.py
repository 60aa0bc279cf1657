from __future__ import annotations

import json
import shutil

import pytest
import torch

from fastgen.nn.model import Model
from fastgen.training import checkpoint, fit, load
from fastgen.training.log import read_metrics, truncate_metrics
from tests.training.tiny_models import TinyConfig, labelled_data, make_tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    model = make_tiny()
    fit(model, labelled_data(), steps=3, out=folder, device="cpu", sample_every=0)
    return folder, model


@pytest.fixture
def run(trained, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_load_gives_the_model_back(trained):
    folder, model = trained
    again = load(folder, device="cpu")
    assert type(again) is type(model)
    assert again.config == model.config
    assert not again.training
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run directory"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load(tmp_path)


def test_missing_weights(run):
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load(run)


def test_truncated_weights(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
        load(run)


def test_weights_of_another_model(run):
    checkpoint.write(run / "model.safetensors", {"w": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="does not fit the model"):
        load(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "tinny"}, r"config\.json: unknown model 'tinny'; did you mean tiny"),
        ({"config": {"event_shape": [5], "depth": 3}}, "tiny has no option 'depth'"),
        ({"config": {}}, "tiny needs event_shape"),
        ({"model": None}, "has no registered name"),
    ],
)
def test_config_that_makes_no_model(run, change, message):
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 1}'])
def test_corrupt_config(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is corrupt|was not written by fastgen)"):
        load(run)


def test_a_model_without_a_name_trains_and_resumes(tmp_path):
    class Nameless(Model):
        def __init__(self):
            super().__init__(TinyConfig(event_shape=(5,)))
            self.inner = make_tiny(num_classes=None)
            self.loss = self.inner.loss

    x, _ = labelled_data()
    fit(Nameless(), x, steps=2, out=tmp_path, device="cpu")
    assert fit(Nameless(), x, steps=4, out=tmp_path, device="cpu", resume=True).steps == 4
    with pytest.raises(ValueError, match="Nameless, which has no registered name"):
        load(tmp_path)


def test_metrics_are_cut_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}}}\n' for s in (5, 10, 15)) + '{"step": 2')
    assert [line["step"] for line in read_metrics(path)] == [5, 10, 15]
    truncate_metrics(path, 10)
    assert path.read_text() == '{"step": 5}\n{"step": 10}\n'
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1 is corrupt"):
        truncate_metrics(path, 10)

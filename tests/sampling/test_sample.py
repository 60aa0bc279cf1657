from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastgen
from fastgen import ops, registry
from fastgen.nn.model import Config, Model
from fastgen.sampling import images, sample
from fastgen.training import checkpoint, fit


class Noise(Model):
    """Samples are the noise itself: a pure function of the key."""

    def __init__(self, *event_shape: int) -> None:
        super().__init__(Config(event_shape=event_shape))
        self.dummy = nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []
        self.modes: list[bool] = []

    def sample(self, n: int, *, key: Tensor | None = None, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        self.seen.append(n)
        self.modes.append(self.training or torch.is_grad_enabled())
        return scale * ops.uniform((n, *self.event_shape), key=key) + shift


class Conv(Model):
    """A real network whose last bits may depend on the batch around a sample."""

    def __init__(self) -> None:
        super().__init__(Config(event_shape=(3, 12, 12)))
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(32, 24 * 9), nn.Unflatten(1, (24, 3, 3)), nn.SiLU(),
            nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.SiLU(),
            nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
        return self.net(ops.normal((n, 32), key=key))


@pytest.fixture
def whole():
    return sample(Noise(2, 3), 37, seed=4)


@pytest.mark.parametrize("batch_size", [1, 2, 16, 36, 37, 100])
def test_noise_is_the_same_for_any_batch_size(whole, batch_size):
    assert torch.equal(sample(Noise(2, 3), 37, seed=4, batch_size=batch_size), whole)


@pytest.mark.parametrize("micro_batch", [1, 5, 37, 64])
def test_noise_is_the_same_for_any_micro_batch(whole, micro_batch):
    model = Noise(2, 3)
    assert torch.equal(sample(model, 37, seed=4, micro_batch=micro_batch), whole)
    assert set(model.seen) == {micro_batch}


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("ids", [range(5, 9), range(0, 37, 3), range(36, -1, -1), [7, 7, 0, 36, 1], np.arange(3)])
def test_ids_redraw_any_part(whole, ids, micro_batch):
    found = sample(Noise(2, 3), ids=ids, seed=4, batch_size=3, micro_batch=micro_batch)
    assert torch.equal(found, whole[[int(i) for i in ids]])


def test_shards_make_up_the_run(whole):
    for world in (2, 3):
        merged = torch.empty_like(whole)
        for rank in range(world):
            ids = range(37)[rank::world]
            merged[list(ids)] = sample(Noise(2, 3), ids=ids, seed=4, batch_size=5)
        assert torch.equal(merged, whole)


def test_seeds_differ_and_large_ids_work(whole):
    assert not torch.equal(sample(Noise(2, 3), 37, seed=5), whole)
    far = (1 << 56) - 2
    a = sample(Noise(2, 3), ids=range(far, far + 2))
    assert torch.equal(sample(Noise(2, 3), ids=[far + 1]), a[1:])


def test_micro_batch_gives_the_same_bits_in_every_run():
    model = Conv()
    whole = sample(model, 23, micro_batch=4)
    assert torch.equal(sample(model, 9, micro_batch=4, batch_size=7), whole[:9])
    for ids in (range(6, 17), range(1, 23, 5), [22, 3, 3, 8], [13]):
        assert torch.equal(sample(model, ids=ids, micro_batch=4), whole[list(ids)])
    torch.testing.assert_close(sample(model, 23, batch_size=23), whole)


def test_mode_and_gradients():
    model = Noise(2).train()
    assert not sample(model, 3).requires_grad
    assert model.modes == [False]
    assert model.training


def test_options_reach_the_model(whole):
    assert torch.equal(sample(Noise(2, 3), 37, seed=4, scale=2.0), 2 * whole)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"Noise\.sample has no option 'scal'; did you mean 'scale'\?"):
        sample(Noise(2), 1, scal=1)
    with pytest.raises(ValueError, match="has no option 'steps'; it has: scale, shift"):
        sample(Noise(2), 1, steps=1)
    with pytest.raises(ValueError, match="it has: none"):
        sample(Conv(), 1, steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give n, the number of samples, or ids"),
        ({"n": 3, "ids": range(3)}, "one of the two"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"ids": []}, "ids is empty"),
        ({"ids": [3, -1]}, "ids must be in .* got -1"),
        ({"n": 1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"n": 1, "micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"n": 1, "out": "x.jpg"}, r"x\.jpg: expected a name in \.png, \.npz, \.safetensors, or a folder"),
        ({"n": 1, "out": "x.npz", "format": "safetensors"}, r"format 'safetensors' does not go with the file x\.npz"),
        ({"n": 1, "out": "x", "format": "jpg"}, "format must be png, npz or safetensors, got 'jpg'"),
        ({"n": 1, "out": "x", "format": "png"}, r"a folder of PNG holds images, the samples have shape \(3,\)"),
        ({"n": 1, "out": "x", "shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"n": 1, "out": "x.npz", "shard_size": 3}, r"shard_size is for folders, x\.npz is a file"),
        ({"n": 1, "out": "x.npz", "resume": True}, r"resume is for folders, x\.npz is a file"),
        ({"n": 1, "format": "npz"}, "format, shard_size and resume need out, a folder"),
        ({"n": 1, "out": "x.png"}, r"PNG holds images or 2-D points, the samples have shape \(3,\)"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Noise(3)
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)
    assert model.seen == []  # found before anything was drawn


def test_a_model_that_gives_the_wrong_shape():
    class Wrong(Noise):
        def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
            return torch.zeros(n, 7)

    with pytest.raises(ValueError, match=r"Wrong\.sample gave shape \(2, 7\), expected \(2, 3\)"):
        sample(Wrong(3), 2)


def test_array_files(tmp_path, whole):
    for name in ("a.npz", "deep/b.safetensors"):
        path = sample(Noise(2, 3), 37, seed=4, out=tmp_path / name)
        assert path == tmp_path / name
        found = torch.from_numpy(np.load(path)["x"]) if path.suffix == ".npz" else load_file(path)["x"]
        assert torch.equal(found, whole)
    assert not list(tmp_path.rglob(".*"))


def read_png(path):
    from PIL import Image

    return np.asarray(Image.open(path))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_files(tmp_path, channels):
    model = Noise(channels, 5, 7)
    x = images.to_uint8(sample(model, 5)).permute(0, 2, 3, 1).numpy().squeeze()
    folder = sample(model, ids=range(2, 5), batch_size=2, out=tmp_path / "folder")
    assert sorted(p.name for p in folder.iterdir()) == ["00000002.png", "00000003.png", "00000004.png"]
    for i in range(2, 5):
        assert np.array_equal(read_png(folder / f"{i:08d}.png"), x[i])
    picture = read_png(sample(model, 5, out=tmp_path / "grid.png"))
    scale = 480 // (3 * 9 + 2)  # large enough to see
    assert picture.shape[:2] == (scale * (2 * 7 + 2), scale * (3 * 9 + 2))
    grid = picture[::scale, ::scale]
    assert np.array_equal(grid.repeat(scale, 0).repeat(scale, 1), picture)
    assert read_png(sample(model, 1, out=tmp_path / "one.png")).shape[:2] == (5 + 4, 7 + 4)  # one image stays as it is
    assert np.array_equal(grid[2:7, 2:9], x[0])
    assert np.array_equal(grid[9:14, 11:18], x[4])
    assert (grid[:2] == 255).all()
    assert (grid[9:14, 20:27] == 255).all()  # no sixth image


def read_shards(folder, kind):
    """Samples and ids of a folder of shards, in the order of their names."""
    shards = [np.load(p) if kind == "npz" else load_file(p) for p in sorted(folder.glob(f"*.{kind}"))]
    assert shards
    return (np.concatenate([np.asarray(shard[name]) for shard in shards]) for name in ("x", "ids"))


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 4)])
def test_shards(tmp_path, kind, shape):
    model = Noise(*shape)
    whole = sample(model, 23, seed=4).numpy()
    folder = sample(model, 23, seed=4, batch_size=7, out=tmp_path / "all", format=kind, shard_size=10)
    names = [f"00000000-00000009.{kind}", f"00000010-00000019.{kind}", f"00000020-00000022.{kind}"]
    assert sorted(p.name for p in folder.iterdir()) == names
    x, ids = read_shards(folder, kind)
    assert np.array_equal(x, whole)
    assert ids.tolist() == list(range(23))
    # two processes, one folder
    for part in (range(10), range(10, 23)):
        sample(model, ids=part, seed=4, out=tmp_path / "parts", format=kind, shard_size=10)
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_longer_run_takes_over_a_shorter_ones_shards(tmp_path, kind):
    options = {"seed": 4, "format": kind, "shard_size": 10, "micro_batch": 4}
    for n in (3, 14, 26, 40):
        sample(Noise(2), n, out=tmp_path / "grown", resume=True, **options)
    sample(Noise(2), 40, out=tmp_path / "fresh", **options)
    grown, fresh = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("grown", "fresh"))
    assert grown == fresh
    model = Noise(2)
    sample(model, 45, out=tmp_path / "grown", resume=True, **options)
    assert sum(model.seen) == 8  # samples 40 .. 44, in blocks of 4
    for change in ({"n": 33}, {"n": 40, "shard_size": 20}, {"n": 40, "shard_size": 7}):
        with pytest.raises(ValueError, match=r"\d+-\d+\.\w+ is no shard of this n and shard_size"):
            sample(Noise(2), out=tmp_path / "fresh", resume=True, **{**options, **change})
    assert {p.name: p.read_bytes() for p in (tmp_path / "fresh").iterdir()} == fresh
    # two processes with every second sample each have shards between one another's
    for part in (range(0, 30, 2), range(1, 30, 2), range(0, 40, 2)):
        sample(Noise(2), ids=part, out=tmp_path / "shared", resume=True, **options)
    assert torch.equal(fastgen.data.shards.load_shards(tmp_path / "shared")[:30], sample(Noise(2), 30, seed=4))


@pytest.mark.parametrize("kind", ["npz", "safetensors", "png"])
def test_an_interrupted_run_resumes(tmp_path, kind):
    class Killed(Noise):
        def sample(self, n: int, *, key: Tensor | None = None, scale: float = 1.0) -> Tensor:
            if len(self.seen) == 3:
                raise KeyboardInterrupt
            return super().sample(n, key=key, scale=scale)

    options = {"seed": 4, "batch_size": 4, "out": tmp_path / "run", "format": kind}
    if kind != "png":
        options["shard_size"] = 5
    model = Killed(1, 2, 2)
    with pytest.raises(KeyboardInterrupt):
        sample(model, 17, **options)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    assert len(written) == (12 if kind == "png" else 2)
    model.seen = []
    sample(model, 17, resume=True, **options)
    assert sum(model.seen) == (5 if kind == "png" else 7)
    assert all(p.stat().st_mtime_ns == at for p, at in written.items())
    model.seen = []
    sample(model, 17, resume=True, **options)
    assert model.seen == []
    expected = sample(Killed(1, 2, 2), 12, seed=4)
    if kind == "png":
        for i in range(12):
            assert np.array_equal(read_png(tmp_path / "run" / f"{i:08d}.png"), images.to_uint8(expected[i, 0]).numpy())
    else:
        x, ids = read_shards(tmp_path / "run", kind)
        assert np.array_equal(x[:12], expected.numpy())
        assert ids.tolist() == list(range(17))
    other = Killed(1, 2, 2)
    other.dummy.data.add_(1)
    for change in ({"seed": 5}, {"scale": 2.0}, {"micro_batch": 3}):
        with pytest.raises(ValueError, match=r"00000000\S* is not of this run \(weights, seed, options\)"):
            sample(Killed(1, 2, 2), 17, resume=True, **{**options, **change})
    with pytest.raises(ValueError, match="is not of this run"):
        sample(other, 17, resume=True, **options)


def test_images_may_be_given_by_their_paths(tmp_path):
    """What an option takes as images may be a file or a folder, whose images samples go through by their index."""

    class Echo(Noise):
        def sample(self, n: int, *, key: Tensor | None = None, init=None, mask=None) -> Tensor:
            indices = key[3] + torch.arange(n) if key.dim() == 1 else key[:, 3]
            return init(indices) * (1 if mask is None else mask(indices))

    x = torch.randint(256, (3, 3, 5, 7), dtype=torch.uint8)
    for i in range(3):
        images.save_png(x[i : i + 1], tmp_path / "in" / f"{i}.png", padding=0)
    model = Echo(3, 5, 7)
    expected = x.float() / 255
    assert torch.equal(sample(model, 5, batch_size=2, init=tmp_path / "in"), expected[[0, 1, 2, 0, 1]])
    assert torch.equal(sample(model, ids=[4, 0], init=str(tmp_path / "in")), expected[[1, 0]])
    black = torch.zeros(1, 1, 5, 7)
    images.save_png(black, tmp_path / "mask.png", padding=0)
    assert not sample(model, 2, init=tmp_path / "in" / "2.png", mask=tmp_path / "mask.png").any()
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*none\.png"):
        sample(model, 1, init=tmp_path / "none.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read image .*bad\.png: not an image"):
        sample(model, 1, init=tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"1 or 3 channels, not for those of shape \(2,\)"):
        sample(Echo(2), 1, init=tmp_path / "in")


def test_folder_of_vectors(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("fastgen.sampling.writers._SHARD_ELEMENTS", 60)
    folder = sample(Noise(2, 3), 37, seed=4, batch_size=4, out=f"{tmp_path}/v1.0/")
    assert folder == tmp_path / "v1.0"
    shards = sorted(folder.iterdir())
    assert [p.name for p in shards][:2] == ["00000000-00000009.npz", "00000010-00000019.npz"]
    assert np.array_equal(np.concatenate([np.load(p)["x"] for p in shards]), whole.numpy())
    assert np.concatenate([np.load(p)["ids"] for p in shards]).tolist() == list(range(37))


def test_points_become_a_scatter_plot(tmp_path):
    picture = read_png(sample(Noise(2), 50, out=tmp_path / "points.png"))
    assert picture.shape[:2] == (600, 600)
    assert len(np.unique(picture)) > 2


def test_progress(capsys):
    sample(Noise(1, 2, 2), 20, batch_size=7, progress=True)
    shown = capsys.readouterr().err
    assert "20/20" in shown
    assert "images/s" in shown
    sample(Noise(1, 2, 2), 20)
    assert capsys.readouterr().err == ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LineConfig(Config):
    pass


class _Line(Model):
    def __init__(self, config: _LineConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(2, 2)

    def loss(self, batch, *, key=None):
        from collections import namedtuple

        return namedtuple("Loss", "loss")((self.layer(batch) - batch).square().mean())

    def sample(self, n: int, *, key: Tensor | None = None) -> Tensor:
        return self.layer(ops.normal((n, 2), key=key))


def test_a_run_directory_can_be_sampled(tmp_path, monkeypatch):
    registry.names()
    monkeypatch.setitem(registry._entries, "line", registry.Entry("line", _Line, _LineConfig, {}, "", "digits"))
    model = _Line(_LineConfig(event_shape=(2,)))
    fit(model, torch.randn(20, 2), steps=3, out=tmp_path, device="cpu", sample_every=0)
    assert torch.equal(fastgen.sample(tmp_path, 5, device="cpu"), sample(model, 5))
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "line"


def test_uint8_rounds_to_nearest_and_clips():
    x = torch.tensor([-1.0, 0.0, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 1.0, 2.0, torch.nan, torch.inf])
    assert images.to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 0, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(every.float() / 255), every)
    assert images.to_uint8(every) is every


def test_grid_arguments():
    assert images.grid(torch.zeros(6, 1, 2, 2), columns=6, padding=0).shape == (2, 12)
    assert images.grid(torch.zeros(2, 3, 2, 2), columns=9, padding=1).shape == (4, 7, 3)
    for bad in (torch.zeros(2, 2, 4, 4), torch.zeros(3, 4, 4)):
        with pytest.raises(ValueError, match="C = 1, 3 or 4"):
            images.grid(bad)
    with pytest.raises(ValueError, match="at least one image"):
        images.grid(torch.zeros(0, 1, 2, 2))
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        images.grid(torch.zeros(1, 1, 2, 2), columns=0)


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        sample(Noise(2), 3, out=tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()

"""Pictures of the plane: panels on the same axes, densities on a grid, what cannot be drawn."""

import io

import numpy as np
import pytest
import torch

import fastgen
from fastgen.data import load
from fastgen.sampling import planes

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def picture(path):
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).astype(int)


def colours(pixels):
    return {tuple(c) for c in pixels.reshape(-1, 3)}


def test_panels_share_their_axes(tmp_path):
    points = torch.randn(500, 2)
    drawn = picture(planes.save_panels({"a": points, "b": points}, tmp_path / "new" / "both.png"))
    half = drawn.shape[1] // 2
    left, right = drawn[60:-60, 60 : half - 60], drawn[60:-60, half + 60 : -60]
    blue = [(p[..., 2] > p[..., 0] + 50).sum() for p in (left, right)]
    assert blue[0] > 1000
    assert abs(blue[0] - blue[1]) < 0.1 * blue[0]
    # ten times farther out, the second panel's points leave the axes of the first
    far = picture(planes.save_panels({"a": points, "b": 10 * points + 100}, tmp_path / "far.png"))[60:-60, half + 60 : -60]
    assert (far[..., 2] > far[..., 0] + 50).sum() < 0.02 * blue[0]


def test_density_is_drawn_where_it_is(tmp_path):
    """A narrow bump in the upper right quarter of the plane."""
    points = torch.rand(200, 2) * 8 - 4
    low, high = planes._limits(points)
    bump = torch.tensor([2.0, 3.0])
    grid = planes._on_grid(lambda x: -((x - bump) ** 2).sum(1) * 20, low, high)
    row, column = divmod(int(grid.argmax()), planes._PIXELS)
    steps = (torch.tensor([column, row]) + 0.5) / planes._PIXELS
    torch.testing.assert_close(low + (high - low) * steps, bump, rtol=0, atol=0.05)
    assert planes._on_grid(lambda x: torch.full((len(x),), torch.nan), low, high).eq(0).all()
    drawn = picture(planes.save_panels({"points": points, "p": lambda x: -x.square().sum(1)}, tmp_path / "p.png"))
    assert len(colours(drawn)) > 200


def test_save_density_has_the_truth_where_it_is_known(tmp_path):
    model = fastgen.create("nsf", features=2, layers=2, hidden=(8,))
    toy = picture(planes.save_density(model, load("moons"), tmp_path / "toy.png", n=50))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32))
    array = picture(planes.save_density(model, load(str(tmp_path / "x.npy")), tmp_path / "array.png", n=50))
    assert toy.shape[1] - array.shape[1] == 600


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"points must be \[N, 2\], got \[4, 3\]"):
        planes.save_scatter(torch.zeros(4, 3), tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one point"):
        planes.save_scatter(torch.zeros(0, 2), tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"a model of the plane, this one's samples have shape \(3,\)"):
        planes.check_density(fastgen.create("nice", features=3))
    with pytest.raises(ValueError, match="VAE has no log_prob"):
        planes.check_density(fastgen.create("vae", event_shape=(2,)))
    assert not list(tmp_path.iterdir())
    planes.save_scatter(torch.full((3, 2), torch.nan), tmp_path / "nan.png")

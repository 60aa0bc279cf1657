from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgen import data
from fastgen.data.arrays import check_samples, fit_images


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5,), (5, 1)),
        ((5, 7), (5, 7)),
        ((5, 8, 9), (5, 1, 8, 9)),
        ((5, 3, 8, 9), (5, 3, 8, 9)),
        ((5, 8, 9, 3), (5, 3, 8, 9)),
        ((5, 8, 9, 1), (5, 1, 8, 9)),
        ((5, 3, 8, 3), (5, 3, 8, 3)),  # both fit: channels first
        ((5, 8, 9, 2), (5, 8, 9, 2)),
    ],
)
def test_shapes_of_arrays(shape, expected):
    assert tuple(check_samples(np.zeros(shape, np.uint8), "a").shape) == expected


def test_channels_last_moves_values():
    x = np.random.default_rng(0).random((2, 5, 6, 3), dtype=np.float32)
    torch.testing.assert_close(check_samples(x, "a"), torch.from_numpy(x).permute(0, 3, 1, 2))


def test_tensors_are_channels_first():
    assert tuple(check_samples(torch.zeros(5, 8, 9, 3), "a").shape) == (5, 8, 9, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float16, np.float32, np.float64, np.int64, np.uint16, ">f4"])
def test_dtypes(dtype):
    x = np.array([[0, 1], [1, 0]], dtype=dtype)
    out = check_samples(x, "a")
    assert out.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert out.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 2), dtype="<U3"), "a must hold numbers"),
        (np.zeros((2, 2), dtype=complex), "a must hold numbers"),
        (torch.zeros(2, 2, dtype=torch.complex64), "a must hold real numbers"),
        (np.zeros((2, 1, 1, 1, 1)), "a must be"),
        (np.zeros(()), "a must be"),
        (np.zeros((0, 3)), "a is empty"),
        (np.zeros((3, 0)), "a is empty"),
        (np.full((2, 1, 4, 4), 255.0), r"images in \[0, 1\], its values run from 255 to 255; 0 .. 255 must be uint8"),
        (np.full((2, 1, 4, 4), -1.0), r"images in \[0, 1\], its values run from -1 to -1$"),
        (np.array([[0.0], [0.0], [np.nan]]), "not finite, first in sample 2"),
        (np.array([[0.0], [-np.inf], [np.nan]]), "not finite, first in sample 1"),
    ],
)
def test_unsuitable_samples(x, message):
    with pytest.raises(ValueError, match=message) as error:
        check_samples(x, "a")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(3, int), r"4 samples and labels of shape \[3\]"),
        (np.zeros((4, 2), int), r"labels of shape \[4, 2\]"),
        (np.zeros(4), "must be integers, got dtype float64"),
        (torch.zeros(4), "must be integers, got dtype torch.float32"),
        (np.array(["a"] * 4), "must be integers"),
        (np.array([0, 1, -1, 2]), "must not be negative, got -1"),
    ],
)
def test_unsuitable_labels(y, message):
    with pytest.raises(ValueError, match=message):
        data.ArraySource("a", np.zeros((4, 2)), y)


def test_label_columns_are_flattened():
    assert data.ArraySource("a", np.zeros((2, 2)), np.array([[1], [0]])).batch(torch.arange(2))[1].tolist() == [1, 0]


def test_rounding_beyond_the_unit_interval_is_clamped():
    out = check_samples(torch.tensor([1 + 5e-5, -5e-5]).view(2, 1, 1, 1), "a")
    assert out.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (40, 33)])
def test_resize_keeps_range_and_mean(dtype, shape):
    x = torch.rand(3, 1, *shape)
    x = (x * 255).to(torch.uint8) if dtype == torch.uint8 else x
    out = fit_images(x, 16, None, "a")
    top = 255 if dtype == torch.uint8 else 1
    assert out.dtype == dtype
    assert tuple(out.shape) == (3, 1, 16, 16)
    assert out.min() >= 0
    assert out.max() <= top
    flat = fit_images(torch.full_like(x, top // 2 or 1), 16, None, "a")
    assert (flat - (top // 2 or 1)).abs().max() < 1e-5


def test_resize_crops_the_centre():
    x = torch.zeros(1, 1, 4, 12)
    x[..., 4:8] = 1
    assert (fit_images(x, 4, None, "a") > 0.8).all()


def test_resize_is_antialiased():
    stripes = torch.arange(64).remainder(2).float().expand(1, 1, 64, 64)
    assert (fit_images(stripes, 8, None, "a")[..., 1:-1] - 0.5).abs().max() < 0.05


def test_channels():
    grey = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    colour = fit_images(grey, None, 3, "a")
    assert tuple(colour.shape) == (2, 3, 4, 4)
    assert torch.equal(fit_images(colour, None, 1, "a"), grey)
    green = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    assert fit_images(green, None, 1, "a").item() == pytest.approx(0.587)
    with pytest.raises(ValueError, match="a has 4 channels, which cannot become 3"):
        fit_images(torch.zeros(1, 4, 2, 2), None, 3, "a")


@pytest.mark.parametrize("size", [0, -3])
def test_image_size_out_of_range(size):
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        fit_images(torch.zeros(1, 1, 4, 4), size, None, "a")


def _save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npy(tmp_path):
    x = np.random.default_rng(0).random((40, 5), dtype=np.float32)
    np.save(tmp_path / "a.npy", x)
    train, test = (data.load(tmp_path / "a.npy", split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (36, 4)
    rows = np.concatenate([train.x.numpy(), test.x.numpy()])
    assert np.array_equal(rows[np.lexsort(rows.T)], x[np.lexsort(x.T)])


def test_npz_keys(tmp_path):
    x, y = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 4
    for name, arrays in (("xy", {"x": x, "y": y}), ("other", {"pictures": x}), ("arr", {"arr_0": x, "arr_1": y})):
        source = data.load(str(_save(tmp_path / f"{name}.npz", **arrays)))
        assert source.event_shape == (3, 8, 8)
        assert source.num_classes == (4 if name == "xy" else None)
        assert source.kind == "image"


def test_classes_do_not_depend_on_the_split(tmp_path):
    path = _save(tmp_path / "a.npz", x=np.zeros((30, 2)), y=np.arange(30))
    assert {data.load(path, split=s).num_classes for s in ("train", "test")} == {30}


def test_npz_with_its_own_split(tmp_path):
    arrays = {"x_train": np.zeros((5, 2)), "y_train": np.arange(5), "x_test": np.ones((3, 2)), "y_test": np.arange(3)}
    path = _save(tmp_path / "a.npz", **arrays)
    train, test = (data.load(path, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (5, 3)
    assert train.num_classes == test.num_classes == 5
    assert test.batch(torch.arange(3))[0].eq(1).all()


def test_npz_resized(tmp_path):
    path = _save(tmp_path / "a.npz", x=np.zeros((10, 8, 8), np.uint8))
    assert data.load(path, image_size=12, channels=3).event_shape == (3, 12, 12)
    with pytest.raises(ValueError, match="holds vectors"):
        data.load(_save(tmp_path / "b.npz", x=np.zeros((10, 8))), image_size=12)


def test_damaged_files(tmp_path):
    whole = _save(tmp_path / "a.npz", x=np.ones((20, 8))).read_bytes()
    np.save(tmp_path / "a.npy", np.zeros((20, 8)))
    array = (tmp_path / "a.npy").read_bytes()
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    for name, raw in {
        "short.npz": whole[:100],
        "bits.npz": whole[:300] + bytes(200) + whole[500:],
        "empty.npy": b"",
        "short.npy": array[:200],
        "header.npy": array[:12],
        "text.npy": b"no array",
    }.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=f"cannot read .*{name}: ") as error:
            data.load(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"objects.npy: it holds Python objects, which are never unpickled"):
        data.load(tmp_path / "objects.npy")


def test_files_that_do_not_suit(tmp_path):
    with pytest.raises(ValueError, match=r"a.npz has no array named x; it has: u, v"):
        data.load(_save(tmp_path / "a.npz", u=np.zeros(3), v=np.zeros(3)))
    with pytest.raises(ValueError, match=r"b.npz has 6 samples and labels of shape \[5\]"):
        data.load(_save(tmp_path / "b.npz", x=np.zeros((6, 2)), y=np.zeros(5, int)))
    (tmp_path / "c.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"cannot read .*c.txt: expected a folder"):
        data.load(tmp_path / "c.txt")
    with pytest.raises(ValueError, match="a test split needs at least 2 samples, there are 1"):
        data.load(_save(tmp_path / "d.npz", x=np.zeros((1, 2))), split="test")

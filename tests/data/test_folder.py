from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from fastgen import data

image = pytest.importorskip("PIL.Image")


def _picture(seed, size=(10, 8), mode="RGB"):
    h, w = size[1], size[0]
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return image.fromarray(pixels).convert(mode)


def _fill(folder, n, suffix=".png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        _picture(i, **options).save(folder / f"{i:03}{suffix}")


def test_loose_images(tmp_path):
    _fill(tmp_path, 20)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    train, test = (data.load(tmp_path, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (18, 2)
    assert train.event_shape == (3, 8, 10)
    assert train.num_classes is None
    assert sorted(p.name for p in train.paths + test.paths) == [f"{i:03}.png" for i in range(20)]
    (x,) = test.batch(torch.arange(2))
    expected = np.stack([np.asarray(image.open(p)) for p in test.paths]).transpose(0, 3, 1, 2) / 255
    torch.testing.assert_close(x, torch.from_numpy(expected).float())


def test_sub_folders_are_classes(tmp_path):
    for name in ("zebra", "ant"):
        _fill(tmp_path / name / "deeper", 10)
    (tmp_path / "no_images").mkdir()
    source = data.load(str(tmp_path))
    assert source.classes == ("ant", "zebra")
    assert source.num_classes == 2
    _, y = source.batch(torch.arange(len(source)))
    assert [source.classes[i] for i in y] == [p.relative_to(tmp_path).parts[0] for p in source.paths]


def test_train_and_test_inside(tmp_path):
    _fill(tmp_path / "train" / "a", 3)
    _fill(tmp_path / "train" / "b", 2)
    _fill(tmp_path / "test" / "b", 2)
    train, test = (data.load(tmp_path, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (5, 2)
    assert train.classes == test.classes == ("a", "b")
    assert test.batch(torch.arange(2))[1].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("L", ".png", 1),
        ("1", ".png", 1),
        ("LA", ".png", 1),
        ("P", ".png", 3),
        ("RGBA", ".png", 3),
        ("CMYK", ".jpg", 3),
        ("RGB", ".webp", 3),
        ("RGB", ".JPEG", 3),
        ("RGB", ".bmp", 3),
        ("P", ".gif", 3),
    ],
)
def test_modes(tmp_path, mode, suffix, channels):
    _fill(tmp_path, 2, suffix, mode=mode)
    source = data.load(tmp_path)
    assert source.event_shape == (channels, 8, 10)
    assert source.batch(torch.tensor([0]))[0].std() > 0.1
    assert data.load(tmp_path, channels=4 - channels).event_shape == (4 - channels, 8, 10)


def test_sixteen_bits(tmp_path):
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    image.fromarray(ramp).save(tmp_path / "a.png")
    x = data.load(tmp_path)[0]
    assert tuple(x.shape) == (1, 4, 4)
    torch.testing.assert_close(x.flatten(), torch.linspace(0, 1, 16), atol=0.003, rtol=0)


def test_transparency_is_laid_on_white(tmp_path):
    image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert data.load(tmp_path)[0].eq(1).all()


def test_exif_orientation(tmp_path):
    picture = image.new("RGB", (10, 8), "black")
    picture.paste((255, 255, 255), (0, 0, 10, 1))  # the top row; orientation 6 turns it to the right-hand column
    exif = image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    x = data.load(tmp_path)[0]
    assert tuple(x.shape) == (3, 10, 8)
    assert x[:, :, -1].eq(1).all()
    assert x[:, :, :-1].eq(0).all()


def test_sizes_must_agree_unless_resized(tmp_path):
    _fill(tmp_path, 3)
    _picture(9, size=(7, 30)).save(tmp_path / "tall.png")
    with pytest.raises(ValueError, match=r"pixels \(height x width\).*: set image_size to resize them") as error:
        data.load(tmp_path)
    assert "tall.png" in str(error.value)
    assert "30x7" in str(error.value)
    source = data.load(tmp_path, image_size=6, channels=1)
    assert source.event_shape == (1, 6, 6)
    assert tuple(source.batch(torch.arange(3))[0].shape) == (3, 1, 6, 6)


def test_resize_takes_the_centre(tmp_path):
    picture = image.new("RGB", (30, 10))
    picture.paste((255, 255, 255), (10, 0, 20, 10))
    picture.save(tmp_path / "a.png")
    assert data.load(tmp_path, image_size=10)[0].eq(1).all()


def test_damaged_images_are_named(tmp_path):
    _fill(tmp_path, 4, size=(64, 64))
    (tmp_path / "bad.png").write_text("no image at all")
    with pytest.raises(ValueError, match=r"^cannot read image .*bad.png: not an image$"):
        data.load(tmp_path)
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(whole[:2000])  # the header is whole, the pixels are not
    (tmp_path / "train").mkdir()
    _fill(tmp_path / "test", 1)
    (tmp_path / "bad.png").rename(tmp_path / "train" / "bad.png")
    source = data.load(tmp_path)
    with pytest.raises(ValueError, match=r"^cannot read image .*bad.png: ") as error:
        source.batch(torch.tensor([0]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tif", ".bmp"])
def test_any_damage_is_a_value_error_or_an_image(tmp_path, suffix):
    _fill(tmp_path, 1, suffix, size=(32, 32))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        raw = np.frombuffer(whole, np.uint8).copy()
        raw[rng.integers(0, len(raw), 6)] = rng.integers(0, 256, 6)
        path.write_bytes(raw.tobytes()[: rng.integers(1, len(raw) + 1)])
        try:
            x = data.load(tmp_path, image_size=8)[0]
        except ValueError as error:
            assert path.name in str(error)  # noqa: PT017 - either outcome is right
        else:
            assert tuple(x.shape[1:]) == (8, 8)


def test_folders_that_do_not_suit(tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        data.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        data.load(tmp_path / "missing")
    _fill(tmp_path, 1)
    with pytest.raises(ValueError, match="a test split needs at least 2 samples"):
        data.load(tmp_path, split="test")
    _fill(tmp_path / "sub", 1)
    with pytest.raises(ValueError, match=r"both directly \(000.png\) and in sub-folders \(sub/\)"):
        data.load(tmp_path)
    for options in ({"image_size": 0}, {"channels": 2}, {"split": "all"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            data.load(tmp_path, **options)


def test_fingerprint(tmp_path):
    _fill(tmp_path / "a", 12)
    source = data.load(tmp_path)
    first = source.fingerprint
    assert data.load(tmp_path).fingerprint == first == pickle.loads(pickle.dumps(source)).fingerprint
    assert len({first, data.load(tmp_path, image_size=4).fingerprint, data.load(tmp_path, split="test").fingerprint}) == 3
    (tmp_path / "a").rename(tmp_path / "b")
    assert data.load(tmp_path).fingerprint != first

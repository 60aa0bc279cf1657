from __future__ import annotations

import pytest
import torch

from fastgen import data
from fastgen.data import glyphs

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def source():
    return data.load_glyphs(n=720)


def test_what_they_are(source):
    assert (len(source), source.event_shape, source.num_classes) == (720, (1, 28, 28), 36)
    assert source.y.bincount().tolist() == [20] * 36
    assert source.classes[10] == "A"
    assert source.x.dtype == torch.uint8
    brightest = source.x.amax((1, 2, 3))
    assert brightest.min() > 150  # nothing is blank
    ink = source.batch(torch.arange(720))[0].mean((1, 2, 3))
    assert 0.02 < ink.min() < ink.max() < 0.4


def test_glyphs_stay_inside_the_image(source):
    x = source.x[:, 0]
    border = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
    assert (border.amax(1) > 64).float().mean() < 0.02


def test_determinism_and_prefix(source):
    again = data.load_glyphs(n=100)
    assert torch.equal(again.x, source.x[:100])
    assert again.fingerprint == data.load_glyphs(n=100).fingerprint
    assert len({x.numpy().tobytes() for x in source.x}) == 720


def test_splits_are_disjoint(source):
    test = data.load("glyphs", split="test")
    assert len(test) == 1000
    assert not {x.numpy().tobytes() for x in source.x} & {x.numpy().tobytes() for x in test.x}


def test_one_label_is_one_character(source):
    """Images of a class are nearer to their own class's mean than to most others': labels and pictures agree."""
    x = source.batch(torch.arange(720))[0].flatten(1)
    means = torch.stack([x[source.y == c].mean(0) for c in range(36)])
    rank = torch.cdist(x, means).argsort(1).eq(source.y[:, None]).int().argmax(1)
    assert (rank < 3).float().mean() > 0.7


@pytest.mark.parametrize("size", [8, 33, 160])
def test_any_size(size):
    small = data.load_glyphs(n=36, image_size=size, channels=3)
    assert small.event_shape == (3, size, size)
    means = [s.x.float().mean().item() / 255 for s in (small, data.load_glyphs(n=36))]
    assert means[0] == pytest.approx(means[1], abs=0.01)


def test_every_font_has_every_character():
    drawn = {(f, c): glyphs._glyph(f, c).tobytes() for f in glyphs.FONTS for c in glyphs.CHARACTERS}
    for font in glyphs.FONTS:  # a missing character is drawn as the same box each time
        assert len({drawn[font, c] for c in glyphs.CHARACTERS}) >= 35, font


@pytest.mark.parametrize(
    ("options", "message"), [({"n": 0}, "n must be"), ({"image_size": 0}, "image_size"), ({"split": "all"}, "split must")]
)
def test_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        data.load_glyphs(**options)

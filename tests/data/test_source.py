from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fastgen import data
from fastgen.data.source import digest, mixed_order, ranked_split, stratified_split


@given(st.integers(2, 300))
def test_ranked_split_covers_all_once(n):
    train, test = (ranked_split(map(str, range(n)), s, "a") for s in ("train", "test"))
    assert sorted([*train, *test]) == list(range(n))
    assert len(test) == max(1, n // 10)


def test_ranked_split_hardly_moves_as_samples_are_added():
    before = set(ranked_split(map(str, range(1000)), "test", "a").tolist())
    after = set(ranked_split(map(str, range(1100)), "test", "a").tolist())
    assert len(before - after) < 20


def test_mixed_order_is_pinned():
    assert mixed_order(map(str, range(8))).tolist() == [4, 3, 0, 1, 7, 2, 6, 5]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200))
def test_stratified_split(labels):
    y = np.array(labels)
    train, test = (stratified_split(y, s) for s in ("train", "test"))
    assert sorted([*train, *test]) == list(range(len(y)))
    assert np.array_equal(np.bincount(y[test], minlength=5), np.bincount(y, minlength=5) // 10)


def test_any_prefix_of_a_stratified_split_is_balanced():
    y = np.repeat(np.arange(5), 100)
    for split in ("train", "test"):
        first = np.bincount(y[stratified_split(y, split)[:23]], minlength=5)
        assert first.max() - first.min() <= 1


def test_digest_separates():
    a, b = torch.zeros(4, dtype=torch.uint8), torch.zeros(4)
    assert len({digest(a), digest(b), digest(a[:2], a[2:]), digest(a.view(2, 2)), digest(), digest("")}) == 6
    assert digest(torch.arange(4).view(2, 2).T) == digest(torch.tensor([[0, 2], [1, 3]]))
    assert len(digest(a)) == 64


def _labelled():
    return data.as_source((torch.arange(12, dtype=torch.uint8).view(6, 1, 1, 2) * 20, torch.arange(6) % 3))


def test_array_source():
    source = _labelled()
    x, y = source.batch(torch.tensor([5, 0, 5]))
    assert (x.dtype, y.dtype, tuple(x.shape)) == (torch.float32, torch.int64, (3, 1, 1, 2))
    assert x[0].flatten().tolist() == pytest.approx([200 / 255, 220 / 255])
    assert y.tolist() == [2, 0, 2]
    assert (len(source), source.num_classes, source.kind, source.event_shape) == (6, 3, "image", (1, 1, 2))
    assert repr(source) == "ArraySource('arrays', 6 x 1x1x2, 3 classes)"


def test_a_source_is_a_data_set():
    source = _labelled()
    x, y = source[-1]
    assert torch.equal(x, source[5][0])
    assert y == 2
    assert len(list(source)) == 6
    assert isinstance(data.as_source(torch.zeros(3, 2))[0], torch.Tensor)
    batches = list(DataLoader(source, batch_size=4))
    assert [len(b[0]) for b in batches] == [4, 2]
    for wrong in (6, -7):
        with pytest.raises(IndexError, match="has 6 samples"):
            source[wrong]


def test_batches_of_nothing():
    for held in (_labelled(), data.as_source([(torch.zeros(2), 0)]), data.as_source([torch.zeros(2)])):
        assert [len(part) for part in held.batch(torch.tensor([], dtype=torch.int64))] in ([0, 0], [0])


def test_batch_does_not_hand_out_what_it_holds():
    source = data.as_source(torch.zeros(3, 2))
    source.batch(torch.arange(3))[0].fill_(7)
    assert source.batch(torch.arange(3))[0].eq(0).all()


def test_fingerprints():
    source = _labelled()
    assert source.fingerprint == _labelled().fingerprint
    assert source.fingerprint == pickle.loads(pickle.dumps(source)).fingerprint
    x, y = source.x, source.y
    others = [data.as_source(x), data.as_source((x, y.flip(0))), data.as_source((x.flip(0), y)), data.as_source((x + 1, y))]
    assert len({s.fingerprint for s in [source, *others]}) == 5


class Items(Dataset):
    """A map-style set of given items."""

    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_data_sets():
    items = [(np.full((8, 8, 3), i, np.uint8), i % 2) for i in range(4)]
    source = data.as_source(Items(items, classes=["a", "b"]))
    x, y = source.batch(torch.tensor([3, 1]))
    assert tuple(x.shape) == (2, 3, 8, 8)
    assert x[0, 0, 0, 0] == pytest.approx(3 / 255)
    assert y.tolist() == [1, 1]
    assert (source.name, source.num_classes, source.classes) == ("Items", 2, ("a", "b"))
    assert data.as_source(Items(items, targets=[0, 5, 1])).num_classes == 6
    assert data.as_source([torch.zeros(1, 4, 4)] * 3).event_shape == (1, 4, 4)
    assert len(source.fingerprint) == 64


def test_pillow_images_in_a_data_set():
    image = pytest.importorskip("PIL.Image")
    source = data.as_source(Items([image.new("RGB", (6, 4), "white"), image.new("RGB", (6, 4))]))
    assert source.event_shape == (3, 4, 6)
    assert source.batch(torch.arange(2))[0].flatten(1).mean(1).tolist() == pytest.approx([1, 0])
    assert data.as_source([image.new("L", (6, 4))]).event_shape == (1, 4, 6)
    assert data.as_source([image.new("P", (6, 4))]).event_shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([torch.zeros(1, 4, 4), torch.zeros(1, 5, 4)], r"Items\[1\] has shape 1x5x4, the others 1x4x4"),
        ([torch.zeros(2), torch.full((2,), torch.nan)], r"Items\[1\] has values that are not finite"),
        ([(torch.zeros(2), 0), (torch.zeros(2), -1)], r"labels of Items\[1\] must not be negative"),
        ([(torch.zeros(2), 0), torch.zeros(2)], r"Items\[1\] is unlabelled, the first sample is labelled"),
        ([torch.zeros(2), (torch.zeros(2), 0)], r"Items\[1\] is labelled, the first sample is unlabelled"),
        ([(torch.zeros(2), 0, 0)], r"Items\[0\] must be x or \(x, y\), got 3 parts"),
        ([], "Items is empty"),
    ],
)
def test_unsuitable_data_sets(items, message):
    with pytest.raises(ValueError, match=message):
        data.as_source(Items(items)).batch(torch.arange(len(items)))


def test_loaders_are_streams():
    x, y = torch.rand(10, 3), torch.arange(10)
    source = data.as_source(DataLoader(TensorDataset(x, y), batch_size=4))
    assert isinstance(source, data.StreamSource)
    assert source.event_shape == (3,)
    for _ in range(2):  # it can be gone through again
        parts = list(source.batches())
        assert torch.equal(torch.cat([p[0] for p in parts]), x)
        assert torch.equal(torch.cat([p[1] for p in parts]), y)
    for call in (lambda: len(source), lambda: source[0], lambda: source.batch(torch.arange(2))):
        with pytest.raises(TypeError, match="stream of batches"):
            call()
    assert "stream" not in repr(source)
    assert len(source.fingerprint) == 64


def test_a_one_shot_iterator_loses_nothing_and_ends():
    source = data.as_source(torch.full((2, 3), float(i)) for i in range(4))
    assert [float(x[0, 0]) for (x,) in source.batches()] == [0, 1, 2, 3]
    assert list(source.batches()) == []


def test_unsuitable_streams():
    with pytest.raises(ValueError, match="gives no batches"):
        data.as_source(iter(()))
    shapes = data.as_source(iter([torch.zeros(2, 3), torch.zeros(2, 4)]))
    with pytest.raises(ValueError, match=r"batch 1 has shape 4, the others 3"):
        list(shapes.batches())
    labels = data.as_source(iter([(torch.zeros(2, 3), torch.zeros(2, dtype=int)), (torch.zeros(2, 3), torch.zeros(1).int())]))
    with pytest.raises(ValueError, match=r"batch 1 has 2 samples and labels of shape \[1\]"):
        list(labels.batches())

    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(3)

    with pytest.raises(ValueError, match="Endless gives single samples: wrap it in a DataLoader"):
        data.as_source(Endless())


def test_as_source_takes_what_there_is():
    source = data.as_source(np.zeros((4, 2)))
    assert data.as_source(source) is source
    assert data.as_source(TensorDataset(torch.zeros(4, 2))).event_shape == (2,)
    assert data.as_source((np.zeros((4, 2)), np.arange(4))).num_classes == 4
    assert data.as_source("checkerboard", split="test").name == "checkerboard"
    for wrong in (3, None, {"x": 1}, ("a", "b"), (torch.zeros(2), torch.zeros(2), torch.zeros(2))):
        with pytest.raises(TypeError, match=r"^(data|a tuple of data) must be"):
            data.as_source(wrong)


def test_floats_of_the_shape_of_the_samples_are_paired_with_them():
    x, y = torch.rand(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    source = data.as_source((x, y))
    assert source.num_classes is None
    assert all(torch.equal(a, b) for a, b in zip(source.batch(torch.tensor([4, 1])), (x[[4, 1]], y[[4, 1]]), strict=True))
    stream = data.as_source(iter([(x, y.double())]))
    assert torch.equal(next(stream.batches())[1], y)

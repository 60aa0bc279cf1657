from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fastgen.training import checkpoint


def test_round_trip(tmp_path):
    tied = torch.randn(3, 4)
    tensors = {
        "strided": torch.randn(4, 3).T,
        "a": tied,
        "b": tied,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 2),
        "half": torch.randn(5).bfloat16(),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    meta = {"step": 3, "rate": 0.1, "nested": {"list": [1, None, True, "x"]}}
    checkpoint.write(tmp_path / "file", tensors, meta)
    found, found_meta = checkpoint.read(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert found_meta == meta == checkpoint.read_meta(tmp_path / "file")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_atomic(path, b"old")

    def fail(temporary):
        temporary.write_bytes(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    checkpoint.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "file.safetensors"
    checkpoint.write(path, {"a": torch.randn(100)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    for reader in (checkpoint.read, checkpoint.read_meta):
        with pytest.raises(ValueError, match=r"file\.safetensors is truncated or corrupt") as caught:
            reader(path)
        assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is missing"):
        checkpoint.read(tmp_path / "nothing")


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), capturable=False, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "groups": lambda p: torch.optim.Adam([{"params": list(p)[:1], "lr": 0.1}, {"params": list(p)[1:]}]),
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_continue_exactly(tmp_path, name):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        return net, OPTIMIZERS[name](list(net.parameters())), {p: n for n, p in net.named_parameters()}

    def train(net, optimizer, steps):
        for i in steps:
            optimizer.zero_grad()
            net(torch.full((2, 3), float(i))).square().sum().backward()
            optimizer.step()

    straight, optimizer, _ = make()
    train(straight, optimizer, range(10))

    first, optimizer, names = make()
    train(first, optimizer, range(5))
    tensors, meta = checkpoint.store_optimizer(optimizer, names, "o")
    checkpoint.write(tmp_path / "file", tensors, meta)
    second, optimizer, names = make()
    second.load_state_dict(first.state_dict())
    checkpoint.restore_optimizer(optimizer, names, "o", *checkpoint.read(tmp_path / "file"))
    train(second, optimizer, range(5, 10))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    json.dumps(meta)


def test_weights_that_do_not_fit(tmp_path):
    net = nn.Linear(2, 3)
    good = net.state_dict()
    with pytest.raises(ValueError, match="has no tensor 'bias'"):
        checkpoint.load_weights(net, {"weight": good["weight"]}, tmp_path)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 4\), the model's is \(3, 2\)"):
        checkpoint.load_weights(net, {**good, "weight": torch.zeros(3, 4)}, tmp_path)
    with pytest.raises(ValueError, match="has a tensor 'more' that the model lacks"):
        checkpoint.load_weights(net, {**good, "more": torch.zeros(1)}, tmp_path)

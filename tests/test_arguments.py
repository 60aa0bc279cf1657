"""Wrong arguments in Python: a TypeError or ValueError that names the argument, what came and what was expected."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import fastgen
from fastgen import data, ops, random
from fastgen.flows.nsf import NSFConfig

X = torch.rand(8, 2)


@pytest.fixture(scope="module")
def flow():
    return fastgen.create("nsf", features=2, layers=1, hidden=(8,))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("nsf", {"features": "x"}, "features must be an int, got 'x'"),
        ("nsf", {"features": 2.5}, "features must be an int, got 2.5"),
        ("nsf", {"features": -1}, "features must be at least 1, got -1"),
        ("nsf", {"features": 1}, "coupling layers need at least 2 features, got 1"),
        ("nsf", {"event_shape": 2}, "event_shape must be a tuple of ints, got 2"),
        ("nsf", {"event_shape": "x"}, "event_shape must be a tuple of ints, got 'x'"),
        ("nsf", {"event_shape": (2.0,)}, r"event_shape must be a tuple of ints, got \(2.0,\)"),
        ("vae", {"event_shape": (0,)}, r"event_shape must be positive sizes, got \(0,\)"),
        ("ddpm", {"event_shape": ()}, r"event_shape must be positive sizes, got \(\)"),
        ("nsf", {"features": 2, "layers": "3"}, "layers must be an int, got '3'"),
        ("nsf", {"features": 2, "layers": 1.5}, "layers must be an int, got 1.5"),
        ("nsf", {"features": 2, "layers": True}, "layers must be an int, got True"),
        ("nsf", {"features": 2, "hidden": 5}, "hidden must be a tuple of ints, got 5"),
        ("nsf", {"features": 2, "hidden": ("a",)}, r"hidden must be a tuple of ints, got \('a',\)"),
        ("nsf", {"features": 2, "kind": 3}, "kind must be 'coupling' or 'autoregressive', got 3"),
        ("nsf", {"features": 2, "bins": 1}, "bins must be at least 2, got 1"),
        ("nsf", {"features": 2, "bound": float("nan")}, "bound must be positive and finite, got nan"),
        ("nsf", {"features": 2, "bound": "wide"}, "bound must be a number, got 'wide'"),
        ("vae", {"event_shape": (4,), "learning_rate": -1}, "learning_rate must be positive, got -1"),
        ("vae", {"event_shape": (4,), "learning_rate": "a"}, "learning_rate must be a number, got 'a'"),
        ("vae", {"event_shape": (4,), "beta": -1.0}, "beta must not be negative, got -1.0"),
        ("ddpm", {"event_shape": (4,), "num_classes": "x"}, "num_classes must be an int or None, got 'x'"),
    ],
)
def test_options_of_models(name, config, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastgen.create(name, **config)


def test_configs_take_what_fits():
    config = NSFConfig(event_shape=[2], layers=np.int64(3), bound=4, hidden=(8, 8))
    assert dataclasses.replace(config, bound=2.5).bound == 2.5
    assert fastgen.create("maf", features=1).event_shape == (1,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: fastgen.fit("vae", X, steps=1), "model must be a fastgen.nn.Model, .* got str"),
        (lambda m: fastgen.fit(m, X, steps="a"), "steps must be an int, got 'a'"),
        (lambda m: fastgen.fit(m, X, steps=1.5), "steps must be an int, got 1.5"),
        (lambda m: fastgen.fit(m, X, steps=0), "steps must be at least 1, got 0"),
        (lambda m: fastgen.fit(m, X, steps=1, batch_size="a"), "batch_size must be an int, got 'a'"),
        (lambda m: fastgen.fit(m, X, steps=1, seed="a"), "seed must be an int, got 'a'"),
        (lambda m: fastgen.fit(m, X, steps=1, device="x"), "device must be such as 'cpu', 'cuda' or 'cuda:1', got 'x'"),
        (lambda m: fastgen.fit(m, X, steps=1, device="meta"), "device must be one that holds numbers"),
        (lambda m: fastgen.fit(m, X, steps=1, hooks=3), "hooks must be functions .* got 3"),
        (lambda m: fastgen.fit(m, X, steps=1, hooks=[print, "a"]), "hooks must be functions .* got 'a'"),
        (lambda m: fastgen.fit(m, torch.rand(8, 3), steps=1), r"samples of shape \(3,\), the model takes \(2,\)"),
        (lambda m: fastgen.load(3), "dir must be a path, got int"),
        (lambda m: fastgen.sample(m, 2.5), "n must be an int, got 2.5"),
        (lambda m: fastgen.sample(m, "3"), "n must be an int, got '3'"),
        (lambda m: fastgen.sample(m, -1), "n must be at least 1, got -1"),
        (lambda m: fastgen.sample(m, ids=3), "ids must be indices of samples, .* got 3"),
        (lambda m: fastgen.sample(m, ids=[0.5]), "each of ids must be an int, got 0.5"),
        (lambda m: fastgen.sample(m, 2, seed="a"), "seed must be an int, got 'a'"),
        (lambda m: fastgen.sample(m, 2, batch_size="a"), "batch_size must be an int, got 'a'"),
        (lambda m: fastgen.sample(m, 2, device="meta"), "device must be one that holds numbers"),
        (lambda m: fastgen.sample(m, 2, out=3), "out must be a path, got int"),
        (lambda m: fastgen.sample(3, 2), "model_or_dir, unless it is a model, must be a path, got int"),
        (lambda m: fastgen.evaluate(3, X), "model_or_dir, unless it is a model, must be a path, got int"),
        (lambda m: fastgen.evaluate(m, X, n="a"), "n must be an int, got 'a'"),
        (lambda m: fastgen.evaluate(m, X, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda m: m.loss((torch.zeros(4, 3),)), r"x must be \[N, 2\], got \[4, 3\]"),
        (lambda m: m.loss((torch.zeros(4, 2, dtype=torch.int64),)), "x must be a floating-point tensor, got torch.int64"),
        (lambda m: m().log_prob(torch.zeros(4, 3)), r"x must be floats \[..., 2\], got torch.float32 \[4, 3\]"),
        (lambda m: m().log_prob(torch.zeros(4, 2).int()), r"x must be floats \[..., 2\], got torch.int32"),
        (lambda m: m(torch.zeros(3, 1)), "takes no context"),
        (lambda m: m.sample(2, key=torch.zeros(3)), "key must be an int64 tensor"),
        (lambda m: data.load(3), "spec must be a path, got int"),
        (lambda m: data.toy("nope"), "unknown toy density 'nope'"),
        (lambda m: ops.normal((2,), random.key(0), dtype=torch.int32), "dtype must be a floating-point dtype, got torch.int32"),
        (lambda m: ops.uniform((2,), random.key(0), dtype="x"), "dtype must be a floating-point dtype, got 'x'"),
        (lambda m: ops.normal((2,), torch.zeros(3, dtype=torch.int64)), r"key must have shape \[4\] or \[2, 4\], got \[3\]"),
        (lambda m: random.key("a"), "seed must be an int, got 'a'"),
        (lambda m: random.at(torch.zeros(3), step=1), r"key must be an int64 tensor .* got torch.float32 \[3\]"),
    ],
)
def test_functions(flow, call, message):
    with pytest.raises((TypeError, ValueError), match=message) as failure:
        call(flow)
    assert "\n" not in str(failure.value)


def test_batches_of_other_models():
    vae = fastgen.create("vae", event_shape=(1, 8, 8), latent=2)
    with pytest.raises(ValueError, match=r"x must be \[N, 1, 8, 8\], got \[4, 1, 8, 9\]"):
        vae.loss((torch.zeros(4, 1, 8, 9),))
    ddpm = fastgen.create("ddpm", event_shape=(2,))
    with pytest.raises(TypeError, match="sampler must be a name or a Sampler, got 3"):
        ddpm.sample(2, sampler=3)
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 3"):
        ddpm.sample(2, threshold=3)


@pytest.mark.parametrize("name", ["nsf", "vae", "ddpm", "flow_matching", "maf"])
def test_a_batch_of_one(name):
    model = fastgen.create(name, event_shape=(2,))
    loss = model.loss((torch.full((1, 2), 0.5),), key=random.key(0))[0]
    loss.backward()
    assert loss.isfinite()
    assert fastgen.sample(model, 1, **({"steps": 2} if name in ("ddpm", "flow_matching") else {})).shape == (1, 2)

"""Properties of every flow: log-determinants, inverses, densities, gradients, contexts, saving, sampling."""

import math

import pytest
import torch
from torch import distributions

import fastgen
from fastgen import random
from tests.flows.zoo import FLOWS, draw, make

CONDITIONAL = [case for case in FLOWS if FLOWS[case][1].get("context")]
PLAIN = [case for case in FLOWS if case not in CONDITIONAL]
IMAGES = [case for case in FLOWS if len(FLOWS[case][1]["event_shape"]) == 3]


def log_det(function, x):
    """log |det| of the Jacobian of ``function`` at one x, by autograd."""
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v).flatten(), x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet


@pytest.mark.parametrize("case", FLOWS)
def test_log_det_is_that_of_the_jacobian(case):
    model = make(case, torch.float64)
    x, context = draw(model, 3)
    z, ladj = model.transform.call_and_ladj(x, context)
    back, ladj_back = model.transform.inv_and_ladj(z, context)
    for i in range(len(x)):
        c = None if context is None else context[i : i + 1]
        expected = log_det(lambda v, c=c: model.transform(v[None], c)[0], x[i])
        torch.testing.assert_close(ladj[i], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ladj_back, -ladj, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", FLOWS)
def test_inverse_undoes(case):
    model = make(case)
    x, context = draw(model, 50)
    t = model.transform
    torch.testing.assert_close(t.inv(t(x, context), context), x, rtol=1e-3, atol=1e-3)
    z = torch.randn(50, model.features)
    torch.testing.assert_close(t(t.inv(z, context), context), z, rtol=1e-3, atol=1e-3)
    assert t.inv.inv is t


@pytest.mark.parametrize("case", FLOWS)
def test_is_a_distribution_as_zuko_has_them(case):
    model = make(case, torch.float64)
    x, context = draw(model, 4)
    flow = model(context)
    batch = () if context is None else (4,)
    assert flow.batch_shape == batch
    assert flow.event_shape == model.event_shape
    assert flow.log_prob(x).shape == (4,)
    assert flow.sample((2, 3)).shape == (2, 3, *batch, *model.event_shape)
    drawn, log_prob = flow.rsample_and_log_prob((3,))
    assert drawn.requires_grad
    torch.testing.assert_close(flow.log_prob(drawn), log_prob, rtol=1e-8, atol=1e-8)
    key = random.key(5)
    torch.testing.assert_close(flow.rsample((2,), key=key), flow.sample((2,), key=key), rtol=1e-10, atol=1e-10)

    z, ladj = flow.transform.call_and_ladj(x)
    torch.testing.assert_close(flow.base.log_prob(z) + ladj, flow.log_prob(x))
    torch.testing.assert_close(flow.transform.log_abs_det_jacobian(x, z), ladj)
    torch.testing.assert_close(flow.transform.inv(z), x, rtol=1e-8, atol=1e-8)
    if len(model.event_shape) == 1:
        same = distributions.TransformedDistribution(flow.base, [flow.transform.inv])
        torch.testing.assert_close(same.log_prob(x), flow.log_prob(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", FLOWS)
def test_gradients_reach_every_parameter(case):
    model = make(case)
    x, context = draw(model, 16)
    model.loss((x, context) if context is not None else x, key=random.key(0)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("case", FLOWS)
def test_reparameterised_samples_have_gradients(case):
    model = make(case)
    _, context = draw(model, 3)
    model(context).rsample((8,)).square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("case", PLAIN)
def test_sample_depends_on_its_own_noise_alone(case):
    model = make(case).eval()
    whole = model.sample(6, key=random.key(3))
    assert whole.shape == (6, *model.event_shape)
    torch.testing.assert_close(model.sample(3, key=random.key(3, sample=2)), whole[2:5], rtol=1e-4, atol=1e-4)


def test_many_samples_are_drawn_in_parts(monkeypatch):
    model = make("nsf-context")
    context = torch.randn(10, 3)
    whole = model.sample(10, key=random.key(0), context=context)
    monkeypatch.setattr("fastgen.flows.flow._ROWS", 4)
    torch.testing.assert_close(model.sample(10, key=random.key(0), context=context), whole, rtol=1e-4, atol=1e-4)
    plain = make("nsf")
    assert plain.sample(9).shape == (9, 5)


def test_temperature_scales_the_noise():
    model = make("realnvp")
    z = fastgen.ops.normal((4, 5), random.key(1))
    cold = model.sample(4, key=random.key(1), temperature=0.5)
    torch.testing.assert_close(cold, model.decode(0.5 * z))


@pytest.mark.parametrize("case", CONDITIONAL)
def test_labels_count_as_one_hot_features(case):
    model = make(case)
    x, _ = draw(model, 4)
    labels = torch.tensor([0, 2, 1, 2])
    hot = torch.nn.functional.one_hot(labels, 3).float()
    key = random.key(0)
    torch.testing.assert_close(model.log_prob(x, labels, key=key), model.log_prob(x, hot, key=key))
    torch.testing.assert_close(model(labels).log_prob(x), model(hot).log_prob(x))
    torch.testing.assert_close(model.loss((x, labels), key=key).loss, model.loss((x, hot), key=key).loss)
    torch.testing.assert_close(model.sample(2, key=key, context=1), model.sample(2, key=key, context=[0.0, 1.0, 0.0]))
    assert (model.sample(4, key=key, context=labels) != model.sample(4, key=key, context=0)).any()


@pytest.mark.parametrize("case", IMAGES)
def test_images(case):
    model = make(case)
    x, key = torch.randint(0, 256, (6, *model.event_shape)) / 255, random.key(2)
    context = draw(model, 6)[1]
    loss = model.loss((x, context) if context is not None else x, key=key)
    bits = loss.loss / (model.features * math.log(2)) + 8
    torch.testing.assert_close(loss.bits_per_dim, bits.detach())
    torch.testing.assert_close(model.decode(model.encode(x, context), context), x, rtol=0, atol=1e-6)
    assert torch.equal(model.log_prob(x, context, key=key), model.log_prob(x, context, key=key))
    assert (model.log_prob(x, context, key=key) != model.log_prob(x, context, key=random.key(3))).any()
    drawn = model.sample(6, context=context) * 255
    assert torch.equal(drawn, drawn.round().clamp(0, 255))


@pytest.mark.parametrize("case", PLAIN)
def test_saved_and_loaded_and_sampled(case, tmp_path):
    model = make(case)
    x, _ = draw(model, 32)
    fastgen.fit(model, x, steps=2, batch_size=8, out=tmp_path / "run", sample_every=0, progress=False)
    loaded = fastgen.load(tmp_path / "run")
    key = random.key(1)
    assert torch.equal(loaded.log_prob(x, key=key), model.log_prob(x, key=key))
    assert fastgen.sample(tmp_path / "run", 5, seed=1).shape == (5, *model.event_shape)
    scores = fastgen.evaluate(loaded, x, batch_size=8)
    assert scores == fastgen.evaluate(loaded, x, batch_size=8)
    assert math.isfinite(scores["log_prob_nats"])


def test_conditional_flows_train_on_labelled_data(tmp_path):
    x, labels = torch.rand(32, 1, 4, 4), torch.arange(32) % 3
    model = make("glow-context")
    result = fastgen.fit(model, (x, labels), steps=2, batch_size=8, out=tmp_path / "run", progress=False)
    assert "samples were not drawn: they need a context" in result.notes
    loaded = fastgen.load(tmp_path / "run")
    assert fastgen.sample(loaded, 5, context=2).shape == (5, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nsf", {"kind": "both"}, "kind must be one of coupling.*, got 'both'"),
        ("nsf", {"layers": 0}, "layers must be at least 1, got 0"),
        ("nsf", {"hidden": ()}, "hidden must be the widths of at least one layer"),
        ("nsf", {"features": 1}, "coupling layers need at least 2 features, got 1"),
        ("nsf", {"features": 2, "event_shape": (2,)}, "nsf takes features or event_shape, not both"),
        ("nsf", {"context": -1}, "context must be at least 0, got -1"),
        ("nsf", {"base": "cauchy"}, "base must be one of normal, logistic, got 'cauchy'"),
        ("nsf", {"memory": "small"}, "memory must be 'standard' or 'invertible', got 'small'"),
        ("realnvp", {"bound": "exp"}, "bound must be None, 'tanh' or 'sigmoid', got 'exp'"),
        ("realnvp", {"event_shape": (1, 2, 2), "alpha": 0.7}, r"alpha must be in \(0, 0.5\), got 0.7"),
        ("nice", {"grey_levels": 1}, "grey_levels must be 0 or at least 2, got 1"),
    ],
)
def test_config_errors(name, options, message):
    if "event_shape" not in options:
        options = {"features": 4, **options}
    with pytest.raises(ValueError, match=message):
        fastgen.create(name, **options)


def test_errors():
    plain, conditional = make("nsf"), make("nsf-context")
    with pytest.raises(ValueError, match=r"x must be \[N, 5\], got \[3, 4\]"):
        plain.log_prob(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="takes no context"):
        plain.log_prob(torch.zeros(3, 5), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="is conditional: it needs a context of 3 features"):
        conditional.sample(2)
    with pytest.raises(ValueError, match=r"context must have 3 features, got shape \[2\]"):
        conditional(torch.zeros(2))
    with pytest.raises(ValueError, match=r"context must be \[3\] or \[4, 3\], got shape \[5, 3\]"):
        conditional.sample(4, context=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 2, got 0 \.\. 3"):
        conditional(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"z must be \[N, 5\], got \[2, 3\]"):
        plain.decode(torch.zeros(2, 3))

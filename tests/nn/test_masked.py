"""MADE: what depends on what, and the walk that computes every unit once."""

import pytest
import torch

from fastgen.nn.masked import MADE, MaskedLinear

NETWORKS = {
    "plain": {"hidden": (7, 12)},
    "narrow": {"hidden": (2,)},
    "context": {"hidden": (9, 6), "context": 2},
    "residual": {"hidden": (8, 8, 8), "residual": True},
    "residual-context": {"hidden": (8, 8, 8, 8, 8), "residual": True, "context": 2},
}


def make(case, features=5, outputs=(1, 3)):
    torch.manual_seed(0)
    options = dict(NETWORKS[case])
    network = MADE(features, options.pop("hidden"), outputs, **options).double()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    context = torch.randn(4, options["context"]).double() if "context" in options else None
    return network, context


@pytest.mark.parametrize("case", NETWORKS)
def test_outputs_depend_on_earlier_dimensions_alone(case):
    network, context = make(case)
    reached = torch.zeros(5, 5, dtype=torch.bool)
    for seed in range(10):  # a ReLU may be shut
        torch.manual_seed(seed)
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter)
        x = torch.randn(4, 5).double()
        for head, size in zip((0, 1), (1, 3), strict=True):
            jacobian = torch.autograd.functional.jacobian(lambda v, i=head: network(v, context)[i].sum(0), x)
            jacobian = jacobian.abs().sum(1).view(5, size, 5).sum(1)
            assert torch.equal(jacobian.triu(), torch.zeros(5, 5).double())
            reached |= jacobian > 0
    if case != "narrow":
        assert torch.equal(reached, torch.ones(5, 5).tril(-1).bool())


@pytest.mark.parametrize("case", NETWORKS)
def test_context_reaches_every_dimension(case):
    network, context = make(case)
    if context is None:
        pytest.skip("no context")
    x = torch.randn(4, 5).double()
    jacobian = torch.autograd.functional.jacobian(lambda c: network(x, c)[0].sum(0), context)
    assert (jacobian.abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("features", [1, 2, 5, 11])
def test_walk_gives_what_a_pass_gives(case, features):
    network, context = make(case, features)
    target = 3 * torch.randn(4, features).double()
    target[0, 0] = 1e20
    x = torch.full_like(target, torch.nan)
    steps = []
    for d, parameters in enumerate(network.walk(x, context)):
        steps.append(parameters)
        x[:, d] = target[:, d]  # only now: what the walk gave before cannot have read it
    assert len(steps) == features
    for whole, parts in zip(network(target, context), zip(*steps, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        MADE(0, (4,), (1,))
    with pytest.raises(ValueError, match="hidden must be the widths of at least one layer"):
        MADE(3, (), (1,))
    with pytest.raises(ValueError, match=r"odd number of equal widths in a residual network, got \(4, 4\)"):
        MADE(3, (4, 4), (1,), residual=True)
    with pytest.raises(ValueError, match=r"degrees must not descend, got \[2, 1\]"):
        MaskedLinear([2, 1], [0, 1], 2)

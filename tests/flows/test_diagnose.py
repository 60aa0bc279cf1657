"""The report on a flow's layers."""

import pytest
import torch

from fastgen import random
from tests.flows.zoo import FLOWS, draw, make


@pytest.mark.parametrize("case", FLOWS)
def test_report_adds_up(case):
    model = make(case, torch.float64)
    x, context = draw(model, 1)
    key = random.key(0)
    report = model.diagnose(x, context, key=key)
    v = model._dequantized(x, key)
    z, ladj = model.transform.call_and_ladj(v, context)
    torch.testing.assert_close(sum(layer.log_det_mean for layer in report.layers), ladj.item())
    assert report.first_bad is None
    assert all(layer.error < 1e-10 for layer in report.layers)

    back = model.diagnose(z, context, inverse=True)
    assert [layer.name for layer in back.layers] == [layer.name for layer in report.layers][::-1]
    torch.testing.assert_close(sum(layer.log_det_mean for layer in back.layers), -ladj.item())
    # nothing is left behind
    assert torch.equal(model.transform.call_and_ladj(v, context)[0], z)
    assert all("call_and_ladj" not in vars(module) for module in model.modules())


def test_names_the_first_layer_that_goes_wrong():
    model = make("realnvp", layers=4)
    model.transform[2].conditioner.heads[0].bias.data[1] = float("nan")
    x = torch.randn(8, 5)
    report = model.diagnose(x)
    assert [layer.finite for layer in report.layers] == [True, True, False, False]
    assert report.first_bad.name == "2"
    assert report.first_bad.kind == "AffineCoupling"
    lines = str(report).splitlines()
    assert len(lines) == 5
    assert lines[3].endswith("NOT FINITE, first")
    assert lines[4].endswith("NOT FINITE")
    # sampling runs the other way
    assert [layer.finite for layer in model.diagnose(x, inverse=True).layers] == [True, False, False, False]

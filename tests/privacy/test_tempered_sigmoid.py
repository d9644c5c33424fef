"""The activation: the formula, its special cases, its gradients, per-sample gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gateplug as gp
from gateplug.privacy.functional import tempered_sigmoid

numbers = st.floats(-3, 3)


@settings(deadline=None, max_examples=100)
@given(x=st.floats(-20, 20), s=numbers, t=st.floats(0.05, 5), o=numbers)
def test_it_is_the_formula(x: float, s: float, t: float, o: float) -> None:
    expected = s / (1 + math.exp(-t * x)) - o
    assert float(tempered_sigmoid(torch.tensor(x, dtype=torch.float64), s, t, o)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(s=st.floats(0.1, 3), t=st.floats(0.05, 5), o=numbers)
def test_it_is_bounded_and_monotone(s: float, t: float, o: float) -> None:
    y = gp.TemperedSigmoid(s, t, o).double()(torch.linspace(-50, 50, 201, dtype=torch.float64))
    assert bool((y.diff() >= 0).all())
    assert float(y.min()) >= -o - 1e-12
    assert float(y.max()) <= s - o + 1e-12


def test_tanh_and_the_logistic_are_special_cases() -> None:
    x = torch.linspace(-6, 6, 101)
    assert torch.allclose(gp.TemperedSigmoid()(x), torch.tanh(x), atol=1e-6)
    assert torch.allclose(gp.TemperedSigmoid(1, 1, 0)(x), torch.sigmoid(x), atol=0)


def test_trainable_numbers_are_scalars_without_them_there_is_no_state() -> None:
    layer = gp.TemperedSigmoid(trainable=True)
    assert {k: v.shape for k, v in layer.state_dict().items()} == dict.fromkeys(["scale", "temperature", "offset"], torch.Size())
    assert not gp.TemperedSigmoid().state_dict()
    assert "temperature=2" in repr(layer)


def test_per_sample_gradients_of_the_trainable_numbers() -> None:
    opacus = pytest.importorskip("opacus", reason='needs pip install "gateplug[privacy]"')
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), gp.TemperedSigmoid(trainable=True), nn.Linear(4, 1))
    x = torch.randn(5, 3)
    sampled = opacus.GradSampleModule(net, loss_reduction="sum")
    sampled(x).square().sum().backward()
    per_sample = {n.removeprefix("_module."): p.grad_sample.clone() for n, p in sampled.named_parameters()}
    for i in range(5):
        grads = torch.autograd.grad(net(x[i : i + 1]).square().sum(), list(net.parameters()))
        for (name, _), grad in zip(net.named_parameters(), grads, strict=True):
            assert torch.allclose(per_sample[name][i], grad, atol=1e-6), name


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"temperature": -1}, {"scale": float("nan")}, {"offset": float("inf")}])
def test_bad_numbers_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        gp.TemperedSigmoid(**bad)

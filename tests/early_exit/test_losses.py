"""The losses of gates and exits against loops, their gradients, and who trains when."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateplug.early_exit import functional as E

FAST = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 10**6)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@FAST
@given(best=st.lists(st.integers(0, 3), max_size=30), cumulative=st.booleans())
def test_targets_and_positive_weights_are_counted(best: list[int], cumulative: bool) -> None:
    t = torch.tensor(best, dtype=torch.int64)
    assert E.gate_targets(t, 3).tolist() == [[float(at >= b) for at in range(3)] for b in best]
    want = []
    for at in range(3):
        m = max(sum(b <= at if cumulative else b == at for b in best), 0.1)
        want.append(min((len(best) - m) / m, 5) if best else 1.0)
    assert E.gate_pos_weight(t, 3, cumulative).tolist() == pytest.approx(want, rel=1e-15)


def test_the_cumulative_weight_balances_what_the_loss_sees() -> None:
    best = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    positives = E.gate_targets(best, 3).sum(0)
    w = E.gate_pos_weight(best, 3, cumulative=True)
    assert torch.allclose(w * positives, len(best) - positives.double())
    assert not torch.allclose(E.gate_pos_weight(best, 3) * positives, len(best) - positives.double())


@FAST
@given(scale=st.floats(0.1, 40), weighted=st.booleans(), seed=seeds)
def test_the_gate_loss_is_the_mean_of_weighted_softplus(scale: float, weighted: bool, seed: int) -> None:
    a, t = (uniform(5, 3, seed=seed) - 0.5) * scale, (uniform(5, 3, seed=seed + 1) > 0.5).double()
    w = uniform(3, seed=seed + 2) * 5 if weighted else None
    total = 0.0
    for i in range(5):
        for at in range(3):
            yes, no = math.log1p(math.exp(-a[i, at])), math.log1p(math.exp(a[i, at]))
            total += (float(w[at]) if w is not None else 1.0) * yes if t[i, at] else no
    assert float(E.gate_loss(a, t, w)) == pytest.approx(total / 15, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: E.gate_loss(x, t, w), a.requires_grad_())


def test_an_extreme_gate_logit_has_a_finite_loss_and_gradient() -> None:
    a = torch.tensor([[-1e4, 1e4, -1e4, 1e4]], requires_grad=True)
    loss = E.gate_loss(a, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    (grad,) = torch.autograd.grad(loss, a)
    assert loss.item() == 5e3
    assert grad.tolist() == [[-0.25, 0.0, 0.0, 0.25]]


def weighted_mean(ce: Tensor, p: Tensor, detach: bool) -> Tensor:
    """The paper's loss by loops; the official one differentiates the factor r as well."""
    total = ce.new_zeros(())
    for i in range(len(ce)):
        down = sum(p[i, at] * ce[i, at] for at in range(ce.shape[1]))
        r = sum(ce[i]) / down
        for at in range(ce.shape[1]):
            total = total + (p[i, at] * r).detach() * ce[i, at] if detach else total + p[i, at] * r * ce[i, at]
    return total / ce.numel()


@FAST
@given(seed=seeds)
def test_the_inference_loss_is_the_formula_with_r_a_constant(seed: int) -> None:
    ce, p = uniform(4, 3, seed=seed).requires_grad_(), (uniform(4, 3, seed=seed + 1) / 3).requires_grad_()
    loss, want = E.inference_loss(ce, p), weighted_mean(ce, p.detach(), detach=True)
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    grads = [torch.autograd.grad(x, ce)[0] for x in (loss, want)]
    assert torch.allclose(*grads, rtol=1e-12, atol=1e-14)


def test_no_gradient_reaches_the_exit_probabilities() -> None:
    ce, p = uniform(4, 3).requires_grad_(), uniform(4, 3, seed=1).requires_grad_()
    for weighting in ("exit_prob", "uniform"):
        (grad,) = torch.autograd.grad(E.inference_loss(ce, p, weighting), [p], allow_unused=True)
        assert grad is None


@FAST
@given(seed=seeds)
def test_with_r_not_detached_as_officially_the_gates_do_not_matter(seed: int) -> None:
    ce, p = uniform(4, 3, seed=seed).requires_grad_(), uniform(4, 3, seed=seed + 1)
    official, uniform_, detached = weighted_mean(ce, p, detach=False), E.inference_loss(ce, p, "uniform"), E.inference_loss(ce, p)
    for loss in (official, detached):
        assert float(loss.detach()) == pytest.approx(float(ce.detach().mean()), rel=1e-12)
    g_official, g_uniform, g_detached = (torch.autograd.grad(x, ce)[0] for x in (official, uniform_, detached))
    assert torch.allclose(g_official, g_uniform, rtol=1e-10, atol=1e-12)
    assert torch.allclose(g_uniform, torch.full_like(ce, 1 / 12), rtol=1e-12)
    assert (g_detached - g_uniform).abs().max() > 1e-4, "the detached form has a gradient of its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [0.0, 1e-44, 1e-30])
def test_a_sample_that_leaves_nowhere_weighs_one_and_one_that_hardly_leaves_is_no_nan(tiny: float, dtype: torch.dtype) -> None:
    ce = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    p = torch.tensor([[0.0, 0.0], [0.0, tiny], [0.5, 0.5]], dtype=dtype)
    loss = E.inference_loss(ce, p)
    (grad,) = torch.autograd.grad(loss, ce)
    assert float(loss.detach()) == pytest.approx(1.0)
    assert grad[0].tolist() == pytest.approx([1 / 6] * 2)
    # all of its loss on the one exit, (1 + 2) / 2 times as heavy
    assert grad[1].tolist() == pytest.approx([0.0, 1.5 / 6] if tiny else [1 / 6] * 2)
    assert grad[2].tolist() == pytest.approx([1 / 6] * 2), "a loss of 0 at every exit has no share either"


def test_the_warm_up_loss_weighs_the_first_exit_most() -> None:
    ce = uniform(6, 4).requires_grad_()
    loss = E.warmup_loss(ce)
    means = ce.detach().mean(0).tolist()
    # K = 3: K + 1 − l is 4, 3, 2, and the last exit has 1
    assert float(loss.detach()) == pytest.approx(4 * means[0] + 3 * means[1] + 2 * means[2] + means[3], rel=1e-12)
    assert torch.autograd.gradcheck(E.warmup_loss, ce)
    assert float(E.warmup_loss(uniform(6, 1))) == pytest.approx(float(uniform(6, 1).mean()))


def test_losses_of_half_precision_are_taken_in_float32() -> None:
    ce = uniform(300, 3).bfloat16()
    for loss in (E.inference_loss(ce, ce), E.warmup_loss(ce), E.gate_loss(ce, torch.ones(300, 3))):
        assert loss.dtype == torch.float32
    assert float(E.inference_loss(ce, ce, "uniform")) == pytest.approx(float(ce.double().mean()), rel=1e-6)


def test_a_batch_of_no_samples_costs_nothing() -> None:
    none = torch.zeros(0, 3, requires_grad=True)
    for loss in (
        E.gate_loss(none, torch.zeros(0, 3)),
        E.inference_loss(none, none),
        E.inference_loss(none, none, "uniform"),
        E.warmup_loss(none),
    ):
        assert float(loss.detach()) == 0
        assert loss.requires_grad


@given(every=st.integers(1, 50), batch=st.integers(0, 500))
def test_phases_take_turns_and_the_gates_begin(every: int, batch: int) -> None:
    turns = (["gate"] * every + ["inference"] * every) * (batch // (2 * every) + 1)
    assert E.phase_at(batch, every) == turns[batch]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: E.gate_loss(torch.zeros(2, 3), torch.zeros(2, 4)),
            r"targets of shape \(2, 4\) and gate_logits of shape \(2, 3\)",
        ),
        (
            lambda: E.gate_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2)),
            r"pos_weight of shape \(2,\) must be one number for each of 3",
        ),
        (
            lambda: E.inference_loss(torch.zeros(2, 3), torch.zeros(2, 3), "exit"),
            "weighting='exit' must be one of 'exit_prob', 'uniform'",
        ),
        (
            lambda: E.inference_loss(torch.zeros(2, 3), torch.zeros(2, 4)),
            r"exit_prob of shape \(2, 4\) must both be \(B, K\), without the last",
        ),
        (lambda: E.phase_at(0, 0), "every=0 at least 1"),
        (lambda: E.phase_at(-1, 3), "batch=-1 must be at least 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

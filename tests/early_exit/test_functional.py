"""Gate features, exit probabilities and decisions, literally, and what must hold for any input."""

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
# sure gates, closed gates and sums that reach 1 on the way are where the rules differ
gate_rows = st.lists(st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)), min_size=1, max_size=6)
inner = st.one_of(st.sampled_from([0.25, 0.5]), st.floats(0, 1, exclude_min=True, exclude_max=True))


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def row(gates: list[float]) -> Tensor:
    return torch.tensor([gates], dtype=torch.float64)


def features(z: list[float]) -> list[float]:
    """The four numbers as the paper writes them."""
    p = [math.exp(v - max(z)) for v in z]
    p = [v / sum(p) for v in p]
    q = [v**2 / sum(w**2 for w in p) for v in p]
    entropy = [-sum(v * math.log(v) for v in d if v > 0) for d in (p, q)]
    first, second = sorted(p, reverse=True)[:2]
    return [first, entropy[0], first - second, entropy[1]]


def probabilities(gates: list[float], mode: str) -> list[float]:
    """P by the paper's recursion, P_l = max(0, min(g_l, 1 − Σ_{j<l} P_j)); `hazard` by the chance to get there."""
    out: list[float] = []
    for g in gates:
        out.append(g * math.prod(1 - h for h in gates[: len(out)]) if mode == "hazard" else max(0.0, min(g, 1 - sum(out))))
    return [*out, max(0.0, 1 - sum(out))]


def score(gates: list[float], at: int, mode: str) -> float:
    if mode == "hazard":
        return gates[at]
    if mode == "cdf":
        return sum(probabilities(gates, mode)[: at + 1])
    left = max(0.0, 1 - sum(gates[:at]))
    return min(gates[at], left) / left if left > 0 else 1.0


@FAST
@given(classes=st.integers(2, 7), scale=st.floats(0, 30), seed=seeds)
def test_features_are_the_formula_and_carry_no_gradient(classes: int, scale: float, seed: int) -> None:
    z = normal(3, 2, classes, seed=seed, scale=scale).requires_grad_()
    u = E.uncertainty_features(z)
    assert u.shape == (3, 2, 4)
    assert not u.requires_grad
    for i in range(3):
        for j in range(2):
            assert u[i, j].tolist() == pytest.approx(features(z[i, j].tolist()), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low", [-1000.0, -math.inf])
def test_a_probability_of_zero_gives_no_nan_in_any_precision(dtype: torch.dtype, low: float) -> None:
    z = torch.tensor([[0.0, low, low]], dtype=dtype)
    assert E.uncertainty_features(z).tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert E.uncertainty_features(z).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert E.entropy_scores(z[None]).tolist() == [[0.0]]
    assert E.confidence_scores(z[None]).tolist() == [[1.0]]


@FAST
@given(gates=gate_rows, mode=st.sampled_from(E.MODES))
def test_probabilities_and_scores_are_the_formulas_and_sum_to_one(gates: list[float], mode: str) -> None:
    p, s = E.exit_probabilities(row(gates), mode), E.exit_scores(row(gates), mode)
    assert p[0].tolist() == pytest.approx(probabilities(gates, mode), abs=1e-12)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(p.min()) >= 0
    # a tiny remainder S is a difference of numbers near 1: P / S is then not known to better than eps / S
    remainder = min((1 - sum(gates[:at]) for at in range(len(gates)) if sum(gates[:at]) < 1), default=1.0)
    if mode != "official" or remainder > 1e-3:
        assert s[0].tolist() == pytest.approx([score(gates, at, mode) for at in range(len(gates))], abs=1e-11)
    assert 0 <= float(s.min()) <= float(s.max()) <= 1


@FAST
@given(gates=gate_rows, mode=st.sampled_from(E.MODES), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_run_that_sees_one_gate_after_another_has_the_same_scores_to_the_bit(
    gates: list[float], mode: str, dtype: torch.dtype
) -> None:
    g = row(gates).to(dtype)
    taken, want = torch.zeros(1, dtype=dtype), E.exit_scores(g, mode)
    for at in range(len(gates)):
        assert torch.equal(E.score_at(g[:, at], taken, mode), want[:, at])
        taken = taken + g[:, at]


@FAST
@given(gates=gate_rows, mode=st.sampled_from(E.MODES), a=st.floats(0, 1.2), b=st.floats(0, 1.2))
def test_a_larger_threshold_lets_nobody_leave_earlier(gates: list[float], mode: str, a: float, b: float) -> None:
    s = E.exit_scores(row(gates), mode)
    assert int(E.first_exit(s, min(a, b))) <= int(E.first_exit(s, max(a, b)))


@FAST
@given(gates=gate_rows, threshold=inner, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_cdf_and_official_leave_no_later_than_hazard(gates: list[float], threshold: float, dtype: torch.dtype) -> None:
    cdf, official, hazard = (
        int(E.first_exit(E.exit_scores(row(gates).to(dtype), mode), threshold)) for mode in ("cdf", "official", "hazard")
    )
    assert cdf <= hazard
    assert official <= hazard


@FAST
@given(gates=st.lists(st.integers(0, 1024), min_size=1, max_size=6))
def test_official_at_one_half_is_the_rule_without_division(gates: list[int]) -> None:
    # multiples of 2^-10: every sum and half is exact, so both sides of the boundary are the same
    g = [v / 1024 for v in gates]
    want = next((at for at, v in enumerate(g) if v >= (1 - sum(g[:at])) / 2), len(g))
    assert int(E.first_exit(E.exit_scores(row(g), "official"), 0.5)) == want


@pytest.mark.parametrize("mode", E.MODES)
def test_threshold_zero_lets_all_leave_at_once_and_above_one_nobody(mode: str) -> None:
    gates = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.3, 0.7], [0.6, 0.6]], dtype=torch.float64)
    s = E.exit_scores(gates, mode)
    assert E.first_exit(s, 0).tolist() == [0] * 4
    assert E.first_exit(s, math.nextafter(1, 2)).tolist() == [2] * 4
    assert E.first_exit(s, math.inf).tolist() == [2] * 4


def test_a_score_on_the_threshold_leaves() -> None:
    assert E.first_exit(torch.tensor([[0.25, 0.5], [0.5, 0.0], [0.25, 0.25]]), 0.5).tolist() == [1, 0, 2]


def test_a_score_that_is_nan_lets_nobody_leave() -> None:
    assert E.first_exit(torch.tensor([[math.nan, 0.6], [math.nan, math.nan]]), 0.5).tolist() == [1, 2]


@pytest.mark.parametrize("mode", E.MODES)
def test_no_gates_and_no_samples_are_fine(mode: str) -> None:
    assert E.exit_probabilities(torch.zeros(2, 0), mode).tolist() == [[1.0], [1.0]]
    assert E.first_exit(E.exit_scores(torch.zeros(2, 0), mode), 0.5).tolist() == [0, 0]
    assert E.exit_probabilities(torch.zeros(0, 3), mode).shape == (0, 4)
    assert E.first_exit(E.exit_scores(torch.zeros(0, 3), mode), 0.5).shape == (0,)


@pytest.mark.parametrize("mode", E.MODES)
def test_probabilities_pass_gradcheck(mode: str) -> None:
    # gates whose sum stays off 1, where min and max have a kink
    gates = torch.tensor([[0.2, 0.3, 0.1], [0.5, 0.7, 0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: E.exit_probabilities(g, mode), gates)


@pytest.mark.parametrize("mode", E.MODES)
def test_after_a_sure_exit_neither_scores_nor_their_gradients_are_nan(mode: str) -> None:
    gates = torch.tensor([[1.0, 0.5, 0.0]], requires_grad=True)
    s = E.exit_scores(gates, mode)
    assert s.tolist() == [[1.0, 0.5, 0.0] if mode == "hazard" else [1.0, 1.0, 1.0]]
    s.sum().backward()
    assert gates.grad is not None
    assert bool(gates.grad.isfinite().all())


def test_baseline_scores_are_the_formulas() -> None:
    z = normal(20, 5, 3)
    confidence, entropy, patience = E.confidence_scores(z), E.entropy_scores(z), E.patience_scores(z)
    for i in range(20):
        count, before = 0, None
        for at in range(5):
            u = features(z[i, at].tolist())
            guess = max(range(3), key=lambda k: float(z[i, at, k]))
            count, before = (count + 1 if guess == before else 0), guess
            assert float(confidence[i, at]) == pytest.approx(u[0], rel=1e-12)
            assert float(entropy[i, at]) == pytest.approx(-u[1], rel=1e-12)
            assert float(patience[i, at]) == count
    assert patience.is_floating_point()
    assert patience.max() > 1, "no run of equal guesses in the sample"


@FAST
@given(t=st.integers(0, 6), seed=seeds)
def test_patience_t_lets_nobody_leave_before_exit_t(t: int, seed: int) -> None:
    left = E.first_exit(E.patience_scores(normal(10, 5, 2, seed=seed)), t)
    assert int(left.min()) >= min(t, 5)


@FAST
@given(weight=st.floats(0, 5), seed=seeds)
def test_best_exit_is_the_cheapest_sum_and_the_earliest_of_equals(weight: float, seed: int) -> None:
    ce, cost = normal(6, 4, seed=seed).abs(), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    want = [min(range(4), key=lambda at: ce[i, at].item() + weight * cost[at].item()) for i in range(6)]
    assert E.best_exit(ce, cost, weight).tolist() == want
    assert E.best_exit(torch.ones(2, 4), torch.ones(4), weight).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: E.uncertainty_features(torch.zeros(3, 1)), r"logits of shape \(3, 1\) must be \(…, C\) with C ≥ 2"),
        (lambda: E.confidence_scores(torch.zeros(3, 2, 1)), "C ≥ 2"),
        (lambda: E.entropy_scores(torch.zeros(3, 2, 1)), "C ≥ 2"),
        (lambda: E.patience_scores(torch.zeros(3, 2, 1)), "C ≥ 2"),
        (lambda: E.uncertainty_features(torch.zeros(())), "C ≥ 2"),
        (lambda: E.exit_probabilities(torch.zeros(1, 2), "pdf"), "mode='pdf' must be one of 'official', 'cdf', 'hazard'"),
        (lambda: E.exit_scores(torch.zeros(1, 2), "pdf"), "mode='pdf' must be one of 'official', 'cdf', 'hazard'"),
        (lambda: E.exit_scores(torch.zeros(1, 0), "pdf"), "mode='pdf'"),
        (lambda: E.score_at(torch.zeros(1), torch.zeros(1), "pdf"), "mode='pdf'"),
        (lambda: E.best_exit(torch.zeros(2, 3), torch.zeros(3), -0.1), "cost_weight=-0.1 must be a finite number ≥ 0"),
        (lambda: E.best_exit(torch.zeros(2, 3), torch.zeros(3), math.inf), "cost_weight=inf"),
        (lambda: E.best_exit(torch.zeros(2, 3), torch.zeros(3), math.nan), "cost_weight=nan"),
        (
            lambda: E.best_exit(torch.zeros(2, 3), torch.zeros(2), 0.1),
            r"cost of shape \(2,\) must be one number for each of the 3",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

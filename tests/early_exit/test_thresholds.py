"""Operating points: every candidate by running the decision rule, and the choice among them."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateplug.early_exit import functional as E

FAST = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 10**6)


def draw(n: int, gates: int, seed: int, levels: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (of few levels: many equal), increasing costs that end at 1, correctness."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, gates, generator=g, dtype=torch.float64)
    if levels is not None:
        scores = (scores * levels).floor() / levels
    cost = torch.rand(gates + 1, generator=g, dtype=torch.float64).cumsum(0)
    return scores, cost / cost[-1], torch.rand(n, gates + 1, generator=g) < 0.6


def at(theta: float, scores: Tensor, cost: Tensor, correct: Tensor) -> tuple[float, float]:
    """Mean cost and accuracy when the rule runs at this threshold."""
    left = [next((k for k, s in enumerate(row) if s >= theta), len(row)) for row in scores.tolist()]
    return sum(float(cost[k]) for k in left) / len(left), sum(bool(correct[i, k]) for i, k in enumerate(left)) / len(left)


def candidates(scores: Tensor) -> list[float]:
    return sorted({max(float(v) for v in row[: k + 1]) for row in scores for k in range(len(row))} | {math.inf})


@FAST
@given(n=st.integers(1, 12), gates=st.integers(1, 4), levels=st.sampled_from([None, 1, 3]), seed=seeds)
def test_a_sweep_is_the_rule_run_at_every_candidate(n: int, gates: int, levels: int | None, seed: int) -> None:
    scores, cost, correct = draw(n, gates, seed, levels)
    found = E.sweep(scores, cost, correct)
    assert found.threshold.tolist() == candidates(scores)
    assert found.accuracy is not None
    for theta, mean, accuracy in zip(*(x.tolist() for x in found), strict=True):
        want = at(theta, scores, cost, correct)
        assert mean == pytest.approx(want[0], rel=1e-12)
        assert accuracy == want[1]
        left = E.first_exit(scores, theta)
        assert mean == pytest.approx(float(cost[left].mean()), rel=1e-12)


@FAST
@given(n=st.integers(1, 30), gates=st.integers(1, 5), levels=st.sampled_from([None, 4]), seed=seeds)
def test_mean_cost_does_not_decrease_with_the_threshold(n: int, gates: int, levels: int | None, seed: int) -> None:
    scores, cost, _ = draw(n, gates, seed, levels)
    found = E.sweep(scores, cost)
    assert found.accuracy is None
    assert bool((found.cost.diff() >= 0).all())
    assert found.cost[0] == cost[0], "at the smallest candidate all leave at the first exit"
    assert float(found.cost[-1]) == pytest.approx(1, rel=1e-12)


@FAST
@given(n=st.integers(1, 10), gates=st.integers(1, 3), levels=st.sampled_from([None, 3]), pick=st.floats(0, 1), seed=seeds)
def test_a_target_cost_takes_the_largest_threshold_that_affords_it(
    n: int, gates: int, levels: int | None, pick: float, seed: int
) -> None:
    scores, cost, correct = draw(n, gates, seed, levels)
    target = float(cost[0]) + pick * (1 - float(cost[0]))
    # costs that come out equal in another order of adding up are equal: the tolerance of the fit
    want = max(theta for theta in candidates(scores) if at(theta, scores, cost, correct)[0] <= target + 1e-9)
    assert E.fit_threshold(scores, cost, target_cost=target) == want


@FAST
@given(n=st.integers(1, 10), gates=st.integers(1, 3), levels=st.sampled_from([None, 3]), target=st.integers(0, 10), seed=seeds)
def test_a_target_accuracy_takes_the_smallest_threshold_that_reaches_it(
    n: int, gates: int, levels: int | None, target: int, seed: int
) -> None:
    scores, cost, correct = draw(n, gates, seed, levels)
    # k of n as a fraction is reached by exactly k right answers
    share = min(target, n) / n
    reached = [theta for theta in candidates(scores) if at(theta, scores, cost, correct)[1] >= share]
    if reached:
        assert E.fit_threshold(scores, cost, correct=correct, target_accuracy=share) == min(reached)
        return
    best = max(at(theta, scores, cost, correct)[1] for theta in candidates(scores))
    with pytest.raises(ValueError, match=f"out of reach: the best accuracy at any threshold is {best:.6g}"):
        E.fit_threshold(scores, cost, correct=correct, target_accuracy=share)


def test_a_share_that_rounding_puts_above_a_whole_number_is_reached_by_it() -> None:
    assert 0.07 * 100 > 7
    scores, correct = torch.linspace(0, 1, 100)[:, None], torch.zeros(100, 2, dtype=torch.bool)
    correct[:7, 1] = True
    theta = E.fit_threshold(scores, torch.tensor([0.5, 1.0]), correct=correct, target_accuracy=0.07)
    assert theta == float(scores[7]), "the seven smallest scores go on"
    with pytest.raises(ValueError, match="best accuracy at any threshold is 0.07"):
        E.fit_threshold(scores, torch.tensor([0.5, 1.0]), correct=correct, target_accuracy=0.07 + 1e-9)


def test_an_affordable_cost_may_be_met_exactly() -> None:
    scores, cost, _ = draw(1000, 7, seed=3)
    found = E.sweep(scores, cost)
    for index in (0, 10, 2000, len(found.threshold) - 1):
        theta = float(found.threshold[index])
        exact = float(cost[E.first_exit(scores, theta)].mean())
        assert E.fit_threshold(scores, cost, target_cost=exact) == theta


def test_seconds_are_costs_as_well_and_need_not_grow() -> None:
    scores = torch.tensor([[0.9], [0.6], [0.3]], dtype=torch.float64)
    assert E.fit_threshold(scores, torch.tensor([0.002, 0.008]), target_cost=0.0041) == 0.6
    # measured: the way to the end is quicker, so the largest threshold is affordable and small ones are not
    assert E.fit_threshold(scores, torch.tensor([0.008, 0.002]), target_cost=0.0041) == math.inf


def test_the_threshold_of_float32_scores_decides_as_it_was_fitted() -> None:
    scores, cost, correct = draw(200, 3, seed=1)
    scores = scores.float()
    found = E.sweep(scores, cost, correct)
    for theta, mean in zip(found.threshold.tolist(), found.cost.tolist(), strict=True):
        assert mean == pytest.approx(float(cost[E.first_exit(scores, theta)].mean()), rel=1e-12)


def test_infinite_scores_are_scores() -> None:
    scores = torch.tensor([[math.inf, 0.0], [-math.inf, 0.5]])
    found = E.sweep(scores, torch.tensor([0.2, 0.5, 1.0]))
    assert found.threshold.tolist() == [-math.inf, 0.5, math.inf]
    assert found.cost.tolist() == pytest.approx([0.2, 0.35, 0.6]), "nothing but NaN is above +∞: the first sample leaves"


def test_a_million_values_are_swept_within_a_few_seconds() -> None:
    scores, cost, correct = draw(100_000, 10, seed=0)
    begin = time.perf_counter()
    assert len(E.sweep(scores, cost, correct).threshold) > 100_000
    # by running the rule at each candidate it would be hours; measured 0.1 s
    assert time.perf_counter() - begin < 20


GOOD = {"scores": torch.tensor([[0.9, 0.1], [0.3, 0.6]]), "cost": torch.tensor([0.2, 0.5, 1.0])}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of target_cost=None and target_accuracy=None"),
        ({"target_cost": 0.5, "target_accuracy": 0.5}, "not both"),
        ({"target_accuracy": 0.5}, "target_accuracy=0.5 needs correct="),
        ({"target_cost": 0.1}, "target_cost=0.1 is out of reach: the smallest mean cost is 0.2"),
        ({"target_cost": math.nan}, "target_cost=nan is out of reach"),
        (
            {"target_accuracy": 0.6, "correct": torch.zeros(2, 3).bool()},
            "target_accuracy=0.6 is out of reach: the best accuracy at any threshold is 0",
        ),
        ({"target_cost": 0.5, "cost": torch.tensor([0.2, 1.0])}, r"cost of shape \(2,\) must be \(3,\)"),
        (
            {"target_accuracy": 0.5, "correct": torch.zeros(2, 2).bool()},
            r"correct of shape \(2, 2\) must be \(2, 3\): the last exit as well",
        ),
        (
            {"target_cost": 0.5, "scores": torch.zeros(0, 2)},
            r"scores of shape \(0, 2\) must be \(N, K\) with at least one sample",
        ),
        ({"target_cost": 0.5, "scores": torch.zeros(2, 0), "cost": torch.ones(1)}, "one gate"),
        ({"target_cost": 0.5, "scores": torch.zeros(4)}, r"scores of shape \(4,\) must be \(N, K\)"),
        ({"target_cost": 0.5, "scores": torch.tensor([[0.1, 0.2], [math.nan, 0.1]])}, "scores hold NaN in 1 of 2 samples"),
    ],
)
def test_what_cannot_be_met_is_refused_with_what_can(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        E.fit_threshold(**GOOD | arguments)

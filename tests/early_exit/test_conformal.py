"""Conformal sets: ranks by counting, the four variants by loops, and the coverage that is promised."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateplug.early_exit import functional as E
from gateplug.early_exit.conformal import VARIANTS

FAST = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 10**6)
# hundredths, so that (n + 1)(1 − α) can be taken exactly
alphas = st.integers(1, 99)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(n: int, exits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    scores = torch.rand(n, exits, generator=generator(seed), dtype=torch.float64)
    return scores, torch.randint(0, exits, (n,), generator=generator(seed + 1))


def quantile(scores: list[float], percent: int) -> float:
    """The k-th smallest, k = ⌈(n + 1)(1 − α)⌉ in fractions."""
    rank = math.ceil((len(scores) + 1) * (1 - Fraction(percent, 100)))
    return sorted(scores)[rank - 1] if rank <= len(scores) else 1.0


@FAST
@given(n=st.integers(0, 210), percent=alphas, seed=seeds)
def test_the_quantile_has_the_rank_of_exact_arithmetic(n: int, percent: int, seed: int) -> None:
    scores = draw(n, 1, seed)[0][:, 0]
    assert float(E.conformal_quantile(scores, percent / 100)) == quantile(scores.tolist(), percent)


def test_the_rank_that_rounding_would_raise_is_kept() -> None:
    scores = torch.arange(1.0, 100.0)
    assert math.ceil(100 * (1 - 0.45)) == 56, "100 · 0.55 is 55 and comes out above it"
    assert float(E.conformal_quantile(scores, 0.45)) == 55


@pytest.mark.parametrize("n", [0, 1, 18])
def test_too_few_scores_put_every_label_in_the_set(n: int) -> None:
    q = E.conformal_quantile(torch.full((n,), 0.3), 0.05)
    assert float(q) == 1, f"k = ⌈{n + 1} · 0.95⌉ > {n}"
    sets = E.conformal_sets(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]), q[None])
    assert bool(sets.all())


def test_nineteen_scores_are_enough_for_five_percent() -> None:
    assert float(E.conformal_quantile(torch.full((19,), 0.25), 0.05)) == 0.25


@FAST
@given(n=st.integers(0, 90), exits=st.integers(1, 4), percent=alphas, variant=st.sampled_from(VARIANTS), seed=seeds)
def test_thresholds_of_the_variants(n: int, exits: int, percent: int, variant: str, seed: int) -> None:
    scores, left = draw(n, exits, seed)
    want = []
    for at in range(exits):
        everybody = [float(scores[i, at]) for i in range(n)]
        own = [float(scores[i, at]) for i in range(n) if left[i] == at]
        where_it_leaves = [float(scores[i, left[i]]) for i in range(n)]
        few = len(own) <= 20
        pool = {"general": where_it_leaves, "all": everybody, "strict": own, "per_exit": everybody if few else own}[variant]
        want.append(quantile(pool, percent))
    assert E.conformal_thresholds(scores, left, percent / 100, variant).tolist() == want


@pytest.mark.parametrize(("leaving", "own"), [(20, False), (21, True)])
def test_per_exit_trusts_more_than_twenty_samples(leaving: int, own: bool) -> None:
    scores, _ = draw(60, 2)
    left = torch.tensor([0] * leaving + [1] * (60 - leaving))
    q = E.conformal_thresholds(scores, left, 0.2, "per_exit")
    assert float(q[0]) == float(E.conformal_thresholds(scores, left, 0.2, "strict" if own else "all")[0])
    assert float(E.conformal_thresholds(scores, left, 0.2, "strict")[0]) != float(
        E.conformal_thresholds(scores, left, 0.2, "all")[0]
    )


def test_a_set_holds_the_labels_up_to_the_threshold_of_its_own_exit() -> None:
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    sets = E.conformal_sets(probs, torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.75]))
    assert sets.tolist() == [[True, False, False], [True, True, True], [False, False, True]]


@FAST
@given(n=st.integers(0, 40), exits=st.integers(1, 4), classes=st.integers(2, 5), seed=seeds)
def test_coverage_and_size_are_counted(n: int, exits: int, classes: int, seed: int) -> None:
    sets = torch.rand(n, classes, generator=generator(seed)) < 0.6
    labels = torch.randint(0, classes, (n,), generator=generator(seed + 1))
    left = torch.randint(0, exits, (n,), generator=generator(seed + 2))
    seen = E.coverage_and_size(sets, labels, left, exits)
    for at in [*range(exits), None]:
        own = [i for i in range(n) if at is None or left[i] == at]
        covered, size = (seen.overall_coverage, seen.overall_size) if at is None else (seen.coverage[at], seen.size[at])
        if at is not None:
            assert int(seen.samples[at]) == len(own)
        if not own:
            assert covered.isnan()
            assert size.isnan()
            continue
        assert float(covered) == sum(bool(sets[i, labels[i]]) for i in own) / len(own)
        assert float(size) == sum(int(sets[i].sum()) for i in own) / len(own)


def network(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of two exits (N, 2, 3), badly calibrated; sure samples leave at the first. Labels are hard to tell there."""
    labels = torch.randint(0, 3, (n,), generator=generator(seed))
    right = torch.nn.functional.one_hot(labels, 3)[:, None] * torch.tensor([1.0, 2.0])[:, None]
    z = right + torch.randn(n, 2, 3, generator=generator(seed + 1)) * torch.tensor([1.5, 1.0])[:, None]
    probs = (2 * z).softmax(-1)
    return probs, (probs[:, 0].amax(-1) < 0.8).long(), labels


def coverage(variant: str, alpha: float, calibration: int, trials: int = 300) -> tuple[float, list[float]]:
    """Mean over trials of a new calibration each, overall and at each exit."""
    kept, counts = torch.zeros(2), torch.zeros(2)
    for trial in range(trials):
        probs, left, labels = network(calibration + 50, 1000 * trial)
        true = 1 - probs.gather(2, labels[:, None, None].expand(-1, 2, 1))[..., 0]
        q = E.conformal_thresholds(true[:calibration], left[:calibration], alpha, variant)
        p, at, y = probs[calibration:], left[calibration:], labels[calibration:]
        sets = E.conformal_sets(p[torch.arange(50), at], at, q)
        seen = E.coverage_and_size(sets, y, at, 2)
        kept, counts = kept + (seen.coverage * seen.samples).nan_to_num(), counts + seen.samples
    return float(kept.sum() / counts.sum()), (kept / counts).tolist()


@pytest.mark.parametrize(("alpha", "calibration"), [(0.1, 19), (0.2, 19), (0.25, 99)])
def test_general_covers_as_promised_and_hardly_more(alpha: float, calibration: int) -> None:
    # E[coverage] = ⌈(n + 1)(1 − α)⌉ / (n + 1), here 1 − α itself; 300 trials of 50: standard error below 0.007
    overall, _ = coverage("general", alpha, calibration)
    assert overall == pytest.approx(1 - alpha, abs=0.02)


def test_strict_covers_at_each_exit_and_all_does_not() -> None:
    _, strict = coverage("strict", 0.2, 200)
    _, everybody = coverage("all", 0.2, 200)
    # ⌈(n + 1)(1 − α)⌉ / (n + 1) is at most 0.02 above 1 − α for the some 50 and more samples of an exit
    assert min(strict) > 0.785
    assert max(strict) < 0.83
    assert min(everybody) < 0.76, "who leaves at an exit is not like everybody"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: E.conformal_quantile(torch.zeros(3), 0.0), "alpha=0.0 must lie between 0 and 1"),
        (lambda: E.conformal_quantile(torch.zeros(3), 1.0), "alpha=1.0 must lie"),
        (lambda: E.conformal_quantile(torch.zeros(3), math.nan), "alpha=nan must lie"),
        (lambda: E.conformal_quantile(torch.zeros(3, 1), 0.1), r"scores of shape \(3, 1\) must be \(n,\)"),
        (lambda: E.conformal_thresholds(torch.zeros(3, 2), torch.zeros(3).long(), 1.5), "alpha=1.5"),
        (
            lambda: E.conformal_thresholds(torch.zeros(3, 2), torch.zeros(3).long(), 0.1, "each"),
            "variant='each' must be one of 'general', 'all', 'strict', 'per_exit'",
        ),
        (lambda: E.conformal_thresholds(torch.zeros(3), torch.zeros(3).long(), 0.1), r"scores of shape \(3,\) must be \(N, L\)"),
        (lambda: E.conformal_thresholds(torch.zeros(3, 2), torch.zeros(2).long(), 0.1), r"exits of shape \(2,\) must be \(3,\)"),
        (lambda: E.conformal_thresholds(torch.zeros(3, 2), torch.tensor([0, 1, 2]), 0.1), "exits from 0 to 2 must lie in 0 … 1"),
        (lambda: E.conformal_thresholds(torch.zeros(1, 2), torch.tensor([-1]), 0.1), "exits from -1 to -1 must lie in 0 … 1"),
        (
            lambda: E.coverage_and_size(torch.ones(3, 2) > 0, torch.zeros(2).long(), torch.zeros(3).long(), 1),
            r"labels of shape \(2,\)",
        ),
        (
            lambda: E.coverage_and_size(torch.ones(3, 2) > 0, torch.zeros(3).long(), torch.ones(3).long(), 1),
            "exits from 1 to 1 must lie in 0 … 0",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

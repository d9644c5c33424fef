"""Operating points: the threshold that meets a target, among all that make a difference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sweep(NamedTuple):
    """What every threshold that makes a difference comes to, from the smallest to +∞; each (M,) float64."""

    threshold: Tensor
    cost: Tensor
    """Mean over the samples, in the unit of the costs."""
    accuracy: Tensor | None
    """Share of right predictions; None when it was not told what is right."""


def sweep(scores: Tensor, cost: Tensor, correct: Tensor | None = None) -> Sweep:
    """Cost and accuracy at every candidate threshold: the distinct values of m_l = max_{j≤l} s_j, and +∞.

    A sample leaves at #{l : m_l < θ}. So as θ passes a value of m, that sample goes on by one exit: sorting the N·K values and
    cumulating what changes gives all candidates in O(N K log N K).

    Args:
        scores: s (N, K).
        cost: what leaving at each exit costs, (L,), L = K + 1: a share of the network, MACs or seconds.
        correct: whether each exit is right, (N, L) bool.

    Returns:
        The candidates. Cost does not decrease along them if it does not along the exits; accuracy may do anything.

    Raises:
        ValueError: shapes that do not go together, no samples, no gates, a score that is NaN.
    """
    threshold, mean, right = _cumulated(scores, cost, correct)
    return Sweep(threshold, mean, None if right is None else right.to(torch.float64) / len(scores))


def fit_threshold(
    scores: Tensor,
    cost: Tensor,
    *,
    target_cost: float | None = None,
    correct: Tensor | None = None,
    target_accuracy: float | None = None,
) -> float:
    """The threshold that meets one of two targets on validation samples.

    `target_cost`: the largest candidate of :func:`sweep` whose mean cost is within the target, up to 1e-9 of the dearest exit.
    `target_accuracy`: the smallest candidate that reaches it; accuracy need not grow with the threshold, the cheapest wins.

    Args:
        scores: s (N, K).
        cost: (L,); with seconds at each exit, `target_cost` is a mean latency.
        target_cost: mean cost that may be spent.
        correct: (N, L) bool, needed for an accuracy.
        target_accuracy: share of right predictions to reach.

    Raises:
        ValueError: none or both targets, an accuracy without `correct`, a target out of reach (says what is reachable), and as
            :func:`sweep`.
    """
    if (target_cost is None) == (target_accuracy is None):
        raise ValueError(f"give one of target_cost={target_cost} and target_accuracy={target_accuracy}, not both and not none")
    if target_cost is not None:
        threshold, mean, _ = _cumulated(scores, cost, None)
        fits = mean <= target_cost + 1e-9 * float(cost.max())
        if not bool(fits.any()):
            raise ValueError(f"target_cost={target_cost} is out of reach: the smallest mean cost is {float(mean.min()):.6g}")
        return float(threshold[fits.nonzero().max()])
    if correct is None:
        raise ValueError(f"target_accuracy={target_accuracy} needs correct=, whether each exit is right on each sample, (N, L)")
    threshold, _, right = _cumulated(scores, cost, correct)
    assert right is not None
    assert target_accuracy is not None
    # in float64: a whole number against a Python float is compared in float32
    reaches = right.to(torch.float64) >= target_accuracy * len(scores) - 1e-9
    if not bool(reaches.any()):
        best = int(right.max()) / len(scores)
        raise ValueError(f"target_accuracy={target_accuracy} is out of reach: the best accuracy at any threshold is {best:.6g}")
    return float(threshold[reaches.nonzero().min()])


@torch.no_grad()
def _cumulated(scores: Tensor, cost: Tensor, correct: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Candidates and their mean cost, float64, and how many samples are right, int64; each (M,)."""
    _check(scores, cost, correct)
    samples, gates = scores.shape
    m, order = scores.to(torch.float64).cummax(1).values.flatten().sort()
    # a candidate is passed by the values before the first that is equal to it
    passed = torch.cat([m.new_ones(1, dtype=torch.bool), m[1:] > m[:-1]]).nonzero()[:, 0]
    values = m[passed]
    if values[-1] < torch.inf:
        values = torch.cat([values, values.new_full((1,), torch.inf)])
        passed = torch.cat([passed, passed.new_full((1,), len(m))])
    cost = cost.to(m)
    # what was added by the first `passed` of the sorted values
    added = torch.cat([m.new_zeros(1), cost.diff()[order % gates].cumsum(0)])[passed]
    mean = cost[0] + added / samples
    if correct is None:
        return values, mean, None
    right = correct.to(device=m.device, dtype=torch.int64)
    # whole numbers: a share reached exactly must count as reached
    gained = torch.cat([passed.new_zeros(1), right.diff(dim=1).flatten()[order].cumsum(0)])[passed]
    return values, mean, right[:, 0].sum() + gained


def _check(scores: Tensor, cost: Tensor, correct: Tensor | None) -> None:
    if scores.dim() != 2 or not scores.numel():
        raise ValueError(f"scores of shape {tuple(scores.shape)} must be (N, K) with at least one sample and one gate")
    if bool(scores.isnan().any()):
        raise ValueError(
            f"scores hold NaN in {int(scores.isnan().any(1).sum())} of {len(scores)} samples: no threshold means anything"
        )
    exits = scores.shape[1] + 1
    if cost.shape != (exits,):
        raise ValueError(f"cost of shape {tuple(cost.shape)} must be ({exits},): one for each gate's exit and one for the last")
    if correct is not None and correct.shape != (len(scores), exits):
        raise ValueError(f"correct of shape {tuple(correct.shape)} must be ({len(scores)}, {exits}): the last exit as well")

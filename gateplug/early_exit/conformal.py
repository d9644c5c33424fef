"""Sets of labels that hold the true one with a chosen probability (split conformal prediction, LAC: arXiv 1609.00451)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

VARIANTS = ("general", "all", "strict", "per_exit")


class SetQuality(NamedTuple):
    """How often sets hold the true label, and how many labels they hold; NaN where there are no samples."""

    coverage: Tensor
    """Share of covered samples at each exit, (L,) float64."""
    size: Tensor
    """Mean number of labels in a set at each exit, (L,) float64."""
    samples: Tensor
    """How many left at each exit, (L,) int64."""
    overall_coverage: Tensor
    """Share of all samples, a float64 scalar."""
    overall_size: Tensor
    """Mean over all samples, a float64 scalar."""


def conformal_quantile(scores: Tensor, alpha: float) -> Tensor:
    """The k-th smallest score, k = ⌈(n + 1)(1 − α)⌉, or 1 where k > n: then every label is in every set.

    Args:
        scores: 1 − p of the true label of calibration samples, (n,).
        alpha: chance of a miss, in (0, 1).

    Returns:
        A scalar of the scores' dtype; 1 of no scores.

    Raises:
        ValueError: alpha outside (0, 1), scores of another shape.
    """
    check_alpha(alpha)
    if scores.dim() != 1:
        raise ValueError(f"scores of shape {tuple(scores.shape)} must be (n,)")
    n = len(scores)
    # (n + 1)(1 − α) that should be whole may come out just above: 1e-9 keeps it from being the next rank
    rank = max(math.ceil((n + 1) * (1 - alpha) - 1e-9), 1)
    return scores.kthvalue(rank).values if rank <= n else scores.new_ones(())


def conformal_thresholds(scores: Tensor, exits: Tensor, alpha: float, variant: str = "per_exit") -> Tensor:
    """q_l of each exit, from calibration samples.

    `general`: one q, of each sample's score where it leaves; `all`: q_l of all samples, scored at exit l; `strict`: q_l of those
    that leave at l; `per_exit`: `strict` where more than 20 leave, else `all`. Coverage 1 − α is guaranteed on average for
    `general`, at each exit for `strict`; not for `all`, since who leaves at l is not like everybody.

    Args:
        scores: 1 − p of the true label at each exit, (N, L).
        exits: where each sample leaves, (N,) int64 in 0 … L − 1.
        alpha: chance of a miss, in (0, 1).
        variant: one of the four.

    Returns:
        (L,) of the scores' dtype.

    Raises:
        ValueError: an unknown variant, alpha outside (0, 1), shapes or exits that do not go together.
    """
    check_variant(variant)
    check_alpha(alpha)
    if scores.dim() != 2:
        raise ValueError(f"scores of shape {tuple(scores.shape)} must be (N, L): one for each sample and exit")
    check_exits(exits, scores.shape)
    if variant == "general":
        return conformal_quantile(scores.gather(1, exits[:, None])[:, 0], alpha).repeat(scores.shape[1])
    chosen = []
    for exit_, column in enumerate(scores.unbind(1)):
        own = column[exits == exit_]
        use_all = variant == "all" or (variant == "per_exit" and len(own) <= 20)
        chosen.append(conformal_quantile(column if use_all else own, alpha))
    return torch.stack(chosen)


def conformal_sets(probs: Tensor, exits: Tensor, thresholds: Tensor) -> Tensor:
    """Labels with 1 − p ≤ q of the exit where a sample leaves.

    Args:
        probs: p at each sample's own exit, (N, C).
        exits: (N,) int64.
        thresholds: q (L,).

    Returns:
        (N, C) bool.
    """
    return 1 - probs <= thresholds.to(probs.device)[exits][:, None]


def coverage_and_size(sets: Tensor, labels: Tensor, exits: Tensor, num_exits: int) -> SetQuality:
    """Coverage and mean size of sets, at each exit and overall.

    Args:
        sets: (N, C) bool.
        labels: the true ones, (N,) int64.
        exits: where each sample left, (N,) int64 in 0 … num_exits − 1.
        num_exits: L.

    Raises:
        ValueError: shapes or exits that do not go together.
    """
    if labels.shape != sets.shape[:1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not go with sets of shape {tuple(sets.shape)}: one a sample")
    return quality(sets.gather(1, labels[:, None])[:, 0], sets.sum(1), exits, num_exits)


def quality(covered: Tensor, size: Tensor, exits: Tensor, num_exits: int) -> SetQuality:
    """As :func:`coverage_and_size`, of what is known of each set: whether it covers (N,) and how many labels it holds (N,)."""
    check_exits(exits, (len(covered), num_exits))
    # whole numbers until the division: in any order of the samples the same
    at = torch.nn.functional.one_hot(exits, num_exits) if len(exits) else exits.new_zeros(0, num_exits)
    count, hits, labels = at.sum(0), (at * covered[:, None]).sum(0), (at * size[:, None]).sum(0)
    each = [part.to(torch.float64) for part in (hits, labels)]
    total = [part.sum() / count.sum() for part in each]
    return SetQuality(each[0] / count, each[1] / count, count, total[0], total[1])


def check_alpha(alpha: float) -> None:
    """Raise ValueError for an alpha outside (0, 1)."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1: the chance that a set misses the true label")


def check_variant(variant: str) -> None:
    """Raise ValueError for an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} must be one of {', '.join(map(repr, VARIANTS))}")


def check_exits(exits: Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """Raise ValueError for exits that are not (N,) whole numbers below L, for `shape` (N, L)."""
    if exits.shape != shape[:1]:
        raise ValueError(f"exits of shape {tuple(exits.shape)} must be ({shape[0]},): where each sample leaves")
    if len(exits) and not 0 <= int(exits.min()) <= int(exits.max()) < shape[1]:
        raise ValueError(f"exits from {int(exits.min())} to {int(exits.max())} must lie in 0 … {shape[1] - 1}")

"""How far confidence is from accuracy: the expected calibration error and the bars of a reliability diagram."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gateplug.core.errors import whole_numbers

BINNINGS = ("quantile", "width")


class Reliability(NamedTuple):
    """Bins of a reliability diagram, each (bins,); a bin of no samples has mean NaN."""

    confidence: Tensor
    """Mean confidence, float64."""
    accuracy: Tensor
    """Share of right predictions, float64."""
    samples: Tensor
    """How many, int64."""


def check_binning(bins: int, binning: str) -> None:
    """Raise TypeError or ValueError for bins that cannot be made."""
    whole_numbers(bins=bins)
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    if binning not in BINNINGS:
        raise ValueError(f"binning={binning!r} must be one of {', '.join(map(repr, BINNINGS))}")


def bin_edges(confidence: Tensor, bins: int = 15, binning: str = "quantile") -> Tensor:
    """Edges of the bins.

    `width`: i / bins. `quantile`: the i / bins quantiles of the confidences, interpolated linearly; they repeat where many are
    equal, and are NaN where there are none.

    Args:
        confidence: (N,).
        bins: at least 1.
        binning: `quantile` or `width`.

    Returns:
        (bins + 1,) float64, non-decreasing.

    Raises:
        ValueError: bins < 1, an unknown binning.
    """
    check_binning(bins, binning)
    steps = torch.arange(bins + 1, device=confidence.device)
    if binning == "width":
        return steps.to(torch.float64) / bins
    values = confidence.detach().to(torch.float64).clamp(0, 1).sort().values
    if not len(values):
        return torch.full((bins + 1,), torch.nan, dtype=torch.float64, device=confidence.device)
    # place i (N − 1) / bins in whole numbers: a quantile that is a sample is that sample, to the bit. torch.quantile rounds
    # there, and takes no more than 2^24 values
    place = steps * (len(values) - 1)
    low = place // bins
    part = (place % bins).to(torch.float64) / bins
    below, above = values[low], values[(low + 1).clamp_max(len(values) - 1)]
    return torch.where(above > below, below + part * (above - below), below)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15, binning: str = "quantile") -> Tensor:
    """ECE = Σ_bins abs(Σ confidence − Σ correct) / N (arXiv 1706.04599, eq. 3), over all samples at once.

    A confidence that lies on an edge belongs to the lower bin; one slightly above 1, as float32 has, counts as 1. The error of a
    part of the samples, averaged over parts, is another number and mostly noise.

    Args:
        confidence: (N,), in [0, 1].
        correct: (N,) bool.
        bins: at least 1.
        binning: `quantile` (as many samples in each) or `width` (as wide each).

    Returns:
        A float64 scalar in [0, 1]; NaN of no samples.

    Raises:
        ValueError: two shapes, bins < 1, an unknown binning.
    """
    confident, right, _ = _sums(confidence, correct, bins, binning)
    # 0/0 is the NaN of no samples
    return (confident - right).abs().sum() / len(confidence)


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15, binning: str = "quantile") -> Reliability:
    """Mean confidence, accuracy and number of samples of each bin; arguments and errors as of :func:`calibration_error`."""
    confident, right, count = _sums(confidence, correct, bins, binning)
    return Reliability(confident / count, right / count, count)


def _sums(confidence: Tensor, correct: Tensor, bins: int, binning: str) -> tuple[Tensor, Tensor, Tensor]:
    """Σ confidence, Σ correct and the number of samples of each bin, (bins,)."""
    if confidence.dim() != 1 or confidence.shape != correct.shape:
        given = f"confidence of shape {tuple(confidence.shape)} and correct of shape {tuple(correct.shape)}"
        raise ValueError(f"{given} must both be (N,), one number a sample")
    edges = bin_edges(confidence, bins, binning)
    value = confidence.detach().to(torch.float64).clamp(0, 1)
    index = torch.bucketize(value, edges[1:-1])
    zeros = torch.zeros(bins, dtype=torch.float64, device=value.device)
    confident = zeros.index_add(0, index, value)
    right = zeros.index_add(0, index, correct.to(torch.float64))
    return confident, right, zeros.to(torch.int64).index_add(0, index, torch.ones_like(index))

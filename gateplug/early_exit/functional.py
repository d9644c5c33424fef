"""Formulas of JEI-DNN (arXiv 2310.09163): what a gate sees, where a sample leaves, what gates and exits are trained on.

B samples, L exits of which the last is the network's own head, K = L − 1 gates, C classes. Calibration, conformal sets and the
choice of a threshold are in :mod:`gateplug.early_exit.calibration`, `.conformal` and `.thresholds`; their names are here as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gateplug.early_exit.calibration import Reliability, bin_edges, calibration_error, reliability
from gateplug.early_exit.conformal import (
    SetQuality,
    conformal_quantile,
    conformal_sets,
    conformal_thresholds,
    coverage_and_size,
)
from gateplug.early_exit.losses import gate_loss, gate_pos_weight, gate_targets, inference_loss, phase_at, warmup_loss
from gateplug.early_exit.thresholds import Sweep, fit_threshold, sweep

__all__ = [
    "FEATURES",
    "MODES",
    "Reliability",
    "SetQuality",
    "Sweep",
    "best_exit",
    "bin_edges",
    "calibration_error",
    "confidence_scores",
    "conformal_quantile",
    "conformal_sets",
    "conformal_thresholds",
    "coverage_and_size",
    "entropy_scores",
    "exit_probabilities",
    "exit_scores",
    "first_exit",
    "fit_threshold",
    "gate_loss",
    "gate_pos_weight",
    "gate_targets",
    "inference_loss",
    "patience_scores",
    "phase_at",
    "reliability",
    "score_at",
    "sweep",
    "uncertainty_features",
    "warmup_loss",
]

FEATURES = ("confidence", "entropy", "margin", "sharp_entropy")
"""Names of the columns of :func:`uncertainty_features`, in their order."""
MODES = ("official", "cdf", "hazard")
"""How the gates of a sample become a decision; see :func:`exit_scores`."""


@torch.no_grad()
def uncertainty_features(logits: Tensor) -> Tensor:
    """Gate features u = [p_max, H(p), p_(1) − p_(2), H(q)] with p = softmax(z), q = p² / Σ p².

    H(p) = −Σ p ln p in nats, 0 ln 0 = 0.

    Args:
        logits: z (…, C).

    Returns:
        (…, 4), detached, in float32 or wider; the columns are :data:`FEATURES`.

    Raises:
        ValueError: C < 2.
    """
    _check_classes(logits)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # few operations, for p and q = softmax(2 z) at once: in a runner each costs more than its arithmetic
    both = torch.stack([z, 2 * z]).softmax(-1)
    first, second = both[0].topk(2, -1).values.unbind(-1)
    entropy, sharp = torch.special.entr(both).sum(-1)
    return torch.stack([first, entropy, first - second, sharp], -1)


def exit_probabilities(gates: Tensor, mode: str = "official") -> Tensor:
    """P, the share of a sample that leaves at each exit; sums to 1.

    `official` and `cdf`: P_l = min(g_l, S_l) with S_l = max(0, 1 − Σ_{j<l} g_j), and P_K = S_K.
    `hazard`: P_l = g_l Π_{j<l} (1 − g_j), and P_K = Π_j (1 − g_j).

    Args:
        gates: g (B, K), in [0, 1].
        mode: one of :data:`MODES`.

    Returns:
        (B, K + 1).

    Raises:
        ValueError: an unknown mode.
    """
    _check_mode(mode)
    ones = gates.new_ones(*gates.shape[:-1], 1)
    if mode == "hazard":
        left = torch.cat([ones, (1 - gates).cumprod(-1)], -1)
        return torch.cat([gates, ones], -1) * left
    left = torch.cat([ones, (1 - gates.cumsum(-1)).clamp_min(0)], -1)
    return torch.cat([torch.minimum(gates, left[..., :-1]), left[..., -1:]], -1)


def exit_scores(gates: Tensor, mode: str = "official") -> Tensor:
    """Scores s_l of the rule "leave at the first l with s_l ≥ threshold".

    `official`: P_l / S_l, and 1 where S_l = 0; `cdf`: Σ_{j≤l} P_j; `hazard`: g_l, read as it is trained.

    Args:
        gates: g (B, K), in [0, 1].
        mode: one of :data:`MODES`.

    Returns:
        (B, K), in [0, 1].

    Raises:
        ValueError: an unknown mode.
    """
    _check_mode(mode)
    taken, scores = gates.new_zeros(gates.shape[:-1]), []
    for gate in gates.unbind(-1):
        scores.append(score_at(gate, taken, mode))
        taken = taken + gate
    return torch.stack(scores, -1) if scores else gates.clone()


def score_at(gate: Tensor, taken: Tensor, mode: str = "official") -> Tensor:
    """One column of :func:`exit_scores`, to the bit, for a run that knows the gates up to here only.

    Args:
        gate: g_l (B,).
        taken: Σ_{j<l} g_j (B,), added up in order.
        mode: one of :data:`MODES`.

    Returns:
        s_l (B,).

    Raises:
        ValueError: an unknown mode.
    """
    _check_mode(mode)
    if mode == "hazard":
        return gate
    if mode == "cdf":
        # Σ_{j≤l} P_j is the sum of the gates until that reaches 1
        return (taken + gate).clamp_max(1)
    left = (1 - taken).clamp_min(0)
    # after a sure exit nothing is left to divide by: leave, there as well
    return torch.where(gate >= left, 1.0, gate / left.clamp_min(1e-18))


def confidence_scores(logits: Tensor) -> Tensor:
    """p_max of each exit: (B, K, C) to (B, K). Raises ValueError for C < 2."""
    return _log_probabilities(logits).amax(-1).exp()


def entropy_scores(logits: Tensor) -> Tensor:
    """−H(p) of each exit in nats: (B, K, C) to (B, K); a threshold of −h leaves at H ≤ h. Raises ValueError for C < 2."""
    return -_entropy(_log_probabilities(logits))


def patience_scores(logits: Tensor) -> Tensor:
    """How many exits before this one, without a break, predicted what it predicts (PABEE, arXiv 2006.04152).

    s_0 = 0, s_l = s_{l−1} + 1 where argmax z_l = argmax z_{l−1}, else 0.

    Args:
        logits: z (B, K, C), without the last exit.

    Returns:
        (B, K) floating whole numbers.

    Raises:
        ValueError: C < 2.
    """
    _check_classes(logits)
    guess = logits.argmax(-1)
    count = torch.zeros_like(guess)
    for exit_ in range(1, guess.shape[-1]):
        count[..., exit_] = (count[..., exit_ - 1] + 1) * (guess[..., exit_] == guess[..., exit_ - 1])
    return count.to(torch.promote_types(logits.dtype, torch.float32))


def first_exit(scores: Tensor, threshold: float) -> Tensor:
    """The first l with s_l ≥ threshold, else K: (B, K) to (B,) int64. A score that is NaN lets nobody leave."""
    return (~(scores >= threshold)).cumprod(-1).sum(-1)


@torch.no_grad()
def best_exit(ce: Tensor, cost: Tensor, cost_weight: float) -> Tensor:
    """l* = argmin_l ce_l + λ c_l over all L exits, the earliest of equals.

    Args:
        ce: cross-entropy of each exit (B, L), nats.
        cost: c (L,), cumulative, 1 for the whole network.
        cost_weight: λ ≥ 0: how many nats the whole network is worth.

    Returns:
        (B,) int64.

    Raises:
        ValueError: λ that is negative or not finite, costs that are not (L,).
    """
    if not 0 <= cost_weight < math.inf:
        raise ValueError(f"cost_weight={cost_weight} must be a finite number ≥ 0: the nats that the whole network is worth")
    if cost.shape != ce.shape[-1:]:
        raise ValueError(f"cost of shape {tuple(cost.shape)} must be one number for each of the {ce.shape[-1]} exits of ce")
    return (ce + cost_weight * cost.to(ce.device)).argmin(-1)


def _log_probabilities(logits: Tensor) -> Tensor:
    _check_classes(logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(-1)


def _check_classes(logits: Tensor) -> None:
    if logits.dim() < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)} must be (…, C) with C ≥ 2 classes: one class leaves no doubt")


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(map(repr, MODES))}")

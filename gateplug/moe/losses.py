"""Regularisers and statistics of routing, for one layer; sums over layers are the caller's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gateplug.moe.rows import counted_rows


def load_balance(probs: Tensor, assigned: Tensor, mask: Tensor | None = None) -> Tensor:
    """E Σ_e f_e P_e: 1 at balance, E at collapse for k = 1 (arXiv 2101.03961, eqs. 4 to 6, with f a share of all choices).

    Args:
        probs: (T, E), P_e is their mean over the tokens.
        assigned: (T, k) int64, f_e is the share of the choices that fell on e; no gradient.
        mask: (T,) bool, False for tokens that do not count; none counting gives 0.
    """
    experts, probs = probs.shape[-1], counted_rows(probs, mask)
    row = _share(probs, mask)
    with torch.no_grad():
        each = row[:, None].expand(assigned.shape) / assigned.shape[-1]
        f = torch.zeros(experts, dtype=probs.dtype, device=probs.device).scatter_add_(0, assigned.flatten(), each.flatten())
    return experts * ((probs @ f) @ row)


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)² (arXiv 2202.08906, eq. 5): (T, E) to a scalar; 0 where no token counts."""
    return counted_rows(logits, mask).logsumexp(-1).square() @ _share(logits, mask)


def importance(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV² of Σ_t q_te over the experts: population variance / (mean² + 1e-10) (arXiv 1701.06538, eqs. 6 and 7).

    Args:
        weights: q (T, E).
        mask: (T,) bool; no token counting gives 0.
    """
    received = counted_rows(weights, mask).sum(0)
    return received.var(correction=0) / (received.mean().square() + 1e-10)


def router_entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of H(softmax(logits)), natural logarithm: (T, E) to a scalar; 0 where no token counts."""
    log_p = counted_rows(logits, mask).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) @ _share(logits, mask)


def _share(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(T,): the weight of each token in a mean over those that count."""
    if mask is None:
        return torch.full((len(rows),), 1 / max(len(rows), 1), dtype=rows.dtype, device=rows.device)
    return mask.to(rows.dtype) / mask.sum().clamp_min(1)


def bias_step(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """b_e + rate · sign(mean(load) − load_e) (arXiv 2408.15664, algorithm 1): (E,), (E,) to (E,)."""
    load = load.to(bias.dtype)
    return bias + rate * (load.mean() - load).sign()


def load_statistics(load: Tensor) -> dict[str, Tensor]:
    """How evenly a load is spread.

    Args:
        load: (E,), ≥ 0, any scale.

    Returns:
        Scalars: `cv` population standard deviation / mean; `max_violation` (max − mean) / mean; `entropy` H(load / Σ) / ln E,
        1 at balance, also of a single expert; `dead` number of experts with load 0 (int64). A load of zeros gives 0, 0, 0 and E.
    """
    load = load if load.is_floating_point() else load.to(torch.float32)
    mean, total = load.mean(), load.sum()
    some = total > 0
    safe = torch.where(some, mean, torch.ones_like(mean))
    p = load / torch.where(some, total, torch.ones_like(total))
    entropy = torch.special.entr(p).sum() / math.log(len(load)) if len(load) > 1 else some.to(load.dtype)
    violation = torch.where(some, (load.max() - mean) / safe, torch.zeros_like(mean))
    return {
        "cv": load.std(correction=0) / safe,
        "max_violation": violation,
        "entropy": entropy,
        "dead": (load == 0).sum(),
    }


def selection_overlap(selected: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean Jaccard overlap of the selected sets, for pairs i < j within one group and between groups.

    Args:
        selected: (n, E) bool.
        groups: (n,) int64.

    Returns:
        (within, between); two empty sets overlap by 0; NaN where there is no pair of a kind.
    """
    s = selected.to(torch.float64)
    both = s @ s.T
    size = s.sum(-1)
    union = size[:, None] + size[None] - both
    overlap = torch.where(union > 0, both / union.clamp_min(1), torch.zeros_like(both))
    upper = torch.ones_like(overlap, dtype=torch.bool).triu(1)
    same = groups[:, None] == groups[None]
    return overlap[upper & same].mean(), overlap[upper & ~same].mean()

"""The terms of one router that are sums over its rows, and their gradient, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gateplug.moe.rows import at_least_float32, counted_rows


@dataclass(frozen=True)
class Weights:
    """Factors of the terms."""

    load_balance: float = 0.0
    z_loss: float = 0.0
    importance: float = 0.0
    entropy: float = 0.0
    smooth_load: float = 0.0

    def named(self) -> dict[str, float]:
        """Those that are not zero."""
        return {name: value for name, value in vars(self).items() if value}


def row_shares(rows: int, mask: Tensor | None, share: Tensor) -> Tensor:
    """(T,): `share` for the rows that count, 0 for padding."""
    return (share if mask is None else mask * share).expand(rows)


def logit_terms(
    x: Tensor, f: Tensor, mask: Tensor | None, share: Tensor, weights: Weights, logits: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Load balance, z-loss and entropy of a router, and the gradient of their weighted sum, in closed form.

    load_balance = E Σ_e f_e P_e, z_loss = mean logsumexp², entropy = mean H(p); sums over rows times `share`.

    Args:
        x: (T, E) logits, or p itself.
        f: (E,) share of the choices that fell on each expert, a constant.
        mask: (T,) bool.
        share: 1 / rows that count (processes / rows of all of them, for sums over all).
        weights: factors.
        logits: whether `x` are logits.

    Returns:
        The terms without factors, and the gradient (T, E) of the weighted sum with respect to `x`, None where there is no term.
    """
    x = counted_rows(at_least_float32(x), mask)
    row = row_shares(len(x), mask, share).to(x.dtype)
    g = f.to(x.dtype) * x.shape[-1]
    found: dict[str, Tensor] = {}
    if logits:
        log_sum = x.logsumexp(-1)
        log_p = x - log_sum[:, None]
        p = log_p.exp()
    else:
        p, log_sum, log_p = x, x.sum(-1), x.clamp_min(1e-20).log()
    column = torch.zeros_like(log_sum)  # what is added to the slope in all columns of a row
    slope: Tensor | float = 0.0
    if weights.load_balance:
        balance = p @ g
        found["load_balance"] = balance @ row
        slope = weights.load_balance * g
        column = column - weights.load_balance * balance
    if weights.entropy:
        h = -(p * log_p).sum(-1)
        found["entropy"] = h @ row
        slope = slope - weights.entropy * (log_p if logits else log_p + 1)
        column = column - weights.entropy * h
    if weights.z_loss and logits:
        found["z_loss"] = log_sum.square() @ row
        column = column + (2 * weights.z_loss) * log_sum
    if not found:
        return found, None
    return found, (p * (slope + column[:, None]) * row[:, None] if logits else (slope * row[:, None]).expand_as(x))

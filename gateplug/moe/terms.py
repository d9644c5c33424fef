"""The terms of one router that are sums over its rows, and their gradient, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gateplug.core.objective import Value
from gateplug.moe.rows import at_least_float32


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


def logit_terms(
    x: Tensor, f: Tensor, share: Tensor | float, mask: Tensor | None, weights: Weights, logits: bool
) -> tuple[dict[str, Value], Tensor | None]:
    """Load balance, z-loss and entropy of a router, and the gradient of their weighted sum, in closed form.

    load_balance = E Σ_e f_e P_e, z_loss = mean logsumexp², entropy = mean H(p). Few operations, on rows side by side: for the few
    experts of a router an operation costs more than its arithmetic, and one along the experts three times that along the rows.

    Args:
        x: (T, E) logits, or p itself.
        f: (E,) share of the choices that fell on each expert, a constant.
        share: part of each row in the means, (T,) or the same for all: 1 / rows that count, 0 for padding; processes / rows of
            all of them where the means are over all.
        mask: (T,) bool, False for padding, in which anything may stand, NaN as well.
        weights: factors.
        logits: whether `x` are logits.

    Returns:
        The terms without factors, computed when they are called for, and the gradient (T, E) of the weighted sum with respect to
        `x`, None where there is no term.
    """
    x = at_least_float32(x).t().contiguous()  # (E, T)
    x = x if mask is None else torch.where(mask, x, 0.0)
    if logits:
        log_sum = x.logsumexp(0)
        log_p = x - log_sum
        p = log_p.exp()
    else:
        p, log_sum, log_p = x, x.sum(0), x.clamp_min(1e-20).log()
    found: dict[str, Value] = {}
    scale = 1.0 if isinstance(share, Tensor) else share
    slope: Tensor | float = 0.0
    column: Tensor | float = 0.0  # what is taken from the slope at all experts of a row
    if weights.z_loss and logits:
        found["z_loss"] = lambda: _mean(log_sum.square(), share)
        column = log_sum * (-2 * weights.z_loss * scale)
    if weights.load_balance:
        g = f.to(x.dtype) * len(x)
        found["load_balance"] = lambda: _mean(g @ p, share)
        down = g * (weights.load_balance * scale)
        slope = down[:, None]
        column = torch.addmv(column, p.t(), down) if isinstance(column, Tensor) else down @ p
    if weights.entropy:
        h = -(p * log_p).sum(0)
        found["entropy"] = lambda: _mean(h, share)
        slope = slope - (weights.entropy * scale) * (log_p if logits else log_p + 1)
        column = column + (weights.entropy * scale) * h
    if not found:
        return found, None
    gradient = p * (slope - column) if logits else torch.as_tensor(slope).expand_as(x)
    return found, (gradient * share if isinstance(share, Tensor) else gradient).t()


def _mean(rows: Tensor, share: Tensor | float) -> Tensor:
    return rows @ share.to(rows.dtype) if isinstance(share, Tensor) else rows.sum() * share

"""What gates and exits are trained on, and when (JEI-DNN, arXiv 2310.09163, sections 4 and 5)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

WEIGHTINGS = ("exit_prob", "uniform")


def gate_targets(best: Tensor, num_gates: int) -> Tensor:
    """T_l = 1 where l ≥ l*: (B,) int64 to (B, num_gates), 0 and 1 in the default dtype."""
    return (torch.arange(num_gates, device=best.device) >= best[:, None]).to(torch.get_default_dtype())


def gate_pos_weight(best: Tensor, num_gates: int, cumulative: bool = False) -> Tensor:
    """w_l = min((N − m) / m, 5) with m = max(n_l, 0.1); 1 where there are no samples.

    Args:
        best: l* of N validation samples (N,).
        num_gates: K.
        cumulative: n_l counts the samples with l* ≤ l, which are the positives of gate l; else those with l* = l, as the
            official code does.

    Returns:
        (K,) float64.
    """
    gates = torch.arange(num_gates, device=best.device)
    if not len(best):
        return torch.ones(num_gates, dtype=torch.float64, device=best.device)
    hits = best[:, None] <= gates if cumulative else best[:, None] == gates
    m = hits.sum(0).to(torch.float64).clamp_min(0.1)
    return ((len(best) - m) / m).clamp_max(5)


def gate_loss(gate_logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Mean over samples and gates of w_l T softplus(−a) + (1 − T) softplus(a); 0 of no samples.

    Args:
        gate_logits: a (B, K), takes the gradient.
        targets: T (B, K), 0 or 1.
        pos_weight: w (K,); 1 when absent.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        ValueError: targets of another shape, weights that are not (K,).
    """
    if targets.shape != gate_logits.shape:
        given = f"targets of shape {tuple(targets.shape)} and gate_logits of shape {tuple(gate_logits.shape)}"
        raise ValueError(f"{given} must both be (B, K)")
    if pos_weight is not None and pos_weight.shape != gate_logits.shape[-1:]:
        raise ValueError(
            f"pos_weight of shape {tuple(pos_weight.shape)} must be one number for each of {gate_logits.shape[-1]} gates"
        )
    a = _wide(gate_logits)
    total = torch.nn.functional.binary_cross_entropy_with_logits(
        a, targets.to(a), pos_weight=None if pos_weight is None else pos_weight.to(a), reduction="sum"
    )
    return total / max(a.numel(), 1)


def inference_loss(ce: Tensor, exit_prob: Tensor, weighting: str = "exit_prob") -> Tensor:
    """Mean over samples and gated exits of the cross-entropy, weighted by where a sample is likely to leave.

    `exit_prob`: weight P_l r with r = Σ_l ce_l / Σ_l P_l ce_l, a constant: a sample keeps its total loss, and the exits where it
    leaves take the larger part of its gradient. A sample whose Σ_l P_l ce_l is 0 has weight 1 everywhere. `uniform`: weight 1;
    this is what the official code comes to, for it differentiates r as well.

    Args:
        ce: (B, K), without the last exit; takes the gradient.
        exit_prob: P (B, K), without the last exit; a constant.
        weighting: `exit_prob` or `uniform`.

    Returns:
        A scalar, in float32 or wider; 0 of no samples.

    Raises:
        ValueError: an unknown weighting, two shapes.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r} must be one of {', '.join(map(repr, WEIGHTINGS))}")
    if ce.shape != exit_prob.shape:
        given = f"ce of shape {tuple(ce.shape)} and exit_prob of shape {tuple(exit_prob.shape)}"
        raise ValueError(f"{given} must both be (B, K), without the last exit")
    ce = _wide(ce)
    weighted = ce if weighting == "uniform" else ce * _weights(ce.detach(), exit_prob.detach().to(ce))
    return weighted.sum() / max(ce.numel(), 1)


def _weights(ce: Tensor, p: Tensor) -> Tensor:
    # the scale of P cancels in P r; without it a row of tiny P would make r infinite and 0 · r NaN
    p = p / p.amax(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny) if p.numel() else p
    expected = (p * ce).sum(-1, keepdim=True)
    kept = expected > 0
    return torch.where(kept, p * (ce.sum(-1, keepdim=True) / expected.masked_fill(~kept, 1)), torch.ones_like(p))


def warmup_loss(ce: Tensor) -> Tensor:
    """Σ_l ω_l mean_b(ce_bl) with ω_K = 1 and ω_l = K + 1 − l before: the earlier an exit, the more it weighs.

    Args:
        ce: (B, L), the last exit with them; takes the gradient.

    Returns:
        A scalar, in float32 or wider; 0 of no samples.
    """
    ce = _wide(ce)
    exits = ce.shape[-1]
    weight = torch.arange(exits, 0, -1, dtype=ce.dtype, device=ce.device)
    return (ce.sum(0) / max(len(ce), 1)) @ weight


def phase_at(batch: int, every: int) -> Literal["gate", "inference"]:
    """Who trains at batch `batch` of an epoch: `gate` for the first `every` batches, `inference` for the next, in turns.

    Raises:
        ValueError: batch < 0 or every < 1.
    """
    if batch < 0 or every < 1:
        raise ValueError(f"batch={batch} must be at least 0 and every={every} at least 1, both in batches")
    return "inference" if batch // every % 2 else "gate"


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

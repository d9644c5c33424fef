"""Formulas of the gates: DSelect-k (arXiv 2106.03760), top-k with and without noise (1701.06538), expert choice (2202.09368).

What comes after a choice is in :mod:`gateplug.moe.dispatch`, what regularises it in :mod:`gateplug.moe.losses`; their names are
here as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gateplug.moe.dispatch import apply_capacity, expert_capacity, expert_mlp, grouped_linear, sorted_pairs
from gateplug.moe.losses import bias_step, importance, load_balance, load_statistics, router_entropy, selection_overlap, z_loss

__all__ = [
    "apply_capacity",
    "bias_step",
    "dselect_k",
    "expert_capacity",
    "expert_choice",
    "expert_mlp",
    "grouped_linear",
    "hard_selection",
    "importance",
    "load_balance",
    "load_statistics",
    "noisy_load",
    "noisy_logits",
    "reachability",
    "router_entropy",
    "selection_overlap",
    "selector_codes",
    "selector_entropy",
    "smooth_step",
    "sorted_pairs",
    "top_k_weights",
    "z_loss",
]


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    """S(t) = 0 up to -γ/2, 1 from γ/2 on, −2 t³/γ³ + 3 t/(2γ) + 1/2 between; its slope is zero outside.

    Args:
        t: any shape.
        gamma: γ > 0, the width of the step.

    Raises:
        ValueError: gamma ≤ 0.
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma={gamma} must be a finite number > 0: the width over which the step rises")
    # u in [-1/2, 1/2]: at the clamped ends the sum is 0 or 1 and its slope 0, exactly, in floating point as well; an expert of
    # weight zero is not computed
    u = (t / gamma).clamp(-0.5, 0.5)
    return (1.5 - 2 * u * u) * u + 0.5


def selector_codes(z: Tensor, experts: int, gamma: float = 1.0) -> Tensor:
    """r_i = Π_j S(z_j) where bit j of i is 1, and 1 − S(z_j) where it is 0; the most significant bit first.

    By successive outer products of the pairs (1 − S, S): 2^(m+1) multiplications in place of m 2^m.

    Args:
        z: (…, k, m), m = ⌈log2 experts⌉.
        experts: E ≥ 2; codes from E on stand for no expert and are left out.
        gamma: width of the smooth step.

    Returns:
        (…, k, experts); sums to 1 where E = 2^m.

    Raises:
        ValueError: experts < 2, z of another width than m, gamma ≤ 0.
    """
    bits = _bits(z, experts)
    s = smooth_step(z, gamma)
    pairs = torch.stack([1 - s, s], -1).unbind(-2)
    codes = pairs[0]
    for pair in pairs[1:]:
        codes = (codes.unsqueeze(-1) * pair.unsqueeze(-2)).flatten(-2)
    return codes if experts == 2**bits else codes[..., :experts]


def dselect_k(z: Tensor, w: Tensor, experts: int, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights q = Σ_s softmax(w)_s r_s.

    Args:
        z: (…, k, m).
        w: (…, k).
        experts: E ≥ 2.
        gamma: width of the smooth step.

    Returns:
        Weights q (…, experts) and selectors r (…, k, experts).

    Raises:
        ValueError: k < 1 or k > experts, w of another shape, and as :func:`selector_codes`.
    """
    k = z.shape[-2] if z.dim() > 1 else 0
    if not 1 <= k <= experts:
        raise ValueError(f"z of shape {tuple(z.shape)} has k={k} selectors; k must lie in 1 … {experts}, the number of experts")
    if w.shape != z.shape[:-1]:
        raise ValueError(f"w of shape {tuple(w.shape)} does not go with z of shape {tuple(z.shape)}: it must be (…, k)")
    r = selector_codes(z, experts, gamma)
    return (w.softmax(-1).unsqueeze(-2) @ r).squeeze(-2), r


def selector_entropy(r: Tensor, eps: float = 1e-6) -> Tensor:
    """H = −Σ_i r_i ln(r_i + eps): (…, experts) to (…)."""
    return -(r * (r + eps).log()).sum(-1)


def reachability(r: Tensor, eps: float = 0.0) -> Tensor:
    """1 / (Σ_i r_i + eps), 1 where all mass lies on codes that stand for an expert: (…, experts) to (…)."""
    return 1 / (r.sum(-1) + eps)


def hard_selection(z: Tensor, experts: int, gamma: float = 1.0) -> Tensor:
    """The expert of each selector that has decided.

    Args:
        z: (k, m).
        experts: E ≥ 2.
        gamma: width of the smooth step.

    Returns:
        (k,) int64.

    Raises:
        ValueError: a bit is neither 0 nor 1, or a code stands for no expert; says which selectors.
    """
    bits = _bits(z, experts)
    s = smooth_step(z.detach(), gamma)
    off = torch.minimum(s, 1 - s).amax(-1)
    if bool((off > 0).any()):
        bad = ", ".join(f"{i}: {float(off[i]):.3g}" for i in off.nonzero().flatten().tolist())
        raise ValueError(f"selectors that are not binary, and how far off: {bad}")
    powers = 2 ** torch.arange(bits - 1, -1, -1, device=z.device)
    chosen = (s.to(torch.int64) * powers).sum(-1)
    if bool((chosen >= experts).any()):
        raise ValueError(f"selectors chose codes {chosen.tolist()}, and there are only {experts} experts (0 … {experts - 1})")
    return chosen


def top_k_weights(logits: Tensor, k: int, normalize: str = "selected") -> tuple[Tensor, Tensor]:
    """Weights of the k largest logits.

    Args:
        logits: (…, E).
        k: 1 … E.
        normalize: `selected`: softmax over the k; `all`: softmax over all, the k largest kept as they are.

    Returns:
        Weights (…, E), zero elsewhere, and indices (…, k) int64 in torch.topk's order.

    Raises:
        ValueError: k out of its range, an unknown `normalize`.
    """
    slots, chosen = top_k_slots(logits, k, normalize)
    return torch.zeros_like(logits).scatter(-1, chosen, slots), chosen


def top_k_slots(logits: Tensor, k: int, normalize: str = "selected") -> tuple[Tensor, Tensor]:
    """As :func:`top_k_weights`, the weights as (…, k)."""
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k={k} must lie in 1 … {logits.shape[-1]}, the number of experts")
    if normalize == "selected":
        top, chosen = logits.topk(k, -1)
        return top.softmax(-1), chosen
    if normalize == "all":
        slots, chosen = logits.softmax(-1).topk(k, -1)
        return slots, chosen
    raise ValueError(f"normalize={normalize!r} must be 'selected' or 'all'")


def noisy_logits(x: Tensor, w_gate: Tensor, w_noise: Tensor, noise: Tensor) -> Tensor:
    """H = x W_g + noise ⊗ softplus(x W_n): (T, d), (d, E), (d, E), (T, E) to (T, E) (arXiv 1701.06538, eq. 4)."""
    return x @ w_gate + noise * torch.nn.functional.softplus(x @ w_noise)


def noisy_load(clean: Tensor, noisy: Tensor, scale: Tensor, k: int) -> Tensor:
    """Smooth load: Σ_t Φ((c_i − ψ_i) / σ_i), the chance that expert i is among the k under new noise of its own (eqs. 8 to 10).

    ψ_i is the (k+1)-th largest of H where i is among its k largest, else the k-th largest.

    Args:
        clean: c (T, E), logits without noise.
        noisy: H (T, E), a constant here.
        scale: σ (T, E), > 0.
        k: 1 … E − 1.

    Returns:
        (E,), with gradients to `clean` and `scale`.

    Raises:
        ValueError: k < 1 or k ≥ E.
    """
    return noisy_chances(clean, noisy, scale, k).sum(0)


def noisy_chances(clean: Tensor, noisy: Tensor, scale: Tensor, k: int) -> Tensor:
    """What :func:`noisy_load` sums: (T, E)."""
    experts = clean.shape[-1]
    if not 1 <= k < experts:
        raise ValueError(f"k={k} must lie in 1 … {experts - 1}: with all {experts} experts chosen there is no load to speak of")
    top, chosen = noisy.detach().topk(k + 1, -1)
    inside = torch.zeros_like(noisy, dtype=torch.bool).scatter(-1, chosen[..., :k], True)
    psi = torch.where(inside, top[..., k : k + 1], top[..., k - 1 : k])
    # softplus comes to 0 far below 0: 0 times the slope of 1/σ is NaN then
    chance: Tensor = torch.special.ndtr((clean - psi) / scale.clamp_min(1e-6))
    return chance


def expert_choice(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Each expert takes its best tokens by S = softmax over experts of the logits.

    Args:
        logits: (T, E).
        capacity: C ≥ 1; at most T are taken.

    Returns:
        Tokens (E, C) int64 and their weights S (E, C).

    Raises:
        ValueError: capacity < 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1 token an expert")
    weights, tokens = logits.softmax(-1).T.topk(min(capacity, len(logits)), -1)
    return tokens, weights


def _bits(z: Tensor, experts: int) -> int:
    if experts < 2:
        raise ValueError(f"experts={experts} must be at least 2")
    bits = (experts - 1).bit_length()
    if z.dim() < 2 or z.shape[-1] != bits:
        raise ValueError(f"z of shape {tuple(z.shape)} must be (…, k, {bits}): {experts} experts have codes of {bits} bits")
    return bits

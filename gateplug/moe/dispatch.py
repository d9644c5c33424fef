"""From a choice to the experts and back: capacities, and the products of many experts with the rows that each has."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gateplug.core.activations import ACTIVATIONS
from gateplug.core.errors import listed


def expert_capacity(tokens: int, experts: int, k: int, factor: float) -> int:
    """max(1, ⌈factor · tokens · k / experts − 1e-9⌉): tokens that an expert takes; the 1e-9 is against rounding.

    Raises:
        ValueError: factor ≤ 0.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"a capacity factor of {factor} must be a finite number > 0")
    return max(1, math.ceil(factor * tokens * k / experts - 1e-9))


def apply_capacity(assigned: Tensor, scores: Tensor, experts: int, capacity: int, policy: str = "position") -> Tensor:
    """Which choices an expert of limited capacity keeps.

    Args:
        assigned: (T, k) int64, the chosen experts of each token.
        scores: (T, k), their weights.
        experts: E.
        capacity: C ≥ 1, choices that an expert keeps.
        policy: `position`: all first choices in the order of the tokens, then all second choices …; `score`: the largest scores,
            ties by the lower token, then the lower slot.

    Returns:
        (T, k) bool.

    Raises:
        ValueError: capacity < 1, an unknown policy.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1")
    tokens, k = assigned.shape
    if policy == "position":
        order = torch.arange(tokens * k, device=assigned.device).view(k, tokens).T.flatten()
    elif policy == "score":
        order = scores.flatten().argsort(descending=True, stable=True).argsort()
    else:
        raise ValueError(f"policy={policy!r} must be 'position' or 'score'")
    # sorted by expert, then by who is served first; the place within the expert is the place minus the expert's first place
    flat = assigned.flatten()
    sequence = (flat * (tokens * k) + order).argsort()
    counts = counted(flat, experts)
    first = counts.cumsum(0) - counts
    place = torch.arange(tokens * k, device=flat.device) - first[flat[sequence]]
    return torch.empty_like(flat, dtype=torch.bool).scatter_(0, sequence, place < capacity).view(tokens, k)


def counted(expert: Tensor, experts: int) -> Tensor:
    """How often each expert stands in `expert` (P,) int64: (experts,) int64, without a word to the device."""
    return torch.zeros(experts, dtype=torch.int64, device=expert.device).scatter_add_(0, expert, torch.ones_like(expert))


def sorted_pairs(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs with a weight that is not zero, sorted by expert, then by token.

    Args:
        weights: (T, E).

    Returns:
        Tokens (P,), experts (P,), weights (P,) with a graph.
    """
    expert, token = (weights.detach() != 0).T.nonzero().unbind(-1)
    return token, expert, weights.flatten().index_select(0, token * weights.shape[-1] + expert)


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
) -> Tensor:
    """Σ_e q_te (act(x_t W_in,eᵀ + b_in,e) W_out,eᵀ + b_out,e), only where q_te ≠ 0.

    Args:
        x: (T, d).
        weights: q (T, E).
        w_in: (E, h, d).
        w_out: (E, o, h).
        activation: a name of :data:`gateplug.core.activations.ACTIVATIONS`.
        b_in: (E, h).
        b_out: (E, o).

    Returns:
        (T, o).

    Raises:
        ValueError: an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known; allowed are {listed(ACTIVATIONS)}")
    token, expert, weight = sorted_pairs(weights)
    counts = counted(expert, len(w_in))
    hidden = ACTIVATIONS[activation](grouped_linear(x.index_select(0, token), counts, w_in, b_in))
    out = grouped_linear(hidden, counts, w_out, b_out) * weight[:, None]
    return out.new_zeros(len(x), out.shape[-1]).index_add_(0, token, out)


def grouped_linear(rows: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer of its expert for each row: one grouped product where torch has one for these numbers, else one an expert.

    Args:
        rows: (P, d), sorted by expert.
        counts: (E,) int64, rows of each expert; they sum to P.
        weight: (E, n, d).
        bias: (E, n).

    Returns:
        (P, n).
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        if torch.float64 not in (dtype, rows.dtype):
            rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if _grouped(rows, weight):
        offsets = counts.cumsum(0).to(torch.int32)
        compiled = torch.compiler.is_compiling() and rows.dtype != torch.bfloat16
        out = (_product_uncompiled if compiled else _product)(rows.contiguous(), weight.contiguous(), offsets)
        if bias is None:
            return out
        expert = torch.repeat_interleave(torch.arange(len(weight), device=rows.device), counts, output_size=len(rows))
        return out + bias.index_select(0, expert)
    parts = torch.split(rows, counts.tolist())
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    outs = [F.linear(part, w, b) for part, w, b in zip(parts, weight.unbind(0), biases, strict=True) if len(part)]
    return torch.cat(outs) if outs else F.linear(rows, weight[0], biases[0])


def _product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    product = F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)
    out: Tensor = _ContiguousGradient.apply(product)  # type: ignore[no-untyped-call]
    return out


# torch 2.13 cannot trace the grouped product of float32: a compiled model leaves its graph for it
_product_uncompiled = torch.compiler.disable(_product)  # type: ignore[no-untyped-call]


def _grouped(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these: no float64, rows of a multiple of 16 bytes, and some rows at all."""
    if not hasattr(F, "grouped_mm") or rows.dtype != weight.dtype or rows.dtype not in (torch.float32, torch.bfloat16):
        return False
    size = rows.element_size()
    return len(rows) > 0 and all(n * size % 16 == 0 for n in weight.shape[1:])


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: the grouped product does not take an expanded one, as `.sum()` sends."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.contiguous()

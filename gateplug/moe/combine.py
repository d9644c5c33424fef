"""From weights to sums over experts: which rows go where, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gateplug.moe.experts import ExpertMLP, Experts
from gateplug.moe.functional import sorted_pairs
from gateplug.moe.routing import Routing


def no_rows(x: Tensor) -> Tensor:
    """What a static gate is called with."""
    return torch.zeros(1, 1, device=x.device)


def counted(expert: Tensor, experts: int) -> Tensor:
    """How often each expert stands in `expert` (P,) int64: (experts,) int64."""
    return torch.zeros(experts, dtype=torch.int64, device=expert.device).scatter_add_(0, expert, torch.ones_like(expert))


def pairs(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs (row, expert) with a weight, sorted by expert: rows (P,), weights (P,), and their number for each expert."""
    experts = routing.weights.shape[-1]
    if routing.slots is None or routing.assigned is None or routing.kept is not None:
        row, expert, weight = sorted_pairs(routing.weights)
        return row, weight, counted(expert, experts)
    flat = routing.assigned.flatten()
    order = flat.argsort(stable=True)
    row = order // routing.assigned.shape[-1]
    return row, routing.slots.flatten().index_select(0, order), counted(flat, experts)


def weighted_sum(experts: Experts, x: Tensor, q: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
    """Σ_e q_ne f_e(x) with weights (n, experts) for all rows alike; experts that no n wants do not run. Returns (n, …)."""
    if chosen is None and not torch.compiler.is_exporting():
        chosen = (q != 0).any(0).nonzero().flatten().tolist()
        q = q[:, chosen]
    flat = isinstance(experts, ExpertMLP)
    out = experts.every(x.reshape(-1, x.shape[-1]) if flat else x, chosen)
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, out.dtype)
        y = (q.to(dtype) @ out.flatten(1).to(dtype)).to(out.dtype)
    return y.reshape(len(q), *(x.shape[:-1] if flat else out.shape[1:2]), *out.shape[2:])


def masked(items: Tensor, rows: Tensor, mask: Tensor | None, run: Callable[[Tensor, Tensor, bool], Tensor]) -> Tensor:
    """`run(items, rows, without_padding)` on the rows that the mask leaves, and zeros for the others."""
    if mask is None:
        return run(items, rows, False)
    if mask.numel() != len(rows):
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not go with {len(rows)} rows")
    taking = mask.reshape(-1).nonzero().squeeze(-1)
    y = run(items.index_select(0, taking), rows.index_select(0, taking), True)
    return y.new_zeros(len(items), *y.shape[1:]).index_copy(0, taking, y)

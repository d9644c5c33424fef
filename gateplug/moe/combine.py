"""From weights to sums over experts: which rows go where, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gateplug.moe.dispatch import counted, sorted_pairs
from gateplug.moe.experts import ExpertMLP, Experts
from gateplug.moe.routing import Routing


def no_rows(x: Tensor) -> Tensor:
    """What a static gate is called with."""
    return torch.zeros(1, 1, device=x.device)


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

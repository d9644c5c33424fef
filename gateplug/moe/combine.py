"""From weights to sums over experts: which rows go where, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gateplug.core.errors import whole_numbers
from gateplug.moe.dispatch import counted, sorted_pairs
from gateplug.moe.experts import ExpertMLP, Experts
from gateplug.moe.routing import ExpertGate, Routing
from gateplug.moe.rows import check_mask, cleared


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
        if not chosen:
            raise ValueError("the gate gives every expert a weight of zero: its selectors stand at codes that are no expert")
        q = q[:, chosen]
    flat = isinstance(experts, ExpertMLP)
    out = experts.every(x.reshape(-1, x.shape[-1]) if flat else x, chosen)
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, out.dtype)
        y = (q.to(dtype) @ out.flatten(1).to(dtype)).to(out.dtype)
    return y.reshape(len(q), *(x.shape[:-1] if flat else out.shape[1:2]), *out.shape[2:])


def whole_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` without what stands in rows that the mask leaves out: NaN times a gradient of zero is NaN in every expert."""
    if mask is None:
        return x
    check_mask(mask, x.shape[: min(mask.dim(), x.dim() - 1)])
    return cleared(x, mask)


def plus(y: Tensor, shared: nn.Module | None, x: Tensor, tasks: bool = False) -> Tensor:
    """`y` (rows, *out), or (rows, tasks, *out), and what the shared module gives for every row."""
    if shared is None:
        return y
    common: Tensor = shared(x)
    common = common[:, None] if tasks else common
    if common.shape != ((len(y), 1, *y.shape[2:]) if tasks else y.shape):
        raise ValueError(f"the experts give {tuple(y.shape)}, and shared gives {tuple(common.shape)}: they must have one shape")
    return y + common


def check_shared(shared: nn.Module | None) -> nn.Module | None:
    """Raise TypeError unless it is a module or None."""
    if shared is not None and not isinstance(shared, nn.Module):
        raise TypeError(f"shared must be a module or None, got a {type(shared).__name__}")
    return shared


def check_fit(experts: Experts, gate: ExpertGate, dim: int | None = None) -> None:
    """Raise ValueError or TypeError where experts and gate do not go together."""
    if gate.experts != len(experts):
        raise ValueError(f"{gate} is made for {gate.experts} experts, and there are {len(experts)}")
    if dim is not None:
        whole_numbers(dim=dim)
    if (dim or gate.dim) is not None:
        experts.check(dim or gate.dim or 0)

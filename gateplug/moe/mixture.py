"""Mixtures of experts: one gate, or one gate a task, over shared experts; only what a gate has chosen is computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gateplug.core.errors import real_numbers
from gateplug.core.gate import Foldable
from gateplug.moe.combine import check_fit, check_shared, no_rows, pairs, plus, weighted_sum, whole_rows
from gateplug.moe.dispatch import counted, sorted_pairs
from gateplug.moe.experts import ExpertMLP, Experts, as_experts
from gateplug.moe.routing import Drop, ExpertGate, Routing
from gateplug.moe.rows import check_mask, cleared, masked


class MoE(Foldable):
    """Mixture of experts: y_t = Σ_e q_te f_e(x_t) (+ shared(x_t)). Only pairs with q ≠ 0 are computed, forward and backward.

    Args:
        experts: the experts: a list of any modules that map rows to rows of one shape, or an :class:`ExpertMLP`.
        gate: one of gateplug's gates; a static one chooses for all rows at once.
        shared: a module that every row goes through besides.
        capacity_factor: an expert takes at most ⌈factor · T · k / E⌉ of T rows; None: as many as come. For gates that choose k
            experts a row.
        drop: who goes when an expert is full: `position` (first choices first, in the order of the rows) or `score` (the largest
            weights stay). A row that lost all its experts passes 0, or `shared` alone.
        dim: width of the experts' rows, where the gate looks at others (`route`) of another width; None: the gate's.

    Parameters lie under `experts`, `gate` and `shared`.

    Raises:
        ValueError: the gate is made for another number or width of experts or for several tasks, outputs of the experts differ in
            shape, a capacity_factor ≤ 0 or for a gate that does not choose k experts row by row.
        TypeError: an expert is no module or does not return a tensor, or the gate is none.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module] | ExpertMLP,
        gate: ExpertGate,
        shared: nn.Module | None = None,
        capacity_factor: float | None = None,
        drop: Drop = "position",
        dim: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(gate, ExpertGate):
            raise TypeError(f"gate must be one of gateplug's gates (gp.DSelectK, gp.TopKGate …), got a {type(gate).__name__}")
        if gate.tasks is not None:
            raise ValueError(f"{gate} chooses for {gate.tasks} tasks: use gp.MultiGateMoE(experts, gate)")
        if drop not in ("position", "score"):
            raise ValueError(f"drop={drop!r} must be 'position' or 'score'")
        if capacity_factor is not None:
            real_numbers(capacity_factor=capacity_factor)
            if not 0 < capacity_factor < float("inf"):
                raise ValueError(f"capacity_factor={capacity_factor} must be > 0, or None for no limit")
            gate.check_capacity(capacity_factor)
        self.experts: Experts = as_experts(experts)
        check_fit(self.experts, gate, dim)
        self.gate, self.shared = gate, check_shared(shared)
        self.capacity_factor, self.drop = capacity_factor, drop

    def forward(self, x: Tensor, mask: Tensor | None = None, route: Tensor | None = None) -> Tensor:
        """Run the mixture.

        Args:
            x: (…, dim), rows over all leading dimensions; with `route` `(…, *shape)`, whatever the experts take.
            mask: (…) bool, False for rows that take no part (padding), whatever stands in them: not routed nor counted, output 0.
            route: (…, gate.dim): what the gate looks at, if not `x`.

        Returns:
            `(…, *out)`: what the experts give for a row.
        """
        if self.gate.static:
            return self._static(x, mask)
        look = x if route is None else route
        check_mask(mask, look.shape[:-1])
        items = x.reshape(-1, *x.shape[look.dim() - 1 :])
        y = masked(items, look.reshape(-1, look.shape[-1]), mask, self._rows)
        return y.reshape(*look.shape[:-1], *y.shape[1:])

    def _rows(self, items: Tensor, rows: Tensor, without_padding: bool) -> Tensor:
        routing = self.gate.route(rows, self.capacity_factor, self.drop, without_padding)
        return plus(self._sum(items, routing), self.shared, items)

    def _sum(self, items: Tensor, routing: Routing) -> Tensor:
        if torch.compiler.is_exporting():  # no shapes that depend on values
            return torch.einsum("re,er...->r...", routing.weights, self.experts.every(items))
        row, weight, counts = pairs(routing)
        out = self.experts.run(items.index_select(0, row), counts)
        weighted = out * weight.reshape(-1, *[1] * (out.dim() - 1))
        return weighted.new_zeros(len(items), *out.shape[1:]).index_add_(0, row, weighted).to(out.dtype)

    def _static(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = whole_rows(x, mask)
        y = plus(weighted_sum(self.experts, x, self.gate.route(no_rows(x)).weights)[0], self.shared, x)
        return y if mask is None else cleared(y, mask)

    def folded(self) -> nn.Module:
        """A static mixture without its gate, of the experts that it has chosen; any other stays as it is."""
        return Mixture(self.experts, self.gate.weights()[0], self.shared) if self.gate.static else self


class MultiGateMoE(Foldable):
    """Multi-gate mixture of experts (arXiv 1806.07959): shared experts, and for each task a gate of its own.

    Each expert runs once, on the rows that any task needs.

    Args:
        experts: as in :class:`MoE`.
        gates: one gate a task, in the order of the tasks, or a single gate made for several (`tasks=n`).
        shared: a module that every row goes through besides, added for every task.
        dim: as in :class:`MoE`.

    Raises:
        ValueError: no gate, a gate for another number or width of experts, experts whose outputs differ in shape.
        TypeError: as in :class:`MoE`.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module] | ExpertMLP,
        gates: Iterable[ExpertGate] | ExpertGate,
        shared: nn.Module | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        every = [gates] if isinstance(gates, ExpertGate) else list(gates) if isinstance(gates, Iterable) else []
        if not every or not all(isinstance(gate, ExpertGate) for gate in every):
            raise TypeError(f"gates must be one of gateplug's gates, or a list of them; got {gates!r}")
        widths = {gate.dim for gate in every} - {None}
        if len(widths) > 1:
            raise ValueError(f"all gates look at the same rows, and take rows of widths {sorted(map(str, widths))}")
        self.experts: Experts = as_experts(experts)
        for gate in every:
            check_fit(self.experts, gate, dim)
        self.gates = nn.ModuleList(every)
        self.shared = check_shared(shared)
        self.tasks = sum(gate.tasks or 1 for gate in every)

    def forward(self, x: Tensor, mask: Tensor | None = None, route: Tensor | None = None) -> Tensor:
        """Run the mixture for all tasks.

        Args:
            x: `(rows, *shape)`, whatever the experts take; `(rows, dim)` where gates look at it row by row.
            mask: (rows,) bool, False for rows that take no part; their output is 0, whatever stands in them.
            route: (rows, dim): what the gates look at, if not `x`.

        Returns:
            `(rows, tasks, *out)`.
        """
        check_mask(mask, x.shape[:1])
        if all(gate.static for gate in self._gates()):
            x = whole_rows(x, mask)
            q = torch.cat([gate.route(no_rows(x)).weights for gate in self._gates()])
            y = weighted_sum(self.experts, x, q).transpose(0, 1)
            y = plus(y, self.shared, x, tasks=True)
            return y if mask is None else cleared(y, mask)
        look = x if route is None else route
        if look.dim() != 2 or len(look) != len(x):
            raise ValueError(
                f"gates that choose row by row look at (rows, dim), and got {tuple(look.shape)} for {len(x)} rows: flatten the "
                "dimensions in front, or give route="
            )
        return masked(x, look, mask, self._rows)

    def _rows(self, items: Tensor, rows: Tensor, without_padding: bool) -> Tensor:
        parts = []
        for gate in self._gates():
            weights = gate.route(rows, masked=without_padding).weights
            parts.append(weights.reshape(-1, gate.tasks or 1, gate.experts).expand(len(rows), -1, -1))
        q = torch.cat(parts, 1)
        if torch.compiler.is_exporting():
            y = torch.einsum("rte,er...->rt...", q, self.experts.every(items))
        else:
            needed = (q != 0).any(1)
            row, expert, _ = sorted_pairs(needed.to(q.dtype))
            out = self.experts.run(items.index_select(0, row), counted(expert, len(self.experts)))
            # (P, tasks): the weights of each pair for every task
            weight = q.transpose(1, 2).reshape(-1, self.tasks).index_select(0, row * len(self.experts) + expert)
            each = weight.reshape(*weight.shape, *[1] * (out.dim() - 1)) * out[:, None]
            y = each.new_zeros(len(items), *each.shape[1:]).index_add_(0, row, each).to(out.dtype)
        return plus(y, self.shared, items, tasks=True)

    def _gates(self) -> list[ExpertGate]:
        return list(self.gates)  # type: ignore[arg-type]

    def folded(self) -> nn.Module:
        """Static mixtures without gates, of the experts that any task has chosen; others stay as they are."""
        if not all(gate.static for gate in self._gates()):
            return self
        return Mixture(self.experts, torch.cat([gate.weights() for gate in self._gates()]), self.shared)


class Mixture(nn.Module):
    """What is left of a mixture whose gates are static: the chosen experts and their fixed weights, for inference.

    Args:
        experts: of the mixture.
        weights: (experts,), or (tasks, experts) for several tasks.
        shared: a module that every row goes through besides.
    """

    def __init__(self, experts: Experts, weights: Tensor, shared: nn.Module | None = None) -> None:
        super().__init__()
        chosen: list[int] = (weights != 0).reshape(-1, weights.shape[-1]).any(0).nonzero().flatten().tolist()
        self.experts: Experts = experts.select(chosen)
        self.shared = shared
        self.register_buffer("weights", weights[..., chosen].clone())
        self.weights: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None, route: Tensor | None = None) -> Tensor:
        """As the mixture it comes from; `route` has no part in it."""
        x = whole_rows(x, mask)
        y = weighted_sum(self.experts, x, self.weights.reshape(-1, len(self.experts)), list(range(len(self.experts))))
        y = y.transpose(0, 1) if self.weights.dim() == 2 else y[0]
        y = plus(y, self.shared, x, tasks=self.weights.dim() == 2)
        return y if mask is None else cleared(y, mask)

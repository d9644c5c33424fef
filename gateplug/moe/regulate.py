"""Regularisers of one router, put in where it routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gateplug.core.gate import Gate
from gateplug.core.objective import Value, in_backward
from gateplug.core.processes import world_size
from gateplug.moe.families import Read, Seen, tapped
from gateplug.moe.functional import importance
from gateplug.moe.outputs import carried, replaced
from gateplug.moe.padding import Counted, Padding
from gateplug.moe.routers import Side
from gateplug.moe.rows import counted_rows
from gateplug.moe.terms import Weights, logit_terms


class Regulator(Gate):
    """Looks on at a router in training: adds its terms to the loss, counts what each expert gets. Changes no value.

    Args:
        read: how to read the router's output.
        k: experts a row, if that is fixed.
        name: the router's name, for messages.
        experts: E.
        weights: factors of the terms that apply to this router.
        padding: masks of the running batch.
        side: of the model, for the padding.
        tasks: choices for each row of the batch.
        everywhere: take f, the number of rows and the importance over all processes.
        counting: keep counts for a bias controller.
        own: the gate's own terms: selectors (T, k, E), share of each row (T,) -> scalar.
    """

    room: ClassVar[str] = "moe"
    axes: ClassVar[tuple[str, ...]] = ("expert",)
    whole: ClassVar[bool] = True

    def __init__(
        self,
        read: Read,
        k: int | None,
        name: str,
        experts: int,
        weights: Weights,
        padding: Padding,
        side: Side = "encoder",
        tasks: int = 1,
        everywhere: bool = False,
        counting: bool = False,
        own: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.read, self.k, self.name, self.experts, self.weights = read, k, name, experts, weights
        self.padding, self.tasks, self.everywhere, self.counting = padding, tasks, everywhere, counting
        self.side, self.own = side, own
        self.values: dict[str, Value] = {}
        """Terms of the last batch, without their factors."""
        self.load: Tensor | None = None
        """(E,) rows that each expert was chosen for, since the last optimizer step."""
        self.last: tuple[Tensor, Counted | None] | None = None
        """Weights (T, E) of the last call of a gate with selectors, and its padding."""
        self._calls: list[list[Tensor]] = []
        self._call: list[Tensor] = []

    # looks at values that a graph does not hold (what backward runs, whether a batch was seen): one break, and here
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, out: Any) -> Any:
        """The router's output, unchanged."""
        if not (self.training and (self.injection is not None or self.counting or self.recording)):
            return out
        seen = self.read(out, self.k)
        known, counted = self.padding.of(seen, self.side, self.name, self.tasks)
        if not known:
            return out
        if seen.selectors is not None and seen.weights is not None:
            self.last = seen.weights.detach(), counted
        counts = choices(seen, counted, self.experts)
        # a gate of gateplug shows its openness by itself
        if self.recording and seen.assigned is not None and self.read is not tapped:
            chosen = counts.new_zeros(seen.rows, self.experts).scatter(-1, seen.assigned, 1.0)
            self.record(chosen if counted is None else chosen[counted.mask])
        if self.counting and not in_backward():
            self.load = counts if self.load is None else self.load + counts
        if self.injection is None or (self.own is None and not self.weights.named()):
            return out
        return self._with_terms(out, seen, counted, counts)

    def _with_terms(self, out: Any, seen: Seen, counted: Counted | None, counts: Tensor) -> Any:
        assert self.injection is not None
        carriers, x, mask = carried(out), seen.scores, None if counted is None else counted.mask
        with torch.no_grad(), torch.autocast(counts.device.type, enabled=False):
            f, share = self._shares(seen, counted, counts)
            values, gradient = logit_terms(x.detach(), f, share, mask, self.weights, seen.logits is not None)
        if values:
            named = {f"moe/{name}": self._weighted(name, value) for name, value in values.items()}
            carriers = self.injection.send(carriers, x, gradient, named)
        if self.weights.importance and seen.weights is not None:
            carriers = self._sums("importance", carriers, seen.weights, lambda w: self._received(w, seen, mask), values)
        if self.weights.smooth_load and seen.load is not None:
            carriers = self._sums("smooth_load", carriers, seen.load, lambda load: counted_rows(load, mask).sum(0), values)
        if self.own is not None and seen.selectors is not None:
            own = self.own
            row = share if isinstance(share, Tensor) else counts.new_full((seen.rows,), share)

            def term(r: Tensor) -> Tensor:
                # padding may be NaN, and a sum of 0 over the experts would make it so
                return own(r if mask is None else torch.where(mask[:, None, None], r, 1 / self.experts), row)

            carriers = self.injection.tether(carriers, seen.selectors, "moe/selectors", term)
        if not in_backward():
            self.values = values
        return replaced(out, carriers)

    def _shares(self, seen: Seen, counted: Counted | None, counts: Tensor) -> tuple[Tensor, Tensor | float]:
        """Share of the choices that fell on each expert (E,), and of each row in a mean: (T,), or the same for all."""
        if not self.everywhere or world_size() == 1:
            each = 1 / max(seen.rows, 1) if counted is None else counted.share
            if seen.assigned is None:
                return counts / counts.sum().clamp_min(1), each
            k = seen.assigned.shape[-1]
            return counts / (max(seen.assigned.numel(), 1) if counted is None else counted.choices(k)[1]), each
        self._enter()
        number = counts.new_full((), seen.rows) if counted is None else counted.number
        totals, world = self._everywhere(torch.cat([counts, number[None]]))
        share = world / totals[-1:].clamp_min(1)
        return totals[:-1] / totals[:-1].sum().clamp_min(1), (
            share.expand(seen.rows) if counted is None else counted.ones * share
        )

    def _weighted(self, name: str, value: Value) -> Value:
        return lambda: value() * getattr(self.weights, name)

    def _sums(
        self, name: str, carriers: tuple[Tensor, ...], x: Tensor, sums: Callable[[Tensor], Tensor], values: dict[str, Value]
    ) -> tuple[Tensor, ...]:
        """The squared coefficient of variation of something that is summed over the rows, here or over all processes."""
        assert self.injection is not None
        factor: float = getattr(self.weights, name)

        def term(leaf: Tensor) -> Tensor:
            local = sums(leaf)
            total, world = self._everywhere(local.detach())
            value = importance((local + (total - local.detach()))[None])
            values[name] = value.detach
            # every process has the same value and the gradient of its own part; the mean over them must be the sum
            return factor * (value.detach() + world * (value - value.detach()))

        return self.injection.tether(carriers, x, f"moe/{name}", term)

    def _received(self, weights: Tensor, seen: Seen, mask: Tensor | None) -> Tensor:
        weights = counted_rows(weights, mask)
        if seen.by_expert or seen.assigned is None:
            return weights.sum(0)
        return weights.new_zeros(self.experts).scatter_add(0, seen.assigned.flatten(), weights.flatten())

    def _everywhere(self, sums: Tensor) -> tuple[Tensor, int]:
        """Sums over all processes if asked for, and their number. A recomputed layer takes what its first run got."""
        processes = world_size() if self.everywhere else 1
        if processes == 1:
            return sums, 1
        if in_backward():  # no exchange amid that of the gradients
            return self._call.pop(0), processes
        total = sums.clone()
        dist.all_reduce(total)
        self._call.append(total)
        return total, processes

    def _enter(self) -> None:
        """Begin a call; the last call of a forward is the first to be recomputed in backward."""
        if in_backward():
            self._call = self._calls.pop() if self._calls else []
        else:
            self._call = []
            self._calls.append(self._call)

    def used(self) -> float:
        """Mean number of experts with a weight in the last call of a gate with selectors, 0 for other routers."""
        if self.last is None:
            return 0.0
        weights, counted = self.last
        used = (weights != 0).sum(-1).float()
        return float((used if counted is None else used[counted.mask]).mean())

    def __getstate__(self) -> dict[str, Any]:
        """What the last batch has left is not copied nor saved."""
        return {**self.__dict__, "values": {}, "last": None}

    def start(self) -> None:
        """A new batch begins."""
        self._calls = []

    def fold(self, layer: nn.Module) -> nn.Module:
        """Nothing of it stays."""
        return layer


def choices(seen: Seen, counted: Counted | None, experts: int) -> Tensor:
    """(E,) float: rows that chose each expert, before any were dropped; padding left out."""
    with torch.no_grad():
        if seen.assigned is None:
            assert seen.weights is not None
            chosen = seen.weights != 0
            return (chosen if counted is None else chosen & counted.mask[:, None]).sum(0).float()
        counts, assigned = torch.zeros(experts, device=seen.assigned.device), seen.assigned.flatten()
        if counted is None:
            return counts.scatter_add_(0, assigned, counts.new_ones(1).expand(len(assigned)))
        return counts.scatter_add_(0, assigned, counted.choices(seen.assigned.shape[-1])[0])

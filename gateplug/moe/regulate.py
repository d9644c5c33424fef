"""Regularisers of one router, put in where it routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gateplug.core.gate import Gate
from gateplug.core.objective import in_backward
from gateplug.core.processes import world_size
from gateplug.moe.families import Read, Seen, tapped
from gateplug.moe.functional import importance
from gateplug.moe.outputs import carried, replaced
from gateplug.moe.padding import Padding
from gateplug.moe.routers import Side
from gateplug.moe.routing import at_least_float32


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
    ) -> None:
        super().__init__()
        self.read, self.k, self.name, self.experts, self.weights = read, k, name, experts, weights
        self.padding, self.tasks, self.everywhere, self.counting = padding, tasks, everywhere, counting
        self.side = side
        self.values: dict[str, Tensor] = {}
        """Terms of the last batch, without their factors."""
        self.load: Tensor | None = None
        """(E,) rows that each expert was chosen for, since the last optimizer step."""
        self._calls: list[list[Tensor]] = []
        self._call: list[Tensor] = []

    # looks at values that a graph does not hold (what backward runs, whether a batch was seen): one break, and here
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, out: Any) -> Any:
        """The router's output, unchanged."""
        if not (self.training and (self.injection is not None or self.counting or self.recording)):
            return out
        seen = self.read(out, self.k)
        known, mask = self.padding.of(seen, self.side, self.name, self.tasks)
        if not known:
            return out
        counts = choices(seen, mask, self.experts)
        # a gate of gateplug shows its openness by itself
        if self.recording and seen.assigned is not None and self.read is not tapped:
            chosen = counts.new_zeros(seen.rows, self.experts).scatter(-1, seen.assigned, 1.0)
            self.record(chosen if mask is None else chosen[mask])
        if self.counting and not in_backward():
            self.load = counts if self.load is None else self.load + counts
        if self.injection is None or not self.weights.named():
            return out
        return self._with_terms(out, seen, mask, counts)

    def _with_terms(self, out: Any, seen: Seen, mask: Tensor | None, counts: Tensor) -> Any:
        assert self.injection is not None
        self._enter()
        rows = torch.full((), float(seen.rows), device=counts.device) if mask is None else mask.sum()
        totals, world = self._everywhere(torch.cat([counts, rows[None].to(counts)]))
        share = world / totals[-1].clamp_min(1)
        f = totals[:-1] / totals[:-1].sum().clamp_min(1)
        carriers = carried(out)
        x = seen.logits if seen.logits is not None else seen.q
        assert x is not None
        with torch.no_grad(), torch.autocast(counts.device.type, enabled=False):
            each, gradient = logit_terms(x.detach(), f, mask, share, self.weights, seen.logits is not None)
        values = dict(each)
        named = {f"moe/{name}": value * getattr(self.weights, name) for name, value in each.items()}
        if each:
            carriers = self.injection.send(carriers, x, gradient, named)
        if self.weights.importance and seen.weights is not None:
            carriers = self._sums("importance", carriers, seen.weights, lambda w: self._received(w, seen, mask), values)
        if self.weights.smooth_load and seen.load is not None:
            carriers = self._sums("smooth_load", carriers, seen.load, lambda load: load, values)
        if not in_backward():
            self.values = {name: value.detach() for name, value in values.items()}
        return replaced(out, carriers)

    def _sums(
        self, name: str, carriers: tuple[Tensor, ...], x: Tensor, sums: Callable[[Tensor], Tensor], values: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The squared coefficient of variation of something that is summed over the rows, here or over all processes."""
        assert self.injection is not None
        factor: float = getattr(self.weights, name)

        def term(leaf: Tensor) -> Tensor:
            local = sums(leaf)
            total, world = self._everywhere(local.detach())
            value = importance((local + (total - local.detach()))[None])
            values[name] = value.detach()
            # every process has the same value and the gradient of its own part; the mean over them must be the sum
            return factor * (value.detach() + world * (value - value.detach()))

        return self.injection.tether(carriers, x, f"moe/{name}", term)

    def _received(self, weights: Tensor, seen: Seen, mask: Tensor | None) -> Tensor:
        weights = weights if mask is None else weights * mask[:, None]
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

    def start(self) -> None:
        """A new batch begins."""
        self._calls = []

    def fold(self, layer: nn.Module) -> nn.Module:
        """Nothing of it stays."""
        return layer


def choices(seen: Seen, mask: Tensor | None, experts: int) -> Tensor:
    """(E,) float: rows that chose each expert, before any were dropped; padding left out."""
    with torch.no_grad():
        if seen.assigned is None:
            assert seen.weights is not None
            chosen = seen.weights != 0
            return (chosen if mask is None else chosen & mask[:, None]).sum(0).float()
        ones = torch.ones_like(seen.assigned, dtype=torch.float32)
        ones = ones if mask is None else ones * mask[:, None]
        return ones.new_zeros(experts).scatter_add_(0, seen.assigned.flatten(), ones.flatten())


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
    x = at_least_float32(x)
    row = share if mask is None else mask * share
    row = row.to(x.dtype).expand(len(x))
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

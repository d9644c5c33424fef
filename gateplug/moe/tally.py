"""What a router has done over a window of batches: running sums on its device, read once at the window's end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gateplug.core.objective import in_backward
from gateplug.moe.calls import Call, together
from gateplug.moe.families import switch
from gateplug.moe.functional import load_statistics
from gateplug.moe.layers import DSelectK
from gateplug.moe.padding import Counted, Padding
from gateplug.moe.regulate import choices
from gateplug.moe.routers import Router
from gateplug.moe.routing import Routing
from gateplug.moe.rows import at_least_float32, counted_rows

_TOGETHER = 2**16
"""Numbers (rows times experts) of the calls that are added in one go."""


@dataclass(frozen=True)
class Report:
    """One router over one window."""

    load: Tensor
    """(E,) share of the choices, or of the weight, that each expert took; sums to 1."""
    numbers: dict[str, float]
    tasks: Tensor | None = None
    """(tasks, E): mean weight q that each task gives to each expert."""
    used: Tensor | None = None
    """(tasks,): experts that each task uses, of static gates."""
    choices: float = 0.0
    """How many the load is the share of; 0 for static gates, whose load is no sample."""


class Look:
    """Forward hook of a router that adds what it did to a tally. Copies and pickles of the model get a hook that does nothing."""

    tally: Tally | None = None

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    def __call__(self, router: nn.Module, args: Any, out: Any) -> None:
        """Look, and change nothing; a layer that is recomputed in backward was seen already."""
        if self.tally is not None and self.tally.on and router.training and not in_backward():
            self.tally.add(out)

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Tally:
    """Running sums of a router that decides row by row.

    Args:
        router: the router.
        padding: masks of the running batch.
        group: name of the tasks that the router has, or is one of.
    """

    reduced = True
    """The sums of all processes add up."""

    def __init__(self, router: Router, padding: Padding, group: str | None = None) -> None:
        gate = router.gate
        self.router, self.padding, self.group = router, padding, group
        self.experts, self.tasks = router.experts, router.tasks
        self.chooses = gate is None or not gate.couples_samples
        # a selector that has not decided yet has no expert of its own, and a dense gate has all: their load is the weight
        self.weighted = gate is not None and self.chooses and (isinstance(gate, DSelectK) or gate.k == gate.experts)
        self.gamma = gate.gamma if isinstance(gate, DSelectK) else None
        self.limits = router.read is switch if gate is None else gate.limits
        self.columns = ["rows", "confidence", "entropy"]
        self.columns += ["limited", "dropped"] * self.limits + ["used", "unserved"] * self.counts_used + ["frozen"] * self.selects
        self.on = False
        self.sums: Tensor | None = None
        self._calls: list[Call] = []
        self._numbers = 0

    @property
    def selects(self) -> bool:
        """A DSelectK gate."""
        return self.gamma is not None

    @property
    def counts_used(self) -> bool:
        """The number of experts differs from row to row."""
        return self.selects or not self.chooses

    @property
    def title(self) -> str:
        """The router's own name."""
        return self.router.title

    def add(self, out: Any) -> None:
        """Add one call of the router, whose output is `out`.

        Small calls are kept and added together: what each operation costs besides its arithmetic weighs on small models.
        """
        seen = self.router.read(out, self.router.k)
        known, counted = self.padding.of(seen, self.router.side, self.title, self.tasks)
        if not known:
            return
        q, z = (out.weights, out.z) if isinstance(out, Routing) else (None, None)
        mask = None if counted is None else counted.mask
        call = Call(seen.logits, seen.assigned, seen.weights, seen.kept, seen.q, q, z, mask, seen.by_expert)
        numbers = seen.rows * self.experts
        if numbers >= _TOGETHER and not self._calls:
            self._sum(call)
            return
        self._calls.append(call.kept())
        self._numbers += numbers
        if self._numbers >= _TOGETHER:
            self._sum_calls()

    def _sum_calls(self) -> None:
        if self._calls:
            calls, self._calls, self._numbers = self._calls, [], 0
            self._sum(together(calls))

    @torch.no_grad()
    def _sum(self, call: Call) -> None:
        table = self._table(call)
        table = table if call.mask is None else torch.where(call.mask, table, 0)
        received = self._received(call)
        chosen = (
            received.sum(0)
            if self.weighted
            else choices(call.seen(), None if call.mask is None else Counted(call.mask), self.experts)
        )
        sums = torch.cat([chosen, received.flatten(), table.sum(-1)])
        # counts go beyond the 2²⁴ of float32
        self.sums = wide(sums) if self.sums is None else self.sums.add_(sums)

    def take(self, device: torch.device) -> Tensor:
        """The sums, on `device`, and start anew; zeros where the router did not run."""
        self._sum_calls()
        sums, self.sums = self.sums, None
        if sums is None:
            return wide(torch.zeros(self.experts * (1 + self.tasks) + len(self.columns), device=device))
        return sums.to(device)

    def report(self, sums: Tensor) -> Report | None:
        """What the sums of a window, on the CPU, say; None where no row was seen."""
        n = self.experts * (1 + self.tasks)
        chosen, received = sums[: self.experts], sums[self.experts : n].view(self.tasks, self.experts)
        total = dict(zip(self.columns, sums[n:].tolist(), strict=True))
        rows = total["rows"]
        if not rows:
            return None
        numbers = of_load(chosen)
        if self.chooses:
            numbers["collapse"] = concentration(chosen, 1 if self.router.k is None else self.router.k)
        if not self.weighted and (received != 0).any():  # an adapter may give no weights
            numbers["importance_cv"] = of_load(received.sum(0))["load_cv"]
        numbers["confidence"] = total["confidence"] / rows
        numbers["entropy"] = total["entropy"] / rows / math.log(self.experts)
        if total.get("limited"):
            numbers["dropped"] = total["dropped"] / total["limited"]
        if self.counts_used:
            numbers |= {"experts_used": total["used"] / rows, "unserved": total["unserved"] / rows}
        if self.selects:
            numbers["frozen_bits"] = total["frozen"] / rows
        tasks = received / (rows / self.tasks) if self.group is not None else None
        return Report(shares(chosen), numbers, tasks, choices=rows * (self.router.k or 1))

    def _table(self, call: Call) -> Tensor:
        """(columns, T)."""
        scores = call.seen().scores.detach().T  # (E, T): with few experts a softmax over the last dimension is slow
        scores = at_least_float32(scores)
        p = scores.softmax(0) if call.logits is not None else distribution(scores, 0)
        confidence = p.amax(0)
        columns = [torch.ones_like(confidence), confidence, -(p.clamp_min(1e-30).log_() * p).sum(0)]
        if self.limits:
            kept = call.limit
            none = torch.zeros_like(confidence)
            columns += [none, none] if kept is None else [none + kept.shape[-1], (~kept).sum(-1).to(p.dtype)]
        if self.counts_used:
            assert call.final is not None
            used = (call.final != 0).sum(-1).to(p.dtype)
            columns += [used, (used == 0).to(p.dtype)]
        if self.gamma is not None:
            assert call.z is not None
            columns.append((call.z.abs() >= self.gamma / 2).to(p.dtype).mean((-1, -2)))
        return torch.stack(columns)

    def _received(self, call: Call) -> Tensor:
        """(tasks, E): sum of the weights, what was dropped left out."""
        if call.final is not None:
            return counted_rows(call.final, call.mask).reshape(-1, self.tasks, self.experts).sum(0)
        zeros = torch.zeros(self.experts, device=call.seen().scores.device)
        if call.weights is None or call.assigned is None:
            return zeros[None]
        weights = counted_rows(call.weights.float(), call.mask)
        weights = weights if call.limit is None else torch.where(call.limit, weights, 0)
        return zeros.scatter_add_(0, call.assigned.flatten(), weights.flatten())[None]


def wide(sums: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return sums.to(torch.float32 if sums.device.type == "mps" else torch.float64)


def distribution(q: Tensor, dim: int = -1) -> Tensor:
    """Weights divided by their sum over `dim`: DSelect-k loses mass where E is no power of two."""
    return q / q.sum(dim, keepdim=True).clamp_min(1e-20)


def shares(load: Tensor) -> Tensor:
    """(E,) divided by its sum."""
    return (load / load.sum().clamp_min(1e-20)).float()


def of_load(load: Tensor) -> dict[str, float]:
    """`load_cv`, `max_violation`, `load_entropy` and `dead` of a load (E,)."""
    found = {name: float(value) for name, value in load_statistics(load).items()}
    return {
        "load_cv": found["cv"], "max_violation": found["max_violation"], "load_entropy": found["entropy"], "dead": found["dead"],
    }  # fmt: skip


def concentration(load: Tensor, k: int) -> float:
    """How far a load (E,) is on its way to collapse: (s − k/E) / (1 − k/E), s the share of the k experts with the most.

    0 where all get the same, 1 where k experts get all, which is what a router that chooses k experts for all rows alike gives.
    """
    fair = k / len(load)
    if fair >= 1:
        return 0.0
    top = load.topk(k).values.sum() / load.sum().clamp_min(1e-20)
    return float((top - fair) / (1 - fair))

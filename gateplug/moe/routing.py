"""What every gate of a mixture is: rows in, weights over experts out, and one place where regularisers and monitors look on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gateplug.core.errors import real_numbers, whole_numbers
from gateplug.core.gate import Gate
from gateplug.moe.functional import apply_capacity, expert_capacity
from gateplug.moe.rows import at_least_float32, check_mask, cleared, masked

Drop = Literal["position", "score"]


class Routing(NamedTuple):
    """What a gate decided for R rows (tokens, samples; for a gate of several tasks, rows × tasks)."""

    weights: Tensor
    """(R, experts): q, zero where an expert is not used."""
    assigned: Tensor | None
    """(R, k) int64: the chosen experts; None where their number differs from row to row (expert choice)."""
    logits: Tensor | None
    """(R, experts): raw scores; None for a gate that has none (DSelect-k)."""
    slots: Tensor | None = None
    """(R, k): the weights of `assigned`, where these are all the weights."""
    kept: Tensor | None = None
    """(R, k) bool: what a capacity has left of `assigned`."""
    load: Tensor | None = None
    """(R, experts): of a noisy gate, the chance of each choice under new noise, with a gradient; its sum is the smooth load."""
    masked: bool = False
    """Rows of padding are left out already."""
    q: Tensor | None = None
    """(R, experts): the weights as they were decided, of a gate that has no logits."""
    selectors: Tensor | None = None
    """(R, k, experts): what each selector of DSelect-k puts on the experts, with a gradient."""
    z: Tensor | None = None
    """(R, k, bits): the logits of the bits of DSelect-k's selectors, without a graph."""


class Tap(nn.Module):
    """Where others look on: the identity on a :class:`Routing`, called by the gate whenever it has decided."""

    def forward(self, routing: Routing) -> Routing:
        """Return what came."""
        return routing


@dataclass(frozen=True)
class Ramp:
    """A factor that goes linearly from `start` to `end` within `steps` optimizer steps, and stays there.

    Args:
        start: ≥ 0.
        end: ≥ 0.
        steps: ≥ 1.
        after: optimizer steps before the ramp begins, ≥ 0; until then the factor is `start`.

    Raises:
        ValueError: a value out of its range.
        TypeError: one that is no number.
    """

    start: float
    end: float
    steps: int
    after: int = 0

    def __post_init__(self) -> None:
        real_numbers(start=self.start, end=self.end)
        whole_numbers(steps=self.steps, after=self.after)
        for name, value in (("start", self.start), ("end", self.end)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} of a Ramp must be a finite number ≥ 0")
        if self.after < 0:
            raise ValueError(f"after={self.after!r} of a Ramp must be ≥ 0: the optimizer steps before it begins")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps!r} of a Ramp must be ≥ 1: the optimizer steps from start to end")

    def at(self, steps: Tensor) -> Tensor:
        """The factor in the step after `steps` optimizer steps; the first step counts as 1."""
        return self.start + (self.end - self.start) * ((steps + 1 - self.after) / self.steps).clamp(0.0, 1.0)


class ExpertGate(Gate):
    """Base of the gates: input `(…, dim)` to weights `(…, experts)`, zeros where an expert is not used.

    Computed in float32 or more, also under autocast.

    Args:
        experts: number of experts E, ≥ 2.
        k: experts that a row may use, 1 … E.
        dim: width of the input, which then decides row by row; None for one choice for all rows (*static*).
        tasks: number of choices side by side, the weights are then `(…, tasks, experts)`; None for one.

    Raises:
        ValueError: a number out of its range.
        TypeError: one that is no whole number.
    """

    room: ClassVar[str] = "moe"
    axes: tuple[str, ...] = ("expert",)  # type: ignore[misc]
    couples_samples: ClassVar[bool] = False
    """Whether the choice for one row depends on the other rows of its batch."""
    limits: ClassVar[bool] = False
    """Whether it chooses exactly k experts a row, so that the load of an expert can be limited."""
    label: str = ""
    """Name in the model, for messages; set by whoever knows it."""

    def __init__(self, experts: int, k: int, dim: int | None = None, tasks: int | None = None) -> None:
        super().__init__()
        whole_numbers(experts=experts, k=k, **{n: v for n, v in (("dim", dim), ("tasks", tasks)) if v is not None})
        if experts < 2:
            raise ValueError(f"experts={experts} must be at least 2: with one there is nothing to choose")
        if not 1 <= k <= experts:
            raise ValueError(f"k={k} must lie in 1 … {experts}, the number of experts")
        for name, value in (("dim", dim), ("tasks", tasks)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None")
        self.experts, self.k, self.dim, self.tasks = experts, k, dim, tasks
        if tasks is not None:
            self.axes = ("task", "expert")
        self.tap = Tap()

    @property
    def static(self) -> bool:
        """One choice for all rows."""
        return self.dim is None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights of the experts.

        Args:
            x: (…, dim); a static gate takes any width.
            mask: (…) bool, False for rows that take no part; their weights are zero.

        Returns:
            (…, experts), or (…, tasks, experts) for a gate of several tasks.
        """
        lead = x.shape[:-1]
        check_mask(mask, lead)
        rows = x.reshape(-1, x.shape[-1])
        tail = (self.experts,) if self.tasks is None else (self.tasks, self.experts)
        if self.static:
            weights = self.route(rows).weights.reshape(tail).expand(*lead, *tail)
            return weights if mask is None else cleared(weights, mask)

        def run(rows: Tensor, _: Tensor, without_padding: bool) -> Tensor:
            return self.route(rows, masked=without_padding).weights.reshape(-1, *tail)

        return masked(rows, rows, mask, run).reshape(*lead, *tail)

    def route(self, rows: Tensor, capacity_factor: float | None = None, drop: Drop = "position", masked: bool = False) -> Routing:
        """Decide for rows `(R, dim)`, all of which count; a static gate decides once, whatever the rows.

        Args:
            rows: (R, dim).
            capacity_factor: an expert takes at most ⌈factor · R · k / E⌉ rows; None for no limit.
            drop: who goes when it is full, see :func:`gateplug.moe.functional.apply_capacity`.
            masked: rows of padding are left out already.
        """
        if self.dim is not None and rows.shape[-1] != self.dim:
            raise ValueError(f"{self._named()} takes rows of width {self.dim}, and got {tuple(rows.shape)}")
        with torch.autocast(rows.device.type, enabled=False):
            routing = self.decide(at_least_float32(rows))
            self._check_finite(routing)
            if capacity_factor is not None:
                routing = self._limited(routing, capacity_factor, drop)
        tapped: Routing = self.tap(routing._replace(masked=masked or self.static))
        if self.recording:
            used = tapped.weights if self.static else (tapped.weights != 0).float()
            self.record(used.reshape(-1, *(() if self.tasks is None else (self.tasks,)), self.experts))
        return tapped

    def weights(self) -> Tensor:
        """Weights (1 or tasks, experts) of a static gate, without a graph.

        Raises:
            ValueError: the gate chooses row by row.
        """
        if not self.static:
            raise ValueError(f"{self._named()} chooses row by row: call it on rows")
        training, self.training = self.training, False  # no terms, no noise
        try:
            with torch.no_grad():
                weights = self.decide(torch.zeros(1, 1)).weights
        finally:
            self.training = training
        self._check_chosen(weights)
        return weights

    def decide(self, rows: Tensor) -> Routing:
        """The gate itself: rows `(R, dim)`, in float32 or more, to a routing of R rows (1 or `tasks` rows when static)."""
        raise NotImplementedError(f"{type(self).__name__} must define decide(rows) -> Routing")

    def check_capacity(self, factor: float) -> None:
        """Raise ValueError where a capacity has no meaning."""
        if not self.limits or self.static:
            why = "makes one choice for all rows" if self.static else "does not choose exactly k experts a row"
            raise ValueError(f"{self._named()} {why}: it takes no capacity_factor={factor}")

    def _limited(self, routing: Routing, factor: float, drop: Drop) -> Routing:
        self.check_capacity(factor)
        assert routing.assigned is not None
        assert routing.slots is not None
        capacity = expert_capacity(len(routing.assigned), self.experts, self.k, factor)
        kept = apply_capacity(routing.assigned, routing.slots.detach(), self.experts, capacity, drop)
        slots = routing.slots * kept
        weights = torch.zeros_like(routing.weights).scatter(-1, routing.assigned, slots)
        return routing._replace(weights=weights, slots=slots, kept=kept)

    def _check_finite(self, routing: Routing) -> None:
        weights = routing.weights.detach()
        # reading a value halts a GPU; there the ExpertMonitor says it
        if weights.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if not bool(weights.sum().isfinite()):
            raise ValueError(f"{self._named()} got rows that are not finite, or has parameters that are not: there is no choice")
        if self.static:
            self._check_chosen(weights)

    def _check_chosen(self, weights: Tensor) -> None:
        """Raise where a static gate has chosen nothing: selectors may come to codes that stand for no expert."""
        if bool((weights.sum(-1) == 0).any()):
            raise ValueError(
                f"{self._named()} has chosen no expert: all its selectors stand at codes of {self.experts} or more. Start anew "
                "(gate.reset_parameters()) with a larger reachability, or take a power of two of experts"
            )

    def _named(self) -> str:
        return f"{self.label} ({self})" if self.label else str(self)

    def extra_repr(self) -> str:
        """The numbers."""
        numbers = {"experts": self.experts, "k": self.k, "dim": self.dim, "tasks": self.tasks}
        return ", ".join(f"{name}={value}" for name, value in numbers.items() if value is not None)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

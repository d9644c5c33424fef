"""Noticing from the loss that the task has changed: a state machine without anything else, one call a training batch.

After the rule of arXiv 2306.01690 (official code); each context is compared to its own losses, by a threshold that cross-entropy
allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Any]
"""`active` (int), `losses` (for each context its last losses) and `confidence` (for each context, in [0, 1])."""
Event = tuple[str, int, int]
"""(kind, from, to): kind is `return` for a known context, `new` for one that is opened."""


def mean_loss(state: State, context: int, window: int = 50) -> float:
    """Mean of a context's last window − 1 losses; nan where there is none."""
    held = state["losses"][context][-(window - 1) :]
    return sum(held) / len(held) if held else math.nan


def new_state() -> State:
    """One context, of which nothing is known."""
    return {"active": 0, "losses": [[]], "confidence": [0.0]}


def deviates(state: State, context: int, loss: float, window: int = 50, threshold: float = 1.5) -> bool:
    """Whether a loss is out of what a context is used to: above `threshold` times its mean."""
    return loss > threshold * mean_loss(state, context, window)  # False for nan


def detector_step(
    state: State,
    loss: float,
    try_context: Callable[[int], float],
    window: int = 50,
    threshold: float = 1.5,
    confidence: float = 0.9,
    rate: float = 0.005,
) -> tuple[State, Event | None]:
    """Look at the loss of a batch, before the step.

    Args:
        state: not changed.
        loss: of the batch in the active context; one that is not finite is not entered and raises no alarm.
        try_context: c → loss of the batch in context c; asked only after an alarm.
        window: losses that are kept of each context, ≥ 2; all but one of them are averaged.
        threshold: of the ratio of a loss to that mean, above which it deviates.
        confidence: in [0, 1): an alarm needs more of it; it grows with every batch that does not deviate.
        rate: of that growth, q ← q + rate · (1 − q).

    Returns:
        The state afterwards, and what happened: None, or (kind, from, to).
    """
    active: int = state["active"]
    losses, sure = [list(held) for held in state["losses"]], list(state["confidence"])
    if not math.isfinite(loss):
        return {"active": active, "losses": losses, "confidence": sure}, None
    event: Event | None = None
    if deviates(state, active, loss, window, threshold) and sure[active] > confidence:
        found = _best(state, active, try_context, window, threshold)
        if found is not None:
            to, measured = found
            losses[to] = [*losses[to], measured][-window:]
            event = ("return", active, to)
        else:
            to = len(losses)
            losses.append([])
            sure.append(0.0)
            event = ("new", active, to)
        active = to
    else:
        sure[active] += rate * (1 - sure[active])
        losses[active] = [*losses[active], loss][-window:]
    return {"active": active, "losses": losses, "confidence": sure}, event


def _best(
    state: State, active: int, try_context: Callable[[int], float], window: int, threshold: float
) -> tuple[int, float] | None:
    """The known context in which the batch is most as usual, unless it deviates there too; with the loss there."""
    ratios = []
    for context in range(len(state["losses"])):
        if context != active:
            measured = try_context(context)
            ratio = measured / mean_loss(state, context, window)
            ratios.append((ratio if math.isfinite(ratio) else math.inf, context, measured))
    if not ratios:
        return None
    ratio, context, measured = min(ratios)
    usual = math.isfinite(ratio) and not deviates(state, context, measured, window, threshold)
    return (context, measured) if usual else None


def detector_trace(
    losses: Tensor, window: int = 50, threshold: float = 1.5, confidence: float = 0.9, rate: float = 0.005
) -> Tensor:
    """Run the detector over a recorded stream.

    Args:
        losses: (S, C_max), the loss of context c on batch s.
        window: as in :func:`detector_step`, like the others.
        threshold: as there.
        confidence: as there.
        rate: as there.

    Returns:
        (S,) int64, the active context after each batch.

    Raises:
        ValueError: a context is needed that `losses` has no column for.
    """
    state = new_state()
    out = []
    for row in losses.tolist():
        state, _ = detector_step(state, row[state["active"]], row.__getitem__, window, threshold, confidence, rate)
        if state["active"] >= len(row):
            raise ValueError(f"context {state['active']} is opened, and the losses have {len(row)} columns")
        out.append(state["active"])
    return torch.tensor(out, dtype=torch.int64)


class Detection(NamedTuple):
    """Alarms against the truth."""

    hits: int
    """Switches of which an alarm told within the tolerance."""
    misses: int
    false_alarms: int
    delay: float
    """Mean number of batches from a switch to its alarm; nan without a hit."""


def detection(alarms: Sequence[int], switches: Sequence[int], tolerance: int = 50) -> Detection:
    """Compare alarms with the switches that there were.

    Args:
        alarms: batches at which a context was changed.
        switches: first batches of the tasks, that of the first task left out.
        tolerance: batches after a switch in which the first alarm is its hit; all other alarms are false.
    """
    left, delays = sorted(alarms), []
    for start in sorted(switches):
        hit = next((a for a in left if start <= a < start + tolerance), None)
        if hit is not None:
            left.remove(hit)
            delays.append(hit - start)
    delay = sum(delays) / len(delays) if delays else math.nan
    return Detection(len(delays), len(switches) - len(delays), len(left), delay)


def purity(counts: Tensor) -> Tensor:
    """Share of batches in a context that are of the context's most frequent task.

    Args:
        counts: (contexts, tasks), batches.
    """
    return counts.amax(1).sum() / counts.sum().clamp_min(1)

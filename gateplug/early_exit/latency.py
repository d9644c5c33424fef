"""What exits take in time, measured on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gateplug.core.batches import Call, rows_of
from gateplug.core.cost import timed
from gateplug.core.errors import whole_numbers
from gateplug.early_exit.decision import Decision, Leaving

if TYPE_CHECKING:
    from gateplug.early_exit.runner import ExitRunner

_BUDGET, _LEAST, _MOST = 0.3, 5, 60
"""Seconds that the rounds of one measurement may take, and the fewest and most of them."""
_CALLS = 32
"""The most different batches that an operating point is run on."""


def check_sizes(latency: Sequence[int]) -> None:
    """Raise TypeError or ValueError for anything but batch sizes."""
    if isinstance(latency, str) or not isinstance(latency, Sequence):
        raise TypeError(f"latency={latency!r} must be a list of batch sizes, or () for no measurement")
    whole_numbers(**{f"latency[{i}]": batch for i, batch in enumerate(latency)})
    if any(batch < 1 for batch in latency):
        raise ValueError(f"latency={list(latency)} must be batch sizes ≥ 1")


class Times(NamedTuple):
    """Seconds of a batch of one size."""

    batch: int
    median: Tensor
    """(L,) float64: p50 when all samples leave at each exit; the last runs everything."""
    high: Tensor
    """(L,) p95."""
    head: Tensor
    """(K,) p50 of head, gate, score and decision of each exit alone."""


@torch.inference_mode()
def exit_times(runner: ExitRunner, call: Call, samples: int, batch: int) -> Times:
    """Measure a runner's exits; all in turns, so that a burst of somebody else's load meets them alike.

    Args:
        runner: with exits 0 … K.
        call: arguments of its network, of `samples` samples.
        samples: rows of the call.
        batch: size to measure at; rows are repeated as needed.
    """
    args, kwargs = taken(call, samples, batch)
    exits = len(runner.branches) + 1
    works: list[Callable[[], object]] = [
        lambda at=at: runner.run(Leaving(runner.gate, runner.mode, at), args, kwargs)  # type: ignore[misc]
        for at in range(exits)
    ]
    works += [_head(runner, hidden, i) for i, hidden in enumerate(_hidden(runner, args, kwargs))]
    seconds = in_turns(works)
    high = seconds[:, :exits].quantile(0.95, dim=0)
    middle = seconds.median(0).values
    return Times(batch, middle[:exits], high, middle[exits:])


Target = tuple[str, float, float, float]
"""An operating point: what it is, threshold, cost, accuracy."""
Point = tuple[float, float]
"""p50 and p95 in seconds."""


@torch.inference_mode()
def measured_points(runner: ExitRunner, targets: Sequence[Target], call: Call, samples: int, batch: int) -> list[Point]:
    """Seconds of real batches at some thresholds: other samples in each batch, and each leaves where it does.

    Args:
        runner: its rule and mode count.
        targets: operating points.
        call: arguments of the network.
        samples: rows of the call.
        batch: size; rows are repeated as needed.
    """
    calls = [taken(call, samples, batch, start) for start in range(0, samples, batch)][:_CALLS]

    def work(threshold: float, at: Call) -> Callable[[], object]:
        return lambda: runner.run(Decision(runner.gate, runner.mode, threshold), *at)

    found = []
    for _, threshold, *_ in targets:
        seconds = in_turns([work(threshold, at) for at in calls], least=1).flatten()
        found.append((float(seconds.quantile(0.5)), float(seconds.quantile(0.95))))
    return found


def taken(call: Call, samples: int, batch: int, start: int = 0) -> Call:
    """The call for `batch` of its samples, from `start` on and around."""
    rows = (torch.arange(batch) + start) % samples
    args, kwargs = rows_of(call, rows, samples)
    return args, kwargs


def in_turns(works: Sequence[Callable[[], object]], least: int = _LEAST) -> Tensor:
    """Seconds (rounds, works) float64 of each; once before that counts."""
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) <= least or (time.perf_counter() - begin < _BUDGET and len(rounds) <= _MOST):
        rounds.append([timed(work) for work in works])
        begin = begin if len(rounds) > 1 else time.perf_counter()
    return torch.tensor(rounds[1:], dtype=torch.float64)


def _hidden(runner: ExitRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What each exit reads."""
    flow, found = runner.stages.begin(args, kwargs), []
    for i in range(runner.stages.blocks):
        flow.block(i)
        found += [flow.hidden] * (i in runner.stages.branches)
    return found


def _head(runner: ExitRunner, hidden: Tensor, number: int) -> Callable[[], object]:
    branch = runner.branches[number]
    places = runner.stages.places

    def work() -> None:
        runner.stages.place(places)
        leave = Decision(runner.gate, runner.mode, 0.5)(branch.answer(hidden), branch.gate)
        int(leave.sum())

    return work


def dear_exits(times: Times, left: Tensor) -> list[tuple[int, float, float]]:
    """Exits that cost more than they save: (exit, seconds of the exit, seconds that it saves), for a batch.

    An exit saves, for the share of those who come to it and leave, what running on to the end would take.

    Args:
        times: measured.
        left: (L,) share of all samples that leave at each exit.
    """
    found = []
    for i, head in enumerate(times.head.tolist()):
        arriving = float(left[i:].sum())
        rate = float(left[i]) / arriving if arriving > 0 else 0.0
        rest = max(float(times.median[-1] - times.median[i]), 0.0)
        if arriving > 0 and head >= rate * rest:
            found.append((i, head, rate * rest))
    return found

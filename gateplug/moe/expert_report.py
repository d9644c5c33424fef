"""What is done with the reports of a window: read them from the device, write them to loggers, warn of what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn

from gateplug.core.errors import listed
from gateplug.core.figure import save
from gateplug.core.processes import world_size
from gateplug.moe.static_tally import StaticTally
from gateplug.moe.tally import Report, Tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 8
"""Choices an expert must have had on average before a load says anything about a router."""
COLUMNS = {
    "load_cv": "load cv", "max_violation": "max violation", "dead": "dead", "entropy": "entropy",
    "confidence": "confidence", "experts_used": "experts used", "dropped": "dropped",
}  # fmt: skip


def read(tallies: Sequence[Tally | StaticTally], device: torch.device) -> dict[str, Report]:
    """The reports of all routers over all processes, by name, in one exchange and one transfer; sums start anew.

    A router that saw no row on any process has none.
    """
    summed, fixed = [t for t in tallies if t.reduced], [t for t in tallies if not t.reduced]
    taken = {t.title: t.take(device) for t in (*summed, *fixed)}
    flat = torch.cat([taken[t.title] for t in summed]) if summed else torch.zeros(0, device=device)
    if len(flat) and world_size() > 1:
        dist.all_reduce(flat)
    values = torch.cat([flat, *(taken[t.title] for t in fixed)]).cpu().double()
    ends = dict(zip(taken, accumulate(len(part) for part in taken.values()), strict=True))
    reports = {t.title: t.report(values[ends[t.title] - len(taken[t.title]) : ends[t.title]]) for t in tallies}
    return {name: report for name, report in reports.items() if report is not None}


def write(loggers: Sequence[Any], reports: Mapping[str, Report], step: int) -> None:
    """Send the reports to loggers."""
    scalars = {f"moe/{name}/{quantity}": value for name, r in reports.items() for quantity, value in r.numbers.items()}
    for logger in loggers:
        logger.log_metrics(scalars, step=step)
        board = getattr(logger, "experiment", None)
        if board is None or not hasattr(board, "add_histogram"):
            continue
        for name, report in reports.items():
            if report.load.isfinite().all():
                board.add_histogram(f"moe/{name}/load", report.load, global_step=step)
            if report.used is not None and len(report.used) > 1:
                board.add_histogram(f"moe/{name}/experts_used_by_task", report.used, global_step=step)


def show(figures: Mapping[str, Figure], loggers: Sequence[Any], folder: Path | None, step: int) -> None:
    """Send pictures to loggers that take them, and write them into a folder if there is one."""
    for name, figure in figures.items():
        for logger in loggers:
            board = getattr(logger, "experiment", None)
            if board is not None and hasattr(board, "add_figure"):
                board.add_figure(f"moe/{name}", figure, global_step=step, close=False)
        if folder is not None:
            save(figure, folder / f"moe_{name}.png")


def table(reports: Mapping[str, Report]) -> tuple[list[str], list[list[str]]]:
    """Titles of columns, and a row a router."""
    used = [name for name in COLUMNS if any(name in r.numbers for r in reports.values())]
    rows = [[name, *(f"{r.numbers[c]:.3g}" if c in r.numbers else "" for c in used)] for name, r in reports.items()]
    return ["router", *(COLUMNS[name] for name in used)], rows


def task_tables(tallies: Sequence[Tally | StaticTally], reports: Mapping[str, Report]) -> dict[str, torch.Tensor]:
    """Weights (tasks, E) by name of a set of tasks: those of one gate, or of all gates of one mixture."""
    sets: dict[str, list[torch.Tensor]] = {}
    for tally in tallies:
        report = reports.get(tally.title)
        if tally.group is not None and report is not None and report.tasks is not None:
            sets.setdefault(tally.group, []).append(report.tasks)
    return {name: torch.cat(rows) for name, rows in sets.items()}


class Alarm:
    """Says, once a router, that it collapsed, that what it sees is not finite, or that it never ran.

    Args:
        collapse: from which value of `collapse` on a router counts as collapsed; None for never.
    """

    def __init__(self, collapse: float | None) -> None:
        self.collapse = collapse
        self._bad: set[str] = set()
        self._said: set[tuple[str, str]] = set()

    def check(self, tallies: Sequence[Tally | StaticTally], reports: Mapping[str, Report], batches: int) -> None:
        """Look at the reports of a window of that many batches."""
        silent = [t.title for t in tallies if t.title not in reports and not self._known(t.title, "silent")]
        if silent:
            rank_zero_warn(
                f"no row was counted at {listed(silent)} in {batches} training batches: the router was not called, or is in eval "
                "mode (Hugging Face's from_pretrained gives models in eval mode: call .train()), or its padding is not known"
            )
        broken, collapsed = [], []
        for tally in tallies:
            report = reports.get(tally.title)
            if report is None:
                continue
            if math.isnan(report.numbers["confidence"]):
                broken += [tally.title] * (not self._known(tally.title, "finite"))
            elif isinstance(tally, Tally) and self._collapsed(tally, report) and not self._known(tally.title, "collapse"):
                k = tally.router.k or 1
                top, dead = float(report.load.topk(k).values.sum()), report.numbers["dead"]
                collapsed.append(
                    f"{tally.title} ({top:.0%} of its load went to {k} of {tally.experts} experts, {dead:.0f} got nothing)"
                )
        if broken:
            rank_zero_warn(
                f"what routers get, or their parameters, is not finite (NaN or infinite) in the last {batches} training batches; "
                f"they make no choice: {listed(broken)}. Lower the learning rate, clip gradients, or look at what comes before "
                "the first of them"
            )
        if collapsed:
            rank_zero_warn(
                f"routers have collapsed, in the last {batches} training batches as in those before: {listed(collapsed, 6)}. "
                "Balance them with gp.RegulateRouters(load_balance=0.01), or a larger factor, or bias_rate, or give them a lower "
                "learning rate"
            )

    def _collapsed(self, tally: Tally, report: Report) -> bool:
        """Whether this window and the one before were bad; the first window of a training alone may be a bad start."""
        if self.collapse is None or "collapse" not in report.numbers or report.choices < ENOUGH * tally.experts:
            return False
        before = tally.title in self._bad
        if report.numbers["collapse"] < self.collapse and report.numbers["dead"] <= tally.experts / 2:
            self._bad.discard(tally.title)
            return False
        self._bad.add(tally.title)
        return before

    def _known(self, router: str, what: str) -> bool:
        """Whether this was said before; from now on it was."""
        known = (router, what) in self._said
        self._said.add((router, what))
        return known

"""What a fit with exits has come to: tables, pictures and CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gateplug.core.batches import Call
from gateplug.core.cost import still
from gateplug.core.errors import PlugError
from gateplug.core.figure import heat_map, save
from gateplug.core.table import print_table
from gateplug.early_exit.diagrams import draw_latency, draw_reliability
from gateplug.early_exit.latency import Point, Target, Times, dear_exits, exit_times, measured_points
from gateplug.early_exit.operating import SHARES, at_equal_cost, dearest, draw, write_csv, write_latency
from gateplug.early_exit.runner import ExitRunner
from gateplug.early_exit.thresholds import sweep
from gateplug.early_exit.validation import RULES, Seen

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(trainer: Trainer, seen: Seen, cost: Tensor, history: Sequence[Tensor]) -> None:
    """Tables and pictures of the last validation."""
    left = [*(str(i) for i in range(len(cost) - 1)), "network"]
    columns = ("exit", "cost", "accuracy of all", "calibration error", "share that leaves")
    numbers = zip(left, cost.tolist(), seen.accuracy.tolist(), seen.calibration[:-1].tolist(), seen.left.tolist(), strict=True)
    print_table("Exits in the last validation", columns, [(n, *(f"{x:.4f}" for x in row)) for n, *row in numbers])
    print_table("Accuracy at equal cost (validation)", ("cost at most", *seen.points), at_equal_cost(seen.points))
    title = f"early_exit: operating points at step {trainer.global_step}"
    publish(trainer, "operating_points", draw(seen.points, cost, seen.accuracy, (seen.cost, seen.answered), title))
    publish(trainer, "reliability", draw_reliability(seen, f"early_exit: reliability at step {trainer.global_step}"))
    if len(history) > 1:
        shares = torch.stack(list(history), 1)
        rows = {f"exit {i}" if i < len(shares) - 1 else "network": share for i, share in enumerate(shares)}
        publish(
            trainer, "over_training", heat_map(rows, "early_exit: who leaves where", "validation", "exit", "share of samples")
        )
    if _written(trainer):
        write_csv(seen.points, _folder(trainer) / "early_exit_operating_points.csv")


def time_exits(
    trainer: Trainer, module: LightningModule, seen: Seen, example: tuple[Call, int], batches: Sequence[int]
) -> list[Times]:
    """Measure the exits on this machine, and say, draw and write it.

    Args:
        trainer: of the fit.
        module: with exits.
        seen: the last validation.
        example: a call of the network, and its samples.
        batches: sizes to measure at.
    """
    try:
        with still(module):
            runner = ExitRunner(module)
            times = [exit_times(runner, *example, batch=batch) for batch in batches]
            targets = _targets(seen, runner.gate)
            points = [measured_points(runner, targets, *example, batch=batch) for batch in batches]
    except PlugError as error:  # trains, and cannot be run by blocks
        rank_zero_warn(f"EarlyExit: exits are not timed: {error}")
        return []
    rows = []
    names = [*(str(i) for i in range(len(seen.left) - 1)), "network"]
    for i, name in enumerate(names):
        rows.append((name, *(f"{1e3 * float(x):.3g}" for t in times for x in (t.median[i], t.high[i]))))
    heads = [f"{what}, batch {batch} (ms)" for batch in batches for what in ("p50", "p95")]
    print_table("Time of a batch that leaves at each exit, on this machine", ("exit", *heads), rows)
    columns = ("cost at most", "threshold", "cost", "accuracy", *heads)
    every = [
        (share, f"{threshold:.4g}", f"{cost:.4f}", f"{accuracy:.4f}", *(f"{1e3 * x:.3g}" for p in points for x in p[n]))
        for n, (share, threshold, cost, accuracy) in enumerate(targets)
    ]
    print_table(f"Operating points of {runner.gate}, run on this machine", columns, every)
    publish(trainer, "latency", latency_figure(seen, runner.gate, times, points, targets))
    if _written(trainer):
        write_latency(runner.gate, targets, dict(zip(batches, points, strict=True)), _folder(trainer) / "early_exit_latency.csv")
    return times


def warn_dear(times: Sequence[Times], seen: Seen) -> None:
    """Say which exits cost more than they save on this machine."""
    for t in times:
        for number, head, saved in dear_exits(t, seen.left):
            rank_zero_warn(
                f"EarlyExit: exit {number} costs more than it saves on this machine, at batch {t.batch}: its head and gate take "
                f"{1e3 * head:.3g} ms, and the {float(seen.left[number]):.1%} of the samples that leave there save "
                f"{1e3 * saved:.3g} ms. Leave it out with at=…"
            )


def latency_figure(
    seen: Seen, rule: str, times: Sequence[Times], points: Sequence[Sequence[Point]], targets: Sequence[Target]
) -> Figure:
    """Accuracy against time: lines by the times of the exits, marks as run."""
    curves = {}
    for t in times:
        seconds = t.median.cummax(0).values
        curves[t.batch] = {name: sweep(seen.found[name], seconds, seen.found["correct"]) for name in RULES}
    marks = {
        t.batch: [(target[3], *p) for target, p in zip(targets, row, strict=True)] for t, row in zip(times, points, strict=True)
    }
    whole = {t.batch: (float(t.median[-1]), float(seen.accuracy[-1])) for t in times}
    return draw_latency(curves, marks, whole, rule)


def publish(trainer: Trainer, name: str, figure: Figure) -> None:
    """Into TensorBoard, and as PNG beside it."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        board: Any = getattr(logger, "experiment", None)
        if hasattr(board, "add_figure"):
            board.add_figure(f"early_exit/{name}", figure, global_step=trainer.global_step, close=False)
    if _written(trainer):
        save(figure, _folder(trainer) / "figures" / f"early_exit_{name}.png")


def _targets(seen: Seen, rule: str) -> list[Target]:
    """(most that may be spent, threshold, cost, accuracy) of the points that are run, each other than the one before."""
    one = seen.points[rule]
    assert one.accuracy is not None
    found = [("in use", seen.threshold, seen.cost, seen.answered)]
    last = None
    for share in SHARES:
        place = dearest(one, share)
        if place is not None and place != last:
            last = place
            found.append((f"{share:g}", float(one.threshold[place]), float(one.cost[place]), float(one.accuracy[place])))
    return found


def can_time(trainer: Trainer) -> bool:
    """Whether this process holds the whole network and may run it while others do not."""
    whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    return whole and trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def _written(trainer: Trainer) -> bool:
    return trainer.is_global_zero and bool(trainer.loggers) and not trainer.fast_dev_run  # type: ignore[attr-defined]


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir)

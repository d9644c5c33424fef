"""The accuracy matrix of a stream as a heat map, as curves and as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from lightning import Trainer
from torch import Tensor

from gateplug.core.figure import heat_map, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _folder(trainer: Trainer) -> Path | None:
    """Where the run writes, on the first process alone."""
    folder = trainer.log_dir or trainer.default_root_dir  # a collective: asked on all ranks
    quiet = trainer.fast_dev_run or not trainer.loggers or not trainer.is_global_zero  # type: ignore[attr-defined]
    return None if quiet else Path(folder)


def write_matrix(trainer: Trainer, values: Tensor, tasks: Sequence[int]) -> None:
    """Write `accuracy_matrix.csv`: a line for each stretch that was measured, the first one of the untrained network."""
    folder = _folder(trainer)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = ["untrained", *(f"after task {task}" for task in tasks)]
    with (folder / "accuracy_matrix.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *(f"task {task}" for task in range(values.shape[1]))])
        for name, row in zip(names, values.tolist(), strict=True):
            if not all(isnan(value) for value in row):
                writer.writerow([name, *("" if isnan(value) else f"{value:.4f}" for value in row)])


def draw_matrix(trainer: Trainer, values: Tensor, tasks: Sequence[int]) -> None:
    """Draw the matrix, and accuracy over the tasks, as PNG in the run's folder and in TensorBoard."""
    folder = _folder(trainer)
    measured = (~values.isnan()).any(1).tolist()
    if folder is None or not any(measured):
        return
    rows = {f"{i}: task {t}": values[i] for i, t in enumerate(tasks) if measured[i]}
    pictures = {
        "accuracy_matrix": heat_map(rows, "accuracy on each task", "evaluated on task", "after training", "accuracy"),
        "accuracy": draw_curves(values, measured),
    }
    for name, figure in pictures.items():
        save(figure, folder / "figures" / f"continual_{name}.png")
        for logger in trainer.loggers:
            board = getattr(logger, "experiment", None)
            if board is not None and hasattr(board, "add_figure"):
                board.add_figure(f"continual/{name}", figure, global_step=trainer.global_step, close=False)


def draw_curves(values: Tensor, measured: Sequence[bool]) -> Figure:
    """Accuracy on the first task, on the task just trained, and over all tasks so far, after each stretch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    at = [i for i, known in enumerate(measured) if known]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    square = len(values) == values.shape[1]
    lines = {"mean over the tasks so far": [float(values[i, : i + 1 if square else None].nanmean()) for i in at]}
    if square:
        lines["the task just trained"] = [float(values[i, i]) for i in at]
    lines["the first task"] = [float(values[i, 0]) for i in at]
    for name, line in lines.items():
        axes.plot([i + 1 for i in at], line, marker="." if len(at) < 40 else None, label=name)
    axes.set_xlabel("tasks trained" if square else "stretches trained")
    axes.set_ylabel("accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure

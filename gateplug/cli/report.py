"""The table at the end of a run: metrics, cost, seconds, and where things were written."""

import inspect
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from gateplug.cli.record import Record, build_example
from gateplug.core import cost
from gateplug.core.answers import network


def show_result(
    trainer: L.Trainer,
    module: L.LightningModule,
    record: Record,
    metrics: dict[str, float],
    seconds: dict[str, float],
    folder: Path | None,
) -> None:
    """Print the result of a run; call it on the first process alone.

    Args:
        trainer: After the run.
        module: The module that was run.
        record: Knows how the network was called.
        metrics: By the name under which they were logged.
        seconds: Duration of each part of the run.
        folder: The run's folder. (``trainer.log_dir`` waits for all processes, so it is not asked here.)
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Result", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path that is cut cannot be copied
    for name, value in sorted(metrics.items()):
        table.add_row(name, _number(value))
    table.add_section()
    for row in cost_rows(network(module), record.example):
        table.add_row(*row)
    for name, value in seconds.items():
        table.add_row(f"seconds, {name}", f"{value:.1f}")
    table.add_section()
    for row in written(trainer, folder):
        table.add_row(*row)
    Console().print(table)


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"


def cost_rows(net: nn.Module, example: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Parameters, and the multiply-accumulates of one sample where the network's inputs are known."""
    parameters = list(net.parameters())
    rows = [("parameters", f"{sum(p.numel() for p in parameters):,}")]
    if example is None or not parameters:
        return rows
    try:
        args, kwargs = build_example(example, batch=1, device=parameters[0].device)
        if args and kwargs:
            kwargs = dict(inspect.signature(net.forward).bind(*args, **kwargs).arguments)
        macs = f"{cost(net, kwargs or args).macs:,}"
    except Exception as error:  # a result must not be lost because a network cannot be counted
        macs = f"not counted: {type(error).__name__}: {error}"
    return [*rows, ("multiply-adds per sample", macs)]


def written(trainer: L.Trainer, folder: Path | None) -> list[tuple[str, str]]:
    """Files and folders that the run wrote and that exist, relative to the working directory where they lie in it."""
    rows: list[tuple[str, Path]] = []
    if folder is not None and folder.is_dir():
        rows.append(("logs", folder))
    seen: set[str] = set()
    for callback in trainer.checkpoint_callbacks:
        for kind in ("best", "last"):
            path = getattr(callback, f"{kind}_model_path", "")
            if path and Path(path).exists() and path not in seen:
                seen.add(path)
                chosen = kind == "best" and getattr(callback, "monitor", None)  # without a metric the last is kept
                rows.append((f"checkpoint ({'best' if chosen else 'last'})", Path(path)))
    if folder is not None:
        rows += [("figure", path) for path in sorted(folder.rglob("*.png"))]
        rows += [("predictions", path) for path in sorted(folder.glob("predictions*.pt"))]
    return [(name, _short(path)) for name, path in rows]


def _short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)

"""How much of a network its contexts have used: scalars, warnings, a table and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from gateplug.continual.layers import Availability
from gateplug.core.figure import heat_map, save
from gateplug.core.table import print_table

FULL = 0.8
"""Share of a layer that is used up, above which a warning says what may help."""


class Usage:
    """Share of each layer that is used up, from one change of context to the next."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}

    def log(self, trainer: Trainer, availabilities: Mapping[str, Availability], warned: set[str]) -> None:
        """Read it, log it as `continual/<layer>/used`, and warn of layers that are nearly full or could not be measured."""
        used = {name: float(a.used()) for name, a in availabilities.items()}
        for name, share in used.items():
            self.history.setdefault(name, []).append(share)
        if trainer.is_global_zero and used:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics({f"continual/{name}/used": share for name, share in used.items()}, step=step)
        full = [name for name, share in used.items() if share > FULL and name not in warned]
        if full:
            warned.update(full)
            rank_zero_warn(
                f"GateON: {used[full[0]]:.0%} of {full[0]} is used up{_and(full)}. What cannot move is made up for by the "
                "read-out, which forgets. Wider layers, a smaller open_share or eta, relevance='parameter' or reactivation help"
            )
        lost = {name: int(a.skipped) for name, a in availabilities.items() if int(a.skipped)}
        if lost and "skipped" not in warned:
            warned.add("skipped")
            rank_zero_warn(
                f"GateON: relevance was not finite in {max(lost.values())} steps ({next(iter(lost))}); they were left out"
            )


def _and(names: list[str]) -> str:
    return f" (and more than {FULL:.0%} of {len(names) - 1} others)" if len(names) > 1 else ""


def show(trainer: Trainer, availabilities: Mapping[str, Availability], usage: Usage) -> None:
    """Print the table of what is used."""
    rows = [
        (name, f"{a.draft.numel():,}", f"{usage.history[name][-1]:.1%}", f"{float(a.draft.mean()):.3f}")
        for name, a in availabilities.items()
    ]
    if rows:
        print_table("Used by all contexts so far", ("layer", "units or weights", "used", "mean availability"), rows)


def draw_contexts(trainer: Trainer, opennesses: Mapping[str, Tensor]) -> None:
    """Draw contexts × units of each gated layer, as PNG in the run's folder and in TensorBoard."""
    folder = trainer.log_dir or trainer.default_root_dir  # a collective: asked on all ranks
    if trainer.fast_dev_run or not trainer.loggers:  # type: ignore[attr-defined]
        return
    _draw(trainer, Path(folder) / "figures", opennesses)


@rank_zero_only
def _draw(trainer: Trainer, folder: Path, opennesses: Mapping[str, Tensor]) -> None:
    for layer, values in opennesses.items():
        # units that open together stand together
        order = torch.argsort(values.argmax(0) * 2 - values.amax(0))
        rows = {str(c): row[order] for c, row in enumerate(values)}
        title = f"{layer}: gates of each context"
        figure = heat_map(rows, title, "unit (by the context in which it is most open)", "context")
        save(figure, folder / f"continual_contexts_{layer}.png")
        for logger in trainer.loggers:
            board = getattr(logger, "experiment", None)
            if board is not None and hasattr(board, "add_figure"):
                board.add_figure(f"continual/{layer}/contexts", figure, global_step=trainer.global_step, close=False)

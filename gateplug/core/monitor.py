"""GateMonitor: every gate of every method, in TensorBoard and as a picture."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gateplug.core.figure import heat_map, save
from gateplug.core.gate import Gate, Openness
from gateplug.core.plug import Plug
from gateplug.core.processes import world_size
from gateplug.core.table import print_table

QUANTITIES = ("openness_mean", "openness_min", "openness_max", "saturation")


class GateMonitor(Plug):
    """Show how open all gates are: scalars `<room>/<layer>/openness_mean|min|max` and `saturation`, histograms, heat maps.

    Openness is a value in [0, 1] per unit (channel, expert, exit …), averaged over one training batch; saturation is the
    share of the units below 0.05 or above 0.95. Gates are looked at on every `every_n_steps`-th training batch and on the
    last batch of an epoch in which that did not happen; on all other batches the monitor does nothing. The heat map of a
    method is drawn after epochs 1, 2, 4, 8 … and at the end, into TensorBoard and as `figures/<room>_gates.png` in the run's
    folder.

    Args:
        every_n_steps: training batches from one look to the next, ≥ 1.

    Raises:
        ValueError: `every_n_steps` < 1.
    """

    summary: ClassVar[str] = "shows every gate in TensorBoard: scalars, histograms, heat maps"
    room: ClassVar[str] = "core"
    attaches: ClassVar[bool] = False

    def __init__(self, every_n_steps: int = 50) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps!r} must be a whole number ≥ 1: the number of training batches from look to look"
            )
        self.every_n_steps = every_n_steps
        self._gates: dict[str, Gate] = {}
        self._last: dict[str, Openness] = {}
        self._folder: Path | None = None
        self._looked = False
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the gates; all plugs have attached theirs by now."""
        self._gates = {name: m for name, m in pl_module.named_modules() if isinstance(m, Gate) and m.room}
        self._last = {}
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: asked on all ranks
        self._folder = None if trainer.fast_dev_run else Path(folder) / "figures"  # type: ignore[attr-defined]
        if not self._gates:
            rank_zero_warn("GateMonitor finds no gates in this model: no plug in the Trainer has brought any")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new epoch was not looked at yet."""
        self._looked = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the gates to record the coming batch, if it is time."""
        count = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        # max_steps may end the run before the epoch's last batch
        ending = trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step + 1
        if count % self.every_n_steps == 0 or (ending and not self._looked):
            self._record(True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read what was recorded."""
        if not any(gate.recording for gate in self._gates.values()):
            return
        self._looked = True
        self._last = self._read()
        # the axis on which Lightning logs: batches that stepped, whatever the number of optimizers
        self._step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._record(False)
        if trainer.is_global_zero and self._last:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw after epochs 1, 2, 4, 8 …: many pictures where much changes, at little cost."""
        epochs = trainer.current_epoch + 1
        if epochs & (epochs - 1) == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last state, and print it."""
        self._draw(trainer)
        if self._last:
            rows = [(name, *(f"{v:.3f}" for v in q)) for name, q in self._quantities().items()]
            print_table("Gates at the end of the training", ("gate", "mean", "min", "max", "saturation"), rows)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no gate recording."""
        self._record(False)
        self._gates, self._last = {}, {}
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no gate recording."""
        self._record(False)
        super().on_exception(trainer, pl_module, exception)

    def _read(self) -> dict[str, Openness]:
        """The openness of all gates, over all processes; a gate may have run on some of them only."""
        local = {name: (o.values.float().cpu(), o.axes, o.rows) for name, g in self._gates.items() if (o := g.openness())}
        parts = [local]
        if (processes := world_size()) > 1:
            parts = [{} for _ in range(processes)]
            dist.all_gather_object(parts, local)
        found: dict[str, Openness] = {}
        for name in self._gates:
            seen = [part[name] for part in parts if name in part]
            rows = sum(n for _, _, n in seen)
            if seen:
                mean = torch.stack([values * (n / rows) for values, _, n in seen]).sum(0)
                found[name] = Openness(mean, seen[0][1], rows)
        return found

    def _record(self, on: bool) -> None:
        for gate in self._gates.values():
            gate.recording = on
            gate.reset()

    def _quantities(self) -> dict[str, tuple[float, ...]]:
        """(mean, min, max, saturation) of each gate, fetched from the device at once."""
        rows = [o.values.flatten() for o in self._last.values()]
        table = torch.stack([torch.stack([r.mean(), r.min(), r.max(), _saturation(r)]) for r in rows]).tolist()
        return dict(zip([self._title(name) for name in self._last], map(tuple, table), strict=True))

    def _title(self, name: str) -> str:
        return f"{self._gates[name].room}/{name}"

    def _write(self, trainer: Trainer) -> None:
        scalars = {
            f"{title}/{quantity}": value
            for title, values in self._quantities().items()
            for quantity, value in zip(QUANTITIES, values, strict=True)
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=self._step)
            board = getattr(logger, "experiment", None)
            if board is not None and hasattr(board, "add_histogram"):
                for name, openness in self._last.items():
                    board.add_histogram(f"{self._title(name)}/openness", openness.values.flatten(), global_step=self._step)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        rooms: dict[str, dict[str, Openness]] = defaultdict(dict)
        for name, openness in self._last.items():
            rooms[self._gates[name].room][name] = openness
        for room, gates in rooms.items():
            flat = {n: o.values for n, o in gates.items() if o.values.dim() == 1}
            pictures = {f"{room}_gates": (flat, next(iter(gates.values())).axes[-1], "layer")} if flat else {}
            for n, o in gates.items():
                if o.values.dim() == 2:
                    rows = {f"{o.axes[0]} {i}": row for i, row in enumerate(o.values)}
                    pictures[f"{room}_{n}"] = (rows, o.axes[1], o.axes[0])
            for name, (rows, across, down) in pictures.items():
                figure = heat_map(rows, f"{room}: openness at step {self._step}", across, down)
                for logger in trainer.loggers:
                    board = getattr(logger, "experiment", None)
                    if board is not None and hasattr(board, "add_figure"):
                        board.add_figure(f"{room}/{name}", figure, global_step=self._step, close=False)
                if self._folder is not None:
                    save(figure, self._folder / f"{name.replace(os.sep, '_')}.png")


def _saturation(values: Tensor) -> Tensor:
    return ((values < 0.05) | (values > 0.95)).float().mean()

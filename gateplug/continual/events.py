"""What a detector of contexts has noticed: a log, and how right it was where the truth is known."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer

from gateplug.continual.detection import detection, purity
from gateplug.core.table import print_table


class Event(NamedTuple):
    """A change of context."""

    step: int
    """The training batch, from 0."""
    before: int
    to: int
    kind: str
    loss: float
    mean: float


class EventLog:
    """Changes of context, which task was trained in which context, and choices at test."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.switches: list[int] = []
        """Training batches with which a task began, the first one left out, where a stream tells."""
        self._counts: dict[tuple[int, int], int] = {}
        self._choices: list[tuple[int, int]] = []

    def add(self, trainer: Trainer, event: Event) -> None:
        """A change has been noticed."""
        self.events.append(event)
        text = (
            f"batch {event.step}: context {event.before} → {event.to} ({event.kind}), loss {event.loss:.4g}, "
            f"{event.loss / event.mean:.2f} times its mean {event.mean:.4g}"
        )
        for logger in trainer.loggers:
            board = getattr(logger, "experiment", None)
            if trainer.is_global_zero and board is not None and hasattr(board, "add_text"):
                board.add_text("continual/contexts", text, global_step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def count(self, context: int, task: int) -> None:
        """A batch of a task was trained in a context."""
        self._counts[context, task] = self._counts.get((context, task), 0) + 1

    def chose(self, context: int, task: int | None) -> None:
        """A context was chosen for a batch of a task."""
        if task is not None:
            self._choices.append((context, task))

    def table(self) -> torch.Tensor:
        """(contexts, tasks): training batches."""
        shape = [1 + max((key[i] for key in self._counts), default=0) for i in (0, 1)]
        out = torch.zeros(shape)
        for (context, task), number in self._counts.items():
            out[context, task] = number
        return out

    def right(self) -> float | None:
        """Share of the choices whose context is the one that its task was trained in most; forgotten then."""
        choices, self._choices = self._choices, []
        table = self.table()
        known = [(c, t) for c, t in choices if t < table.shape[1] and table[:, t].any()]
        return sum(int(table[:, t].argmax()) == c for c, t in known) / len(known) if known else None

    def close(self, trainer: Trainer, tolerance: int) -> None:
        """Write `contexts.csv` into the run's folder, and print how it went."""
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: asked on all ranks
        if not trainer.is_global_zero:
            return
        if trainer.loggers and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(folder).mkdir(parents=True, exist_ok=True)
            with (Path(folder) / "contexts.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["step", "from", "to", "kind", "loss", "mean", "ratio"])
                writer.writerows([*e[:4], f"{e.loss:.6g}", f"{e.mean:.6g}", f"{e.loss / e.mean:.4g}"] for e in self.events)
        rows = [(str(e.step), f"{e.before} → {e.to}", e.kind, f"{e.loss:.4g}", f"{e.mean:.4g}") for e in self.events]
        print_table("Changes of context", ("batch", "context", "kind", "loss", "usual loss"), rows)
        if self._counts:
            found = detection([e.step for e in self.events], self.switches, tolerance)
            pure = float(purity(self.table()))
            values = (*found[:3], f"{found.delay:.1f}", f"{pure:.1%}")
            print_table("Against the stream's tasks", ("found", "missed", "false alarms", "delay (batches)", "purity"), [values])
            known = {name: float(value) for name, value in {**found._asdict(), "purity": pure}.items() if not math.isnan(value)}
            figures = {f"continual/detector/{name}": value for name, value in known.items()}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def state_dict(self) -> dict[str, Any]:
        """As plain Python."""
        counts = [[c, t, n] for (c, t), n in self._counts.items()]
        return {"events": [list(e) for e in self.events], "switches": self.switches, "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it."""
        self.events = [Event(*e) for e in state["events"]]
        self.switches = list(state["switches"])
        self._counts = {(c, t): n for c, t, n in state["counts"]}

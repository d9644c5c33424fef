"""The part of a plug that EWC, SI and MAS share: a penalty in the loss, its state, what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from gateplug.continual.penalty import Penalty, fitting, trained
from gateplug.core.errors import real_numbers
from gateplug.core.stream import TaskPlug, stream_of
from gateplug.core.table import print_table


class Pulled(TaskPlug):
    """A plug that pulls parameters back to where they were after earlier tasks.

    What it has learned of earlier tasks stays in the plug from one fit to the next.
    """

    room: ClassVar[str] = "continual"
    attaches: ClassVar[bool] = False
    term: ClassVar[str] = ""
    """Name of the term in the logs, `continual/<term>`."""
    factor: ClassVar[float] = 1.0
    """Of the weight, before ½ Σ importance · (θ − anchor)²."""
    weight: float

    def _start(self, weight: float) -> None:
        real_numbers(weight=weight)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight!r} must be a finite number ≥ 0: what the penalty is multiplied by")
        self.weight = weight
        self.penalty = Penalty()
        self._restored: dict[str, Any] = {}

    def terms(self, module: nn.Module) -> Mapping[str, Tensor]:
        """The penalty, from the end of the first task on."""
        if not self.penalty.tasks or self.weight == 0:
            return {}
        return {self.term: self.weight * self.factor * self.penalty.value(trained(module))}

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """What is kept: one line -> tensors by the parameter's name."""
        return {"importance": self.penalty.importance, "anchor": self.penalty.anchor}

    # ------------------------------------------------------------------ a fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what was kept to where the parameters are."""
        super().on_fit_start(trainer, pl_module)
        if stream_of(trainer) is None:
            rank_zero_warn(
                f"{type(self).__name__}: the data are no stream of tasks (gp.TaskStream), so no task ever ends and nothing is "
                "kept. In a loop of your own call consolidate(module, …) after each task"
            )
        restored, self._restored = self._restored, {}
        self._take({**self._state(), **restored}, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was kept, and how much memory it takes."""
        if not self.penalty.tasks:
            return
        rows = []
        for what, tensors in self.kept().items():
            numbers = sum(t.numel() for t in tensors.values())
            rows.append((what, f"{numbers:,}", f"{sum(t.nbytes for t in tensors.values()):,}"))
        print_table(f"{type(self).__name__} after {self.penalty.tasks} tasks", ("kept", "numbers", "bytes"), rows)

    def _log(self, trainer: Trainer) -> None:
        mean = float(self.penalty.mean_importance())  # once a task
        for logger in trainer.loggers:
            logger.log_metrics({f"continual/{self.term}/importance": mean}, step=trainer.global_step)

    # ------------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {"penalty": self.penalty.state_dict()}

    def _take(self, state: Mapping[str, Any], module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        self.penalty.load_state_dict(state["penalty"], parameters, type(self).__name__)

    def _fitting(self, tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
        return fitting(tensors, dict(module.named_parameters()), type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and what was kept."""
        return {**super().state_dict(), **(self._restored or self._state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it, when the next fit begins: the module is not on its device yet."""
        super().load_state_dict(state_dict)
        self._restored = {name: value for name, value in state_dict.items() if name not in ("stream", "arguments")}

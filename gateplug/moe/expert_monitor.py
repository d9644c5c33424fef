"""ExpertMonitor: what the routers of a model do with its experts, while it trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from gateplug.core.compiled import forget_compiled
from gateplug.core.errors import PlugError
from gateplug.core.plug import Plug
from gateplug.core.select import Layers, select
from gateplug.core.table import print_table
from gateplug.moe.callback import RegulateRouters
from gateplug.moe.expert_figures import by_layer, by_task, over_time
from gateplug.moe.expert_history import History
from gateplug.moe.expert_report import Alarm, read, show, table, task_tables, write
from gateplug.moe.families import Adapter
from gateplug.moe.mixture import MultiGateMoE
from gateplug.moe.padding import Padding
from gateplug.moe.routers import Router, find_routers, named_by, no_router
from gateplug.moe.selection import warn_ahead, warn_frozen, warn_unreached
from gateplug.moe.static_tally import StaticTally
from gateplug.moe.tally import Look, Report, Tally


class ExpertMonitor(Plug):
    """Show what routers do with their experts: gateplug's gates, Hugging Face's mixtures, and any other by an adapter.

    Every router is looked at on every training batch, without a word to the device; once in `every_n_steps` batches (and on the
    last batch of an epoch in which that did not happen) the sums over these batches, over all processes, without padding, are
    read and logged under `moe/<router>/…`::

        load             histogram of the share of the choices that fall on each expert, before a capacity drops any; of static
                         gates, DSelectK and SoftmaxGate, which weigh all experts, the share of the weight
        load_cv          its standard deviation / mean; 0 at balance
        max_violation    (max − mean) / mean
        load_entropy     its entropy / ln E; 1 at balance
        dead             experts that got nothing at all
        collapse         (s − k/E) / (1 − k/E), s the share of the k experts with the most: 0 at balance, 1 when k experts get all
        importance_cv    as load_cv, of the sum of the weights q that drops leave; not where the load is the weight
        confidence       mean of the largest p (softmax of the logits; q for gates without logits)
        entropy          mean of H(p) / ln E: 1 undecided, 0 decided
        dropped          share of the choices that a capacity dropped; only where there is one
        experts_used     mean number of experts with q ≠ 0, a row (DSelectK, expert choice) or a task (static gates)
        unserved         share of the rows that no expert takes (DSelectK, expert choice)
        frozen_bits      share of the bits of DSelectK's selectors that have no gradient, as they are decided

    Static gates of one :class:`MultiGateMoE` are one router, `<mixture>.gates`, with a row a task. After epochs 1, 2, 4, 8 … and
    at the end three pictures are drawn, into TensorBoard and as PNG in the run's folder, `figures/`: `moe_experts` (layers ×
    experts), `moe_experts_over_time` (experts × steps), `moe_tasks` (tasks × experts, q).

    A router is said to have collapsed, once, when in two windows running, of at least 8 choices an expert, `collapse` is at least
    the given value or more than half of the experts are dead. Static gates are meant to settle on few experts, and expert choice
    has equal loads: neither is ever said to.

    Args:
        every_n_steps: training batches in a window, ≥ 1.
        routers, adapters: as in :class:`RegulateRouters`.
        collapse: from which value on, in (0, 1], a router counts as collapsed; None to be silent.

    Raises:
        ValueError: `every_n_steps` < 1, `collapse` out of its range.
        PlugError: the model has no router; lists what was looked at.
    """

    room: ClassVar[str] = "moe"
    summary: ClassVar[str] = "shows how routers load their experts: scalars, histograms, pictures, and says when one collapses"
    paper: ClassVar[str] = "arXiv 2106.03760, 1701.06538, 2101.03961"
    attaches: ClassVar[bool] = False
    chooser: ClassVar[str] = "routers"

    def __init__(
        self,
        every_n_steps: int = 50,
        routers: Layers = "auto",
        adapters: dict[type[nn.Module] | str, Adapter] | None = None,
        collapse: float | None = 0.9,
    ) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps!r} must be a whole number ≥ 1: the training batches from look to look"
            )
        if collapse is not None and (not isinstance(collapse, int | float) or not 0 < collapse <= 1):
            raise ValueError(
                f"collapse={collapse!r} must lie in (0, 1], 1 when k experts get everything, or be None to be silent"
            )
        self.every_n_steps, self.routers, self.adapters, self.collapse = every_n_steps, routers, adapters, collapse
        self.layers = routers
        self._padding = Padding()
        self._tallies: list[Tally | StaticTally] = []
        self._handles: list[RemovableHandle] = []
        self._history: dict[str, History] = {}
        self._last: dict[str, Report] = {}
        self._alarm = Alarm(collapse)
        self._folder: Path | None = None
        self._batches, self._step, self._drawn, self._looked = 0, 0, -1, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, all plugs have brought theirs by now, and look on."""
        self._leave()
        self._last, self._alarm, self._batches, self._drawn = {}, Alarm(self.collapse), 0, -1
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: asked on all ranks
        self._folder = None if trainer.fast_dev_run else Path(folder) / "figures"  # type: ignore[attr-defined]
        self._tallies = list(self._watched(pl_module))
        for tally in self._tallies:
            if isinstance(tally, Tally):
                self._handles.append(tally.router.module.register_forward_hook(Look(tally)))
        forget_compiled()
        if not _regulated(trainer):
            warn_frozen(pl_module)
            warn_ahead(pl_module, [t.router.gate for t in self._tallies if isinstance(t, Tally) and t.router.gate is not None])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of earlier runs keep only what this one goes on from."""
        super().on_train_start(trainer, pl_module)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._history = {t.title: self._history.get(t.title, History()).before(step) for t in self._tallies}

    def _watched(self, module: nn.Module) -> Iterator[Tally | StaticTally]:
        chosen = self._chosen(module)
        mixtures = {f"{n}.gates".lstrip("."): list(m.gates) for n, m in module.named_modules() if isinstance(m, MultiGateMoE)}
        sets = {id(gate): name for name, gates in mixtures.items() if len(gates) > 1 for gate in gates}
        together: dict[str, list[Router]] = defaultdict(list)
        for router in chosen:
            gate = router.gate
            if gate is not None:
                gate.label = router.title
            group = sets.get(id(gate), router.title if gate is not None and gate.tasks else None)
            if gate is None or not gate.static:
                yield Tally(router, self._padding, group)
            elif id(gate) not in sets:
                yield StaticTally([gate], router.title, group)
            else:
                together[sets[id(gate)]].append(router)
        for name, routers in together.items():
            yield StaticTally([r.gate for r in routers if r.gate is not None], name, name)

    def _chosen(self, module: nn.Module) -> list[Router]:
        found, left = find_routers(module, self.adapters)
        if not found:
            raise PlugError(f"ExpertMonitor {no_router(module, left)}")
        try:
            layers = select(module, self.routers, {r.title: r.module for r in found.values()}, self.chooser)
        except PlugError as error:
            raise PlugError(f"ExpertMonitor: {error}") from None
        return named_by(layers, found, "ExpertMonitor")

    # ------------------------------------------------------------------ batch by batch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new epoch was not looked at yet."""
        self._looked = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read which rows are padding, and count what comes."""
        self._padding.read(batch)
        self._count(True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the window if it is at its end."""
        self._count(False)
        self._padding.clear()
        self._batches += 1
        # the axis on which Lightning logs: batches that stepped, whatever the number of optimizers
        self._step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % self.every_n_steps == 0 or (
            trainer.is_last_batch and not self._looked
        ):
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw after epochs 1, 2, 4, 8 …: many pictures where much changes, at little cost."""
        epochs = trainer.current_epoch + 1
        if epochs & (epochs - 1) == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is left, if the run ended before a look; draw, print, and say what did not come to an end."""
        if self._batches and not self._looked:
            self._look(trainer, pl_module)
        self._draw(trainer)
        if self._last:
            print_table("Routers at the end of the training", *table(self._last))
        if not _regulated(trainer):
            warn_unreached(pl_module, {name: report.numbers.get("experts_used", 0) for name, report in self._last.items()})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._leave()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._leave()
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """The loads so far, so that the pictures of a resumed run are whole."""
        return {"history": {name: history.state_dict() for name, history in self._history.items() if len(history)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self._history = {name: History.of(state) for name, state in state_dict.get("history", {}).items()}

    # ------------------------------------------------------------------ looking

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        reports = read(self._tallies, module.device)
        self._alarm.check(self._tallies, reports, self._batches)
        self._looked, self._batches = True, 0
        self._last = reports or self._last
        for name, report in reports.items():
            self._history[name].add(self._step, report.load)
        if trainer.is_global_zero:
            write(trainer.loggers, reports, self._step)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self._last or self._drawn == self._step:
            return
        self._drawn = self._step
        figures = {
            "experts": by_layer({n: r.load for n, r in self._last.items()}, f"moe: load of the experts at step {self._step}"),
            "experts_over_time": over_time({n: h for n, h in self._history.items() if len(h)}, "moe: load of the experts"),
        }
        if tasks := task_tables(self._tallies, self._last):
            figures["tasks"] = by_task(tasks, f"moe: experts of the tasks at step {self._step}")
        show(figures, trainer.loggers, self._folder, self._step)

    def _count(self, on: bool) -> None:
        for tally in self._tallies:
            tally.on = on

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._handles:
            forget_compiled()
        self._handles, self._tallies = [], []


def _regulated(trainer: Trainer) -> bool:  # then RegulateRouters says what there is to say of DSelectK gates
    return any(isinstance(callback, RegulateRouters) for callback in trainer.callbacks)  # type: ignore[attr-defined]

"""The part of GateON that a Trainer runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from gateplug.continual.evaluated import EvaluatedContexts, is_led
from gateplug.continual.norms import batch_norms
from gateplug.continual.report import Usage, draw_contexts, show
from gateplug.core.errors import PlugError
from gateplug.core.objective import batch_size
from gateplug.core.processes import world_size
from gateplug.core.stream import batch_task, stream_of

_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where DDP looks."""


def _agree(task: int, module: LightningModule) -> None:
    """Processes in several contexts would wait for each other for ever."""
    if world_size() == 1:
        return
    ends = torch.tensor([task, -task], device=module.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    last, first = ends.tolist()
    if last != -first:
        raise PlugError(f"one batch is of tasks {-first} and {last} on different processes: GateON trains one context at a time")


class TrainedContexts(EvaluatedContexts):
    """What :class:`GateON` does from the start of a fit to its end."""

    _usage: Usage
    _ignored: list[str] = []  # noqa: RUF012  # never changed in place

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what would make the method wrong."""
        if not module.automatic_optimization:
            raise PlugError(
                "GateON stands around the updates of one optimizer, and with automatic_optimization=False there is no telling "
                "which. Leave it out of the Trainer; call plug.attach(module), plug.follow(module, optimizer) and "
                "plug.switch(module, context) yourself"
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise PlugError(
                f"GateON holds whole parameters back, and {type(trainer.strategy).__name__} cuts them into pieces: use one "
                "device, or ddp"
            )
        stream = stream_of(trainer)
        tasks = 0 if stream is None else len(set(stream.train_tasks()))
        if self.contexts is not None and tasks > self.contexts and not is_led(trainer) and trainer.state.fn == "fit":
            raise PlugError(
                f"GateON(contexts={self.contexts}): the stream has {tasks} tasks, each of which needs a context. Allow "
                "as many, or contexts=None for as many as come"
            )
        norms = list(batch_norms(module))
        if norms and getattr(trainer.strategy, "_layer_sync", None) is not None:
            raise PlugError(
                f"Trainer(sync_batchnorm=True) replaces {norms[0]} after GateON was attached. Convert the network yourself "
                "before, by torch.nn.SyncBatchNorm.convert_sync_batchnorm, and leave the argument out"
            )
        averaging = [type(c).__name__ for c in trainer.callbacks if isinstance(c, WeightAveraging | StochasticWeightAveraging)]  # type: ignore[attr-defined]
        if averaging and self.contexts is None:
            raise PlugError(
                f"{averaging[0]} has a copy of the model, which does not grow: say GateON(contexts=N), with gates for all from "
                "the start"
            )
        if averaging and norms and self.bn == "per_context":
            raise PlugError(
                f"{averaging[0]} would average the statistics of {norms[0]} over contexts: use a norm without running statistics"
            )

    def _enter(self, module: LightningModule, stage: str) -> None:
        super()._enter(module, stage)
        if stage == "fit":
            self._before_ddp(module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The weights were loaded: there may be more contexts, and other parameters may be frozen."""
        if trainer.state.fn == "fit":
            self._before_ddp(pl_module)

    def _before_ddp(self, module: nn.Module) -> None:
        """DDP waits for every parameter it knows; rows of other contexts have no part in a step, and new ones it never knows."""
        self._frozen.release()
        self._freeze()
        parts = {id(t) for m in (*self._gates, *self._guards, *self._norms) for t in (*m.parameters(), *m.buffers())}
        names = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if id(t) in parts]
        own = [name for name in module.__dict__.get(_IGNORED, ()) if name not in self._ignored]
        self._ignored = [name for name in names if name not in own]
        module.__dict__[_IGNORED] = [*own, *self._ignored]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand around the optimizer."""
        super().on_fit_start(trainer, pl_module)
        if len(trainer.optimizers) != 1:
            raise PlugError(f"GateON stands around the updates of one optimizer, and there are {len(trainer.optimizers)}")
        if world_size() > 1:
            for gate in self._gates:
                for row in gate.rows:
                    dist.broadcast(row.data, 0)
        self.follow(pl_module, trainer.optimizers[0])
        self._usage = Usage()

    # ------------------------------------------------------------------ batches

    def on_task_start(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """The context is the task's, unless a detector finds contexts."""
        if not is_led(trainer):
            self.enter(trainer, module, self._context_of.setdefault(task, self._next()))

    def enter(self, trainer: Trainer, module: LightningModule, context: int) -> None:
        """Train in a context from here on, and log what the ones before it have used."""
        if context != self.context:
            self.switch(module, context)
            self._usage.log(trainer, self.availabilities(), self._warned)

    def _next(self) -> int:
        return 1 + max(self._context_of.values(), default=-1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the context of the batch, and what tells tokens from padding."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        task = batch_task(batch)
        if task is not None and stream_of(trainer) is None and not is_led(trainer):
            _agree(task, pl_module)
            context = self._context_of.setdefault(task, self._next())
            if context != self.context and batch_idx % trainer.accumulate_grad_batches:
                raise PlugError(
                    f"task {task} begins at batch {batch_idx}, in the middle of accumulate_grad_batches="
                    f"{trainer.accumulate_grad_batches}: one update would mix two contexts"
                )
            self.enter(trainer, pl_module, context)
        self.show(pl_module, self.context)
        if self._listener is not None:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            self._listener.mask = mask if isinstance(mask, Tensor) else None
            self._listener.samples = batch_size(batch)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """A step begins: what a step that was skipped has left is forgotten."""
        self.forget()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Relevance of weights is that of the gradient before values are cut off; a factor on all of it does not matter."""
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
            self._obstruction.read()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gates are not in DDP's buckets: their gradient is averaged here, once a step."""
        if world_size() > 1 and not trainer.fit_loop._should_accumulate():
            rows = [gate.rows[gate.trained] for gate in self._gates]
            for row in rows:
                if row.grad is None:
                    row.grad = torch.zeros_like(row)
            grads = [row.grad for row in rows if row.grad is not None]
            flat = torch.cat(grads)
            dist.all_reduce(flat)
            for grad, mean in zip(grads, torch.split(flat / world_size(), [len(grad) for grad in grads]), strict=True):
                grad.copy_(mean)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is used, and draw the gates of all contexts."""
        self._usage.log(trainer, self.availabilities(), self._warned)
        show(trainer, self.availabilities(), self._usage)
        draw_contexts(trainer, {self._names[gate]: gate.opennesses() for gate in self._gates})

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The arguments, the place in the stream, and which task was trained in which context; all else is in the gates."""
        return {**super().state_dict(), "contexts": {str(task): c for task, c in self._context_of.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it."""
        super().load_state_dict(state_dict)
        self._context_of = {int(task): c for task, c in state_dict.get("contexts", {}).items()}

    def _release(self, module: nn.Module) -> None:
        super()._release(module)
        self.unfollow()
        left = [name for name in module.__dict__.pop(_IGNORED, ()) if name not in self._ignored]
        if left:  # the user's, or another plug's
            module.__dict__[_IGNORED] = left
        self._ignored = []

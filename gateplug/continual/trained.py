"""The part of GateON that a Trainer runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from gateplug.continual.contexts import Contexts
from gateplug.continual.report import Usage, draw_contexts, show
from gateplug.core.errors import PlugError
from gateplug.core.objective import batch_size
from gateplug.core.processes import world_size
from gateplug.core.stream import Stage, batch_task, eval_task, stream_of


class TrainedContexts(Contexts):
    """What :class:`GateON` does from the start of a fit to its end."""

    _usage: Usage

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

    def _enter(self, module: LightningModule, stage: str) -> None:
        super()._enter(module, stage)
        if stage != "fit":
            return
        # DDP waits for every parameter it knows; rows of other contexts have no part in a step, and new ones it never knows
        self._frozen.keep(g.layer[0].get_parameter(name) for g in self._guards for name in g.frozen)
        parts = {id(t) for m in (*self._gates, *self._guards, *self._norms) for t in (*m.parameters(), *m.buffers())}
        names = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if id(t) in parts]
        module.__dict__["_ddp_params_and_buffers_to_ignore"] = names

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
        self._led = any(type(c).__name__ == "ContextDetector" for c in trainer.callbacks)  # type: ignore[attr-defined]
        self._usage = Usage()

    # ------------------------------------------------------------------ batches

    def on_task_start(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """The context is the task's, unless a detector finds contexts."""
        if not self._led:
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
        if task is not None and not self._led and stream_of(trainer) is None:
            self.enter(trainer, pl_module, self._context_of.setdefault(task, self._next()))
        self.show(pl_module, self.context)
        if self._listener is not None:
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            self._listener.mask = mask if isinstance(mask, Tensor) else None
            self._listener.samples = batch_size(batch)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """A step begins: what a step that was skipped has left is forgotten."""
        self.forget()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gates are not in DDP's buckets: their gradient is averaged here, once a step."""
        if world_size() > 1 and not trainer.fit_loop._should_accumulate():
            for gate in self._gates:
                row = gate.rows[gate.active]
                if row.grad is None:
                    row.grad = torch.zeros_like(row)
                dist.all_reduce(row.grad)
                row.grad /= world_size()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is used, and draw the gates of all contexts."""
        self._usage.log(trainer, self.availabilities(), self._warned)
        show(trainer, self.availabilities(), self._usage)
        draw_contexts(trainer, {self._names[gate]: gate.opennesses() for gate in self._gates})

    # ------------------------------------------------------------------ evaluation

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run the batch in its context."""
        self._evaluate(trainer, pl_module, "val", batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run the batch in its context."""
        self._evaluate(trainer, pl_module, "test", batch, batch_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run the batch in its context."""
        self._evaluate(trainer, pl_module, "test", batch, batch_idx)

    def _evaluate(self, trainer: Trainer, module: LightningModule, stage: Stage, batch: Any, batch_idx: int) -> None:
        if any(type(c).__name__ == "ContextDetector" for c in trainer.callbacks):  # type: ignore[attr-defined]
            return  # it says which
        stream = stream_of(trainer)
        task = batch_task(batch) if stream is None else eval_task(stream, stage, batch_idx)
        if task is None:
            self.show(module, self.context)
            return
        # a checkpoint of weights alone does not say which context a task was; in a stream without returns it has its number
        context = self._context_of.get(task, None if self._context_of else task)
        if context is not None and context < self.known:
            self.show(module, context)
        elif stage == "val":  # a task to come: what the network makes of it now
            self.show(module, self.context)
        else:
            raise PlugError(
                f"GateON: task {task} is unknown at test: no context was trained on it. Known are the tasks "
                f"{sorted(self._context_of) or list(range(self.known))}"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to what is trained."""
        self.show(pl_module, self.context)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to what is trained."""
        self.show(pl_module, self.context)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to what is trained."""
        self.show(pl_module, self.context)

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
        self._frozen.release()
        module.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)

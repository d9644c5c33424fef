"""Replay: a few samples of earlier tasks are kept, and trained on beside those of the running one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from gateplug.continual.head_gate import counted
from gateplug.continual.memory import LOGITS, Memory
from gateplug.continual.own_steps import own_loss
from gateplug.core.answers import Answers
from gateplug.core.errors import nearest, real_numbers, whole_numbers
from gateplug.core.stream import TaskPlug, stream_of
from gateplug.core.table import print_table

KINDS = ("er", "der++")


class Replay(TaskPlug):
    """Experience replay (Chaudhry et al. 2019, arXiv 1902.10486), and dark experience replay, DER++ (arXiv 2004.07211).

    A buffer of M samples holds a uniform draw of all training samples that the stream has given so far (reservoir). In each step
    a batch is drawn from it, before the samples of the step enter, and the loss has a further term:

    - `er`: the module's own loss of the drawn batch, weight 1;
    - `der++`: α · mean (z − z_entry)² of one draw + β · the module's own loss of another one, z_entry the logits that the network
      gave in training when the sample entered, mean over samples and classes.

    The module's own loss is that of its `training_step`, which logs nothing there. The network runs on a drawn batch in training
    mode: dropout is drawn anew, BatchNorm sees that batch by itself and its statistics follow it as well, and what other plugs
    put in within the network (router losses) counts there too. With accumulated gradients each micro-batch has a draw of its own.

    Samples stay on the device and in the dtype in which a batch comes, as tensors of M rows; texts of different lengths are
    padded at the end with 0 (labels of tokens, under `labels`, with −100). They are in the checkpoint. With several processes all
    of them hold the same buffer: samples that enter are exchanged, and each process replays its share of one draw, so that
    together they do what one process does with the global batch.

    By hand, without a Trainer: `loss = replay.total_loss(net, loss)`, and after the step `replay.remember(batch, logits)`.

    Args:
        samples: M ≥ 1; at least a batch, over all processes.
        batch_size: samples that are drawn, by process; None: as many as the running batch has.
        kind: `er` or `der++`.
        alpha: α ≥ 0, of `der++`; the paper has .1 … .5.
        beta: β ≥ 0, of `der++`.
        seed: of the draws: which samples stay is a function of (seed, number of the sample).

    Raises:
        ValueError: a number out of its range, an unknown name, a buffer that is smaller than a batch.
        PlugError: a batch with something else than tensors, or larger than the buffer; `der++` on a network that gives no logits
            (B, C) or is not called as a whole.
    """

    room: ClassVar[str] = "continual"
    summary: ClassVar[str] = "trains on a few kept samples of earlier tasks as well (experience replay, DER++)"
    paper: ClassVar[str] = "arXiv 2004.07211"
    attaches: ClassVar[bool] = False
    refuses: ClassVar[dict[str, str]] = {
        "EarlyExit": "its exits are trained on what the network was asked last, and a replayed batch is asked in between"
    }

    def __init__(
        self,
        samples: int = 500,
        batch_size: int | None = None,
        kind: str = "er",
        alpha: float = 0.3,
        beta: float = 0.5,
        seed: int = 0,
    ) -> None:
        whole_numbers(samples=samples, seed=seed, **({} if batch_size is None else {"batch_size": batch_size}))
        real_numbers(alpha=alpha, beta=beta)
        if samples < 1:
            raise ValueError(f"samples={samples} must be ≥ 1: so many are kept")
        if batch_size is not None and not 1 <= batch_size <= samples:
            raise ValueError(f"batch_size={batch_size} must lie in 1 … samples={samples}: so many are drawn from the buffer")
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}.{nearest(str(kind), KINDS)}")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a finite number ≥ 0")
        self.samples, self.batch_size, self.kind = samples, batch_size, kind
        self.alpha, self.beta, self.seed = alpha, beta, seed
        self.memory = Memory(samples, batch_size, seed)
        self._answers: Answers | None = None
        self._logits: Tensor | None = None
        self._stepped = False

    # ------------------------------------------------------------------ by hand

    def remember(self, batch: Any, logits: Tensor | None = None) -> None:
        """Let a batch that was trained on enter the buffer, after the step. For a loop of one's own; with a stream it is done.

        Args:
            batch: as the module's step takes it, or (inputs, labels).
            logits: (B, C) that the network gave for it, for `der++`.

        Raises:
            ValueError: `der++` without logits.
            PlugError: see the class.
        """
        if self.kind == "der++" and logits is None:
            raise ValueError("Replay(kind='der++') needs the logits (B, C) that the network gave: remember(batch, logits)")
        self.memory.begin(batch)
        self.memory.enter(logits if self.kind == "der++" else None)

    # ------------------------------------------------------------------ a step

    def terms(self, module: nn.Module) -> Mapping[str, Tensor]:
        """The loss of what is drawn; nothing while the buffer is empty."""
        self._hear(module, False)
        self._stepped = True
        drawn, number = self.memory.draw(0), self.memory.number
        if drawn is None:
            return {}
        if self.kind == "er":
            loss = own_loss(module, self.memory.batch(drawn), number)
            return {} if loss is None else {"replay": loss}
        with Answers(module) as answers:
            own_loss(module, self.memory.batch(drawn), number)
        terms = {"replay_logits": self.alpha * apart(answers.last.logits, drawn[LOGITS])}
        again = self.memory.draw(1)
        assert again is not None
        loss = own_loss(module, self.memory.batch(again), number)
        return terms if loss is None else {**terms, "replay": self.beta * loss}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the batch while it is as it came."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._stepped, self._logits = False, None
        if self.task is None:
            self.memory.rest()
            return
        self.memory.begin(batch, batch_idx)
        self._hear(pl_module, self.kind == "der++")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch's samples enter, unless the step left it out."""
        if self.task is not None and self._stepped:
            self.memory.enter(self._logits)
        self._hear(pl_module, False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _hear(self, module: nn.Module, on: bool) -> None:
        """Listen to what the network answers on the running batch, or keep what it was."""
        if on:
            self._answers = Answers(module).__enter__()
        elif self._answers is not None:
            answers, self._answers = self._answers, None
            answers.__exit__()
            self._logits = answers.last.logits.detach()

    # ------------------------------------------------------------------ a fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where there is no stream."""
        super().on_fit_start(trainer, pl_module)
        if stream_of(trainer) is None:
            rank_zero_warn(
                "Replay: the data are no stream of tasks (gp.TaskStream), so nothing is kept and nothing replayed. In a loop of "
                "your own call remember(batch) after each step"
            )

    def on_task_end(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """Log how much is kept."""
        buffer = self.memory.buffer
        for logger in trainer.loggers:
            held = {"continual/replay/samples": float(buffer.held), "continual/replay/bytes": float(buffer.bytes)}
            logger.log_metrics(held, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is kept, and how much memory it takes."""
        buffer = self.memory.buffer
        if buffer.seen:
            rows = [(name, f"{c.values.numel():,}", f"{c.values.nbytes:,}") for name, c in buffer.columns.items()]
            print_table(f"Replay: {buffer.held} of {buffer.seen:,} samples", ("kept", "numbers", "bytes"), rows)

    def _release(self, module: nn.Module) -> None:
        super()._release(module)
        if self._answers is not None:
            self._answers.__exit__()
        self._answers, self._logits = None, None
        self.memory.rest()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and the buffer."""
        return {**super().state_dict(), "buffer": self.memory.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it."""
        super().load_state_dict(state_dict)
        self.memory.buffer.load_state_dict(state_dict["buffer"])


def apart(logits: Tensor, stored: Tensor) -> Tensor:
    """Mean squared distance of logits (B, C) to stored ones (B, C' ≤ C), a scalar; what did not count then is left out."""
    stored = stored.to(logits.device)
    known = counted(stored)
    now = torch.where(known, logits[:, : stored.shape[1]], 0.0)
    return F.mse_loss(now, torch.where(known, stored, 0.0))

"""ContextDetector: which context it is, when nobody says so."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

from lightning import LightningModule, Trainer
from torch import nn

from gateplug.continual.callback import GateON
from gateplug.continual.choice import STEPS, Score, choose, shared
from gateplug.continual.detection import detector_step, deviates, mean_loss, new_state
from gateplug.continual.events import Event, EventLog
from gateplug.core.answers import loss_of, muted, own_step
from gateplug.core.cost import still
from gateplug.core.errors import PlugError, real_numbers, whole_numbers
from gateplug.core.plug import Plug
from gateplug.core.stream import eval_task, place_in, stream_of
from gateplug.core.wrap import unwrap, wrap


class ContextDetector(Plug):
    """Find out which context a batch is of, beside a :class:`GateON` (arXiv 2306.01690, unsupervised).

    In training, a loss far above what the active context is used to raises an alarm, before the step. The known contexts are
    then tried on the same batch; the one in which its loss is most as usual goes on, or a new one is opened. At test the
    context is the one whose answers are the surest.

    Args:
        window: losses that are kept of each context, ≥ 2.
        threshold: a loss deviates that is above so many times the mean of the active context, > 1.
        confidence: how sure a context must be of its losses before there is an alarm, in [0, 1).
        rate: at which it grows with every batch that does not deviate, in (0, 1]; by default it takes 460 batches to .9.
        patience: batches in a row that have to deviate, ≥ 1; those before the last train nothing.
        tolerance: batches after a true switch in which an alarm is counted for it, where a stream tells the truth.
        score: of a batch's logits (B, C), the context with the smallest is taken at test: `entropy`, or a function.
        labelled: so many samples of each batch whose labels may be looked at in the choice at test: the context with the smallest
            loss on them is taken; 0: no labels are.

    Raises:
        ValueError: a number out of its range.
        PlugError: no GateON before it in the callbacks.
    """

    room: ClassVar[str] = "continual"
    summary: ClassVar[str] = "notices from the loss that the task has changed, and chooses the context of a GateON"
    paper: ClassVar[str] = "arXiv 2306.01690"
    attaches: ClassVar[bool] = False
    refuses: ClassVar[dict[str, str]] = GateON.refuses

    def __init__(
        self,
        window: int = 50,
        threshold: float = 1.5,
        confidence: float = 0.9,
        rate: float = 0.005,
        patience: int = 1,
        tolerance: int = 50,
        score: Literal["entropy"] | Score = "entropy",
        labelled: int = 0,
    ) -> None:
        whole_numbers(window=window, patience=patience, tolerance=tolerance, labelled=labelled)
        real_numbers(threshold=threshold, confidence=confidence, rate=rate)
        for name, value, least in (
            ("window", window, 2),
            ("patience", patience, 1),
            ("tolerance", tolerance, 1),
            ("labelled", labelled, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be ≥ {least}")
        if not threshold > 1:
            raise ValueError(f"threshold={threshold} must be > 1: a multiple of the mean loss")
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence={confidence} must lie in [0, 1)")
        if not 0 < rate <= 1:
            raise ValueError(f"rate={rate} must lie in (0, 1]")
        if score != "entropy" and not callable(score):
            raise ValueError(f"score={score!r} must be 'entropy' or a function of logits (B, C)")
        self.window, self.threshold, self.confidence, self.rate = window, threshold, confidence, rate
        self.patience, self.tolerance, self.score, self.labelled = patience, tolerance, score, labelled
        self.state = new_state()
        self.events = EventLog()
        self._deviating = 0
        self._losses: list[float] = []
        self._gateon: GateON | None = None

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """There must be contexts to choose from."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = next((c for c in callbacks if isinstance(c, GateON)), None)
        if found is None or callbacks.index(found) > callbacks.index(self):
            raise PlugError("ContextDetector chooses the context of a GateON: put GateON before ContextDetector in the callbacks")
        self._gateon = found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand next to the training step, within what other plugs add to its loss."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            wrap(pl_module, "training_step", self, partial(self._around, trainer, pl_module), innermost=True)

    # ------------------------------------------------------------------ training

    def _around(self, trainer: Trainer, module: LightningModule, step: Any, /, *args: Any, **kwargs: Any) -> Any:
        accumulate = trainer.accumulate_grad_batches
        if accumulate > 1:  # a window is one step: it is decided at its start, by the mean loss of the one before
            if trainer.fit_loop.epoch_loop.batch_idx % accumulate == 0 and self._losses:
                mean, self._losses = sum(self._losses) / len(self._losses), []
                self._decide(trainer, module, mean, args, kwargs)
            out = step(*args, **kwargs)
            if (loss := loss_of(out)) is not None:
                self._losses.append(shared(loss))
            return out
        out = step(*args, **kwargs)
        loss = loss_of(out)
        if loss is not None and self._decide(trainer, module, shared(loss), args, kwargs):
            with muted(module):  # once more, in the context that it is of
                out = step(*args, **kwargs)
        return out

    def _decide(self, trainer: Trainer, module: LightningModule, loss: float, args: Any, kwargs: Any) -> bool:
        """Whether the context is another one from this batch on."""
        assert self._gateon is not None
        options = (self.window, self.threshold)
        active = self.state["active"]
        if deviates(self.state, active, loss, *options) and self.state["confidence"][active] > self.confidence:
            self._deviating += 1
            if self._deviating < self.patience:
                return False
        self._deviating = 0
        usual = mean_loss(self.state, active, self.window)
        tried = partial(self._loss_in, module, args, kwargs)
        self.state, event = detector_step(self.state, loss, tried, *options, self.confidence, self.rate)
        if event is None:
            return False
        kind, before, to = event
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        self._gateon.enter(trainer, module, to)
        self.events.add(trainer, Event(batch, before, to, kind, loss, usual))
        return True

    def _loss_in(self, module: LightningModule, args: Any, kwargs: Any, context: int) -> float:
        assert self._gateon is not None
        self._gateon.show(module, context)
        with muted(module), still(module):
            loss = loss_of(own_step(module)(*args, **kwargs))
        self._gateon.show(module, self._gateon.context)
        return float("nan") if loss is None else shared(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """A batch that deviates, and may be of another context, trains nothing."""
        if self._deviating:
            assert self._gateon is not None
            self._gateon.forget()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count which task was trained in which context, where a stream tells."""
        stream = stream_of(trainer)
        place = None if stream is None else place_in(stream, batch_idx)
        if place is not None:
            if place.first and (trainer.fit_loop.epoch_loop.total_batch_idx or place.stretch):
                self.events.switches.append(trainer.fit_loop.epoch_loop.total_batch_idx)
            self.events.count(self.state["active"], place.task)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write what was noticed, against the truth where it is known."""
        self.events.close(trainer, self.tolerance)

    # ------------------------------------------------------------------ evaluation

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Choose the context of the batch."""
        self._choose(trainer, pl_module, "val", batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Choose the context of the batch."""
        self._choose(trainer, pl_module, "test", batch, batch_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Choose the context of the batch."""
        self._choose(trainer, pl_module, "predict", batch, batch_idx)

    def _choose(self, trainer: Trainer, module: LightningModule, stage: str, batch: Any, batch_idx: int) -> None:
        assert self._gateon is not None
        context = choose(module, self._gateon, STEPS[stage], (batch, batch_idx), self.score, self.labelled)
        stream = stream_of(trainer)
        if stage != "predict" and stream is not None and not trainer.sanity_checking:
            self.events.chose(context, eval_task(stream, "val" if stage == "val" else "test", batch_idx))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how often the choice was right."""
        self._log_choice(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how often the choice was right."""
        self._log_choice(pl_module, "test")

    def _log_choice(self, module: LightningModule, stage: str) -> None:
        right = self.events.right()
        if right is not None:
            module.log(f"continual/{stage}/context_accuracy", right, sync_dist=True)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What the contexts are used to, and what was noticed."""
        return {"detector": self.state, "deviating": self._deviating, "window": self._losses, "events": self.events.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it."""
        self.state, self._deviating, self._losses = state_dict["detector"], state_dict["deviating"], state_dict["window"]
        self.events.load_state_dict(state_dict["events"])

    def _release(self, module: nn.Module) -> None:
        super()._release(module)
        unwrap(module, self)

"""HeadMask: of a network with outputs for many tasks, those that count now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

from lightning import LightningModule, Trainer
from torch import nn

from gateplug.continual.head_gate import OutputMask
from gateplug.core.answers import network
from gateplug.core.edit import AddGate, Edit
from gateplug.core.errors import PlugError
from gateplug.core.select import Layers
from gateplug.core.stream import Stage, Stream, TaskPlug, eval_task, stream_of


class Heads(Stream, Protocol):
    """A stream whose tasks have outputs of their own."""

    head: str
    num_tasks: int
    num_classes: int

    def classes(self, task: int) -> list[int]:
        """The outputs of a task."""
        ...


class HeadMask(TaskPlug):
    """Masks the logits of outputs that do not count, in training, validation and test.

    With `head="task"` in the stream those of the batch's task count: its own head, the task being known. With `head="class"` all
    classes of the tasks that have been seen count: one growing head, the task being unknown; in a test after training, all that
    were seen in training. A masked logit is half of the least number of its type; the loss of a sample whose own class is masked
    (with `forward=True`, of a task that has not begun) is of that size.

    Without a Trainer: `mask.attach(net)`, and `mask.allow(net, classes)` whenever the classes change.

    Args:
        layers: what gives the logits, see :func:`gateplug.core.select.select`; "auto" is the network as a whole, where the module
            holds one network, and else its last Linear layer.

    Raises:
        PlugError: the data are no stream, or one whose tasks share the outputs; the loss smooths labels over masked outputs.
    """

    room: ClassVar[str] = "continual"
    summary: ClassVar[str] = "one head a task, or one head that grows with the classes seen"
    paper: ClassVar[str] = "arXiv 1904.07734"

    def __init__(self, layers: Layers = "auto") -> None:
        self.layers = layers
        self._outputs: int | None = None
        self._seen: list[int] = []
        self._shown: tuple[int, ...] | None = None
        """Tasks whose outputs count now."""
        self._trained: tuple[int, ...] | None = None
        """And in the last training batch."""

    # ------------------------------------------------------------------ what is attached

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        """The network, or the last Linear layer of a module that does not hold a single one."""
        net = network(module)
        if net is not module or not hasattr(module, "training_step"):
            return {name: m for name, m in module.named_modules() if m is net}
        last = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)][-1:]
        return dict(last)

    def attach(self, module: nn.Module) -> None:
        """See :meth:`Plug.attach`. A model that this plug is new to has seen no task."""
        if self._found(module) is None:
            self._seen = []
        super().attach(module)

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        """A mask on each."""
        return [AddGate(name, self._mask(name, layer), "mask", "mask of its outputs") for name, layer in layers.items()]

    def _mask(self, name: str, layer: nn.Module) -> OutputMask:
        # of the last layer with outputs, which a stream corrects, and so does a checkpoint
        sizes = [m.out_features for m in layer.modules() if isinstance(m, nn.Linear)]
        if self._outputs is None and not sizes:
            raise PlugError(f"HeadMask cannot tell how many outputs {name or 'the network'} has: it holds no Linear layer")
        return OutputMask(self._outputs or sizes[-1])

    def allow(self, module: nn.Module, classes: Sequence[int]) -> None:
        """Let these outputs count, and no others.

        Raises:
            ValueError: no class, or one that the network does not have.
            PlugError: the plug is not attached to `module`.
        """
        masks = self._masks(module)
        if not masks:
            raise PlugError("HeadMask is not attached to this module: call mask.attach(module) first")
        for mask in masks:
            if not classes or not all(0 <= c < len(mask.allowed) for c in classes):
                raise ValueError(f"allow({list(classes)}): at least one class, each of 0 … {len(mask.allowed) - 1}")
            mask.allow(classes)

    def _masks(self, module: nn.Module) -> list[OutputMask]:
        return [gate for gate in self.gates(module).values() if isinstance(gate, OutputMask)]

    # ------------------------------------------------------------------ in a Trainer

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """There must be something to mask."""
        stream = stream_of(trainer)
        ways = "Train on gp.TaskStream(…, head='task') or head='class'"
        if stream is None and trainer.state.fn == "fit":
            raise PlugError(f"HeadMask masks outputs by the tasks of a stream, and these data are none. {ways}")
        if stream is not None and getattr(stream, "head", "domain") == "domain":
            raise PlugError(
                f"HeadMask has nothing to do: with head='domain' all tasks share all outputs. {ways}, or leave it out"
            )
        names = {cls.__name__ for c in trainer.callbacks for cls in type(c).__mro__}  # type: ignore[attr-defined]
        if "Replay" in names and getattr(stream, "head", "") == "task":
            raise PlugError(
                "HeadMask cannot be used with Replay and head='task': replayed samples are of other tasks, whose outputs are "
                "masked while this one trains. Use head='class'"
            )
        if getattr(module, "label_smoothing", 0):
            raise PlugError(
                f"label_smoothing={module.label_smoothing} gives every output a share of the label, also those that HeadMask "
                "masks, and the loss would be infinite: set it to 0"
            )
        self._outputs = None if stream is None else cast(Heads, stream).num_classes

    def on_task_start(self, trainer: Trainer, module: LightningModule, task: int) -> None:
        """A task is seen from its first batch on."""
        if task not in self._seen:
            self._seen.append(task)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a checkpoint has brought may be the mask of a validation."""
        super().on_train_start(trainer, pl_module)
        self._shown = self._trained = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Mask as the batch's task needs it."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._show(trainer, pl_module, self.task)
        self._trained = self._shown

    def _evaluate(self, stage: Stage, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        stream = stream_of(trainer)
        self._show(trainer, module, None if stream is None else eval_task(stream, stage, batch_idx))

    def _show(self, trainer: Trainer, module: LightningModule, task: int | None) -> None:
        stream = cast("Heads | None", stream_of(trainer))
        tasks = self._seen if stream is None or stream.head == "class" else [] if task is None else [task]
        if stream is not None and tasks:  # nothing seen yet: the mask stays what it is
            self._put(module, stream, tuple(tasks))

    def _put(self, module: LightningModule, stream: Heads, tasks: tuple[int, ...]) -> None:
        if tasks != self._shown:
            self._shown = tasks
            self.allow(module, [c for task in tasks for c in stream.classes(task)])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again at what is masked."""
        self._shown = None

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Mask as the batch's task needs it."""
        self._evaluate("val", trainer, pl_module, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Mask as the batch's task needs it."""
        self._evaluate("test", trainer, pl_module, batch_idx)

    on_predict_batch_start = on_test_batch_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to what training uses, before a checkpoint is written."""
        stream = cast("Heads | None", stream_of(trainer))
        if stream is not None and trainer.state.fn == "fit" and self._trained is not None:
            self._put(pl_module, stream, self._trained)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The arguments, the place in the stream, and the tasks seen."""
        return {**super().state_dict(), "seen": list(self._seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them."""
        super().load_state_dict(state_dict)
        self._seen = list(state_dict.get("seen", []))

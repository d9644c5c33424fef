"""The loaders of a stream: one long sequence to train on, and one task after another to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from gateplug.data.stream_kinds import View
from gateplug.data.stream_source import Source


@dataclass(frozen=True)
class Stretch:
    """A part of a stream in which one task is trained."""

    task: int
    source: Source
    view: View
    batches: int
    """Training batches of it on each process, ≥ 1."""

    @property
    def passes(self) -> int:
        """Passes over the task's data, the last of which may be cut short."""
        return -(-self.batches // self.source.length(self.task))


class StreamLoader:
    """The training batches of one stretch after another, as one sequence whose state is (epoch, batches delivered).

    Pass number e of a stretch has the order of epoch p · P + P_before + e of the data module's own loader, with p the Trainer's
    epoch, P the passes of the whole stream and P_before those of the stretches before. So the order is a function of the place,
    and a resumed run goes to its place without reading what came before.

    Args:
        stretches: At least one.
        identity: What the tasks depend on, as plain Python; a checkpoint of another stream is told by it.
    """

    def __init__(self, stretches: Sequence[Stretch], identity: dict[str, Any]) -> None:
        self.stretches, self.identity = stretches, identity
        self.epoch = 0
        self._resume: tuple[int, int] | None = None
        self._position: tuple[int, int] | None = None

    @property
    def sampler(self) -> StreamLoader:
        """Lightning names the epoch to the sampler of a loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Name the pass over the stream that the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(stretch.batches for stretch in self.stretches)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the rest of a resumed pass, or over a whole one.

        Nothing happens before the first batch is asked for: Lightning makes the iterator before it has said ``set_epoch``.
        """
        epoch, batch = self._begin()
        passes = sum(stretch.passes for stretch in self.stretches)
        start, before = 0, epoch * passes
        for number, stretch in enumerate(self.stretches):
            end, done = start + stretch.batches, False
            try:
                while batch < end:
                    turn, first = divmod(batch - start, stretch.source.length(stretch.task))
                    for item in islice(stretch.source.batches(stretch.task, before + turn, first), end - batch):
                        batch += 1
                        self._position = (epoch, batch)
                        yield stretch.view(item)
                done = True
            finally:
                if not done or number + 1 == len(self.stretches) or self.stretches[number + 1].source is not stretch.source:
                    stretch.source.close()
            start, before = end, before + stretch.passes

    def _begin(self) -> tuple[int, int]:
        resume, self._resume = self._resume, None
        place = (self.epoch, 0)
        # a later epoch than the checkpoint's: limit_train_batches had left that one before its end
        if resume is not None and self.epoch <= resume[0]:
            place = resume if resume[1] < len(self) else (resume[0] + 1, 0)
        self._position = place
        return place

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches delivered in it, and what the order depends on."""
        epoch, batch = self._resume or self._position or (self.epoch, 0)
        parts = [[s.task, s.batches, s.source.sampler.seed] for s in self.stretches]
        return {"epoch": epoch, "batch": batch, "stretches": parts, "identity": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember where to continue; the next iteration does.

        Raises:
            ValueError: If the state is no stream's, or the stream was another one up to that place.
        """
        if not {"epoch", "batch", "stretches", "identity"} <= state.keys():
            raise ValueError(
                f"The checkpoint's loader state has {sorted(state)} and was not written by a TaskStream: resume with the data "
                "module that wrote it, or load the weights alone."
            )
        now = self.state_dict()
        begun, start = 0, 0
        for _, batches, _ in state["stretches"]:  # further tasks may have been added behind
            begun += start < state["batch"]
            start += batches
        then, here = ([part[:2] for part in s["stretches"][:begun]] for s in (state, now))
        if then != here:
            raise ValueError(
                f"The checkpoint stands at batch {state['batch']} of a stream with (task, batches) {then}, and this one has "
                f"{here} there: resume with the stream that was trained, or load the weights alone."
            )
        others = [(name, then, self.identity.get(name)) for name, then in state["identity"].items()]
        others.append(("order", [p[2] for p in state["stretches"][:begun]], [p[2] for p in now["stretches"][:begun]]))
        for name, old, new in others:
            if old != new:
                rank_zero_warn(f"The checkpoint's stream has {name}={old}, this one has {name}={new}: its tasks are other ones.")
        self._resume = (int(state["epoch"]), int(state["batch"]))


class TaskLoader:
    """The batches of some tasks, one after another, in an order that is always the same.

    Args:
        parts: Task to its source and view.
        tasks: Which tasks the next iteration gives; those without a part are left out.
    """

    def __init__(self, parts: Mapping[int, tuple[Source, View]], tasks: Callable[[], Sequence[int]]) -> None:
        self.parts, self.tasks = parts, tasks

    def __len__(self) -> int:
        """Batches of all tasks: Lightning asks once, and an iteration may give fewer."""
        return sum(source.length(task) for task, (source, _) in self.parts.items())

    def __iter__(self) -> Iterator[Any]:
        chosen = [self.parts[task] for task in self.tasks() if task in self.parts]
        for number, (source, view) in enumerate(chosen):
            try:
                for item in source.batches(view.task, 0):
                    yield view(item)
            finally:
                if number + 1 == len(chosen) or chosen[number + 1][0] is not source:
                    source.close()


def begun(trainer: Trainer, tasks: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The tasks that a fit has begun with, ascending.

    Args:
        trainer: In a fit.
        tasks: Of each stretch.
        lengths: Training batches of each stretch.
    """
    if trainer.fit_loop.epoch_progress.current.processed:  # type: ignore[attr-defined]
        return sorted(set(tasks))
    batch = max(trainer.fit_loop.epoch_loop.batch_idx, 0)  # −1 before the first one, in the sanity check
    starts = accumulate([0, *lengths[:-1]])
    return sorted({task for task, start in zip(tasks, starts, strict=True) if start <= batch})

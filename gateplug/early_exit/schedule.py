"""When heads and when gates are trained: a warm-up of the heads, each kept at its best, then gates and heads in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from gateplug.early_exit.losses import phase_at

Phase = Literal["warmup", "gate", "inference"]


class Schedule:
    """The state of a training with exits.

    Args:
        heads: number of heads K.
        warmup_epochs: the most that the warm-up takes; 0 for none.
        every: batches of a phase.
        patience: validations without a better accuracy after which a head rests, with its best weights, until the warm-up ends.
    """

    def __init__(self, heads: int, warmup_epochs: int, every: int, patience: int = 2) -> None:
        self.warmup_epochs, self.every, self.patience = warmup_epochs, every, patience
        self.epochs = 0
        """Epochs of warm-up that are over."""
        self.warm = warmup_epochs > 0
        self.resting = [False] * heads
        self.best = [-1.0] * heads
        self.waited = [0] * heads
        self.weights: list[dict[str, Tensor]] = [{} for _ in range(heads)]

    def phase(self, batch: int, epoch: int, accumulate: int, batches: float) -> Phase:
        """What the batch trains.

        Args:
            batch: its number in the epoch; all batches of an accumulation window are of one phase.
            epoch: the epoch's number.
            accumulate: batches of a window.
            batches: of the epoch; infinite if unknown.
        """
        if self.warm:
            return "warmup"
        every = self.length(accumulate, batches)
        if batches <= accumulate:  # one window an epoch
            return phase_at(epoch, 1)
        return phase_at(batch - batch % accumulate, every)

    def length(self, accumulate: int, batches: float) -> int:
        """Batches of a phase: `every`, whole windows, and not more than half of the epoch."""
        every = -(-self.every // accumulate) * accumulate
        if batches >= 2 * every:
            return every
        windows = -(-int(batches) // accumulate)
        return max(1, -(-windows // 2)) * accumulate

    def validated(self, accuracies: Sequence[float], heads: Sequence[nn.Module]) -> None:
        """A validation within the warm-up: keep the best weights of each head; one that has not improved goes to rest."""
        for i, (accuracy, head) in enumerate(zip(accuracies, heads, strict=True)):
            if self.resting[i]:
                continue
            if accuracy > self.best[i]:
                self.best[i], self.waited[i] = accuracy, 0
                self.weights[i] = {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}
            else:
                self.waited[i] += 1
                if self.waited[i] >= self.patience:
                    self.resting[i] = True
                    head.load_state_dict(self.weights[i])

    def epoch_over(self, heads: Sequence[nn.Module]) -> bool:
        """An epoch of warm-up is over; True when it was the last: every head then has its best weights."""
        self.epochs += 1
        if not (all(self.resting) or self.epochs >= self.warmup_epochs):
            return False
        self.warm = False
        for i, head in enumerate(heads):
            if self.weights[i]:
                head.load_state_dict(self.weights[i])
        self.resting = [False] * len(self.resting)
        self.weights = [{} for _ in self.weights]
        return True

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain Python."""
        return {
            "epochs": self.epochs, "warm": self.warm, "resting": list(self.resting), "best": list(self.best),
            "waited": list(self.waited), "weights": [dict(weights) for weights in self.weights],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name in ("epochs", "warm", "resting", "best", "waited", "weights"):
            setattr(self, name, state[name])


def rest(parameters: Sequence[nn.Parameter]) -> None:
    """No gradient for these in this step: a gradient of zeros would still be moved by momentum and weight decay."""
    for p in parameters:
        p.grad = None

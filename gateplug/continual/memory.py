"""What a replay remembers: a reservoir of samples, filled by one process or by several that must stay of one mind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gateplug.continual.entries import filled, leaves, outline
from gateplug.continual.reservoir import Reservoir
from gateplug.continual.shares import Shares
from gateplug.core.errors import PlugError, listed
from gateplug.core.objective import batch_size as samples_in

LOGITS = "logits at entry"


class Memory:
    """A reservoir, and the batch that is being trained on.

    Args:
        samples: M, of the reservoir.
        batch_size: samples that are drawn, by process; None: as many as the batch has.
        seed: of all draws.
    """

    def __init__(self, samples: int, batch_size: int | None, seed: int) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.buffer = Reservoir(samples, seed)
        self.number = 0
        """Of the batch in the epoch."""
        self._shares: Shares | None = None
        self._form: Any = None
        self._slots: dict[int, int] = {}
        """Where rows of the batch will go: slot -> row."""
        self._rows: dict[str, Tensor] = {}
        """Those rows, in this order. They are taken before the step, which may change the batch."""
        self._entering = False
        """Whether any process has such rows."""

    def begin(self, batch: Any, number: int = 0) -> None:
        """See a batch: how many samples it has, over all processes, and which of them will enter.

        Raises:
            PlugError: it is no batch of tensors, not of the form of those before, or larger than the reservoir.
        """
        parts, count = leaves(batch), samples_in(batch)
        if odd := [name for name, tensor in parts.items() if len(tensor) != count]:
            raise PlugError(
                f"Replay keeps a row for each of {count} samples, and {listed(odd)} of the batch has another number of rows: "
                "make it one row a sample, or leave it out"
            )
        self._shares, self._form, self.number = Shares(count), outline(batch), number
        if self._drawn() > self.samples:
            raise PlugError(
                f"Replay(samples={self.samples}) is smaller than the batch of {self._drawn()} samples (over all processes) that "
                "is drawn from it: give samples of that number or more, or a smaller batch_size"
            )
        self.buffer.match(parts, [LOGITS])
        slots = self.buffer.slots(self._shares.total)
        self._entering = bool(slots)
        self._slots = {slot: self._shares.mine[n] for slot, n in slots.items() if n in self._shares.mine}
        rows = torch.tensor(list(self._slots.values()), dtype=torch.int64)
        self._rows = {name: tensor[rows.to(tensor.device)] for name, tensor in parts.items()}

    def draw(self, number: int) -> dict[str, Tensor] | None:
        """Samples that were kept, drawn for this moment; None where there are none, or no batch was seen.

        Args:
            number: of the draw; draws of one moment are independent.
        """
        if self._shares is None or not self.buffer.seen:
            return None
        slots = self._shares.of_draw(self.buffer.draw(self._drawn(), number))
        return self.buffer.take(slots) if len(slots) else None

    def batch(self, rows: Mapping[str, Tensor]) -> Any:
        """Samples in the form of the batch that was seen."""
        return filled(self._form, rows)

    def enter(self, logits: Tensor | None = None) -> None:
        """The batch that was seen has been trained on.

        Args:
            logits: (B, C), to keep beside the samples.

        Raises:
            PlugError: not one row of logits for each sample.
        """
        assert self._shares is not None
        rows = dict(self._rows)
        if logits is not None:
            if len(logits) != len(self._shares.mine):
                raise PlugError(
                    f"Replay(kind='der++') keeps the logits of each sample, and the network gave {len(logits)} rows of them for "
                    f"{len(self._shares.mine)} samples"
                )
            rows[LOGITS] = logits.detach()[torch.tensor(list(self._slots.values()), dtype=torch.int64, device=logits.device)]
        if self._entering:
            for slots, given in self._shares.gathered(list(self._slots), rows):
                self.buffer.put(slots, given)
        self.buffer.seen += self._shares.total
        self._rows, self._slots, self._entering = {}, {}, False

    def rest(self) -> None:
        """No batch is being trained on: nothing is drawn."""
        self._shares, self._rows, self._slots = None, {}, {}

    def _drawn(self) -> int:
        assert self._shares is not None
        return self._shares.total if self.batch_size is None else self.batch_size * self._shares.world

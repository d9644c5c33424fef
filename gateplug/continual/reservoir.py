"""A buffer that holds a uniform draw of all samples that have come by, however many there were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gateplug.continual.entries import Column
from gateplug.continual.functional import reservoir_slot
from gateplug.core.errors import PlugError, listed
from gateplug.core.resume import step_seed

_ENTER, _DRAW = 0xE17, 0xD2A  # keep the two kinds of random numbers apart


class Reservoir:
    """Samples by algorithm R (Vitter 1985): whatever was seen, each sample is in here with the same probability.

    Which sample goes where is a function of (seed, its number), what is drawn one of (seed, the number of samples seen).

    Args:
        capacity: M ≥ 1 samples.
        seed: of all draws.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seed = capacity, seed
        self.seen = 0
        """Samples that have come by."""
        self.columns: dict[str, Column] = {}

    @property
    def held(self) -> int:
        """Samples in here."""
        return min(self.seen, self.capacity)

    @property
    def bytes(self) -> int:
        """Memory of all columns, free slots among them."""
        return sum(column.values.nbytes for column in self.columns.values())

    def slots(self, count: int) -> dict[int, int]:
        """Where the next `count` samples will go: slot -> number of the sample among them, from 0; the last one stays."""
        found = {}
        for i in range(count):
            n = self.seen + i + 1
            slot = reservoir_slot(n, self.capacity, step_seed(self.seed, _ENTER, n) % n)
            if slot >= 0:
                found[slot] = i
        return found

    def put(self, slots: list[int], rows: Mapping[str, Tensor]) -> None:
        """Store samples: tensors (N, …) by name, one row a slot."""
        if not slots:
            return
        for name, tensor in rows.items():
            if name not in self.columns:
                labels = name.split("/")[0] in ("labels", "label")
                self.columns[name] = Column(self.capacity, tensor, labels)
            self.columns[name].put(slots, tensor)

    def draw(self, count: int, number: int = 0) -> Tensor:
        """Slots of at most `count` different samples, int64; draw `number` of this moment is independent of the others."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, _DRAW, self.seen, number))
        return torch.randperm(self.held, generator=generator)[:count]

    def take(self, slots: Tensor) -> dict[str, Tensor]:
        """The samples in slots (N,): tensors (N, …) by name."""
        return {name: column.take(slots) for name, column in self.columns.items()}

    def match(self, parts: Mapping[str, Tensor], others: Iterable[str] = ()) -> None:
        """Be where the parts of a batch are, and have the same ones, `others` aside.

        Raises:
            PlugError: samples that have come before had other parts.
        """
        if not self.columns:
            return
        kept = set(self.columns) - set(others)
        if kept != set(parts):
            raise PlugError(
                f"Replay holds samples with the parts {listed(sorted(kept))}, and a batch of this stream has "
                f"{listed(sorted(parts))}: all batches of a stream must have the same ones to be mixed"
            )
        first = next(iter(parts.values()))
        for name, column in self.columns.items():
            column.values = column.values.to(parts.get(name, first).device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors of the samples that are held, and a number."""
        rows = {
            name: (column.values[: self.held].clone(), column.sizes[: self.held].clone()) for name, column in self.columns.items()
        }
        columns = {name: {"values": values, "sizes": sizes} for name, (values, sizes) in rows.items()}
        return {"seen": self.seen, "capacity": self.capacity, "columns": columns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state.

        Raises:
            PlugError: it is of a buffer of another size.
        """
        if state["capacity"] != self.capacity:
            raise PlugError(
                f"the checkpoint's replay buffer is for {state['capacity']} samples, and samples={self.capacity}: resume with "
                f"Replay(samples={state['capacity']})"
            )
        self.seen, self.columns = state["seen"], {}
        for name, column in state["columns"].items():
            labels = name.split("/")[0] in ("labels", "label")
            made = self.columns[name] = Column(self.capacity, column["values"], labels)
            made.values[: self.held], made.sizes[: self.held] = column["values"], column["sizes"]

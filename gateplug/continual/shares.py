"""Samples of several processes as those of one."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from gateplug.core.processes import world_size


class Shares:
    """How the samples of a global batch are numbered: sample j of process r is number j · W + r, as loaders deal them out.

    Args:
        count: samples of this process.
    """

    def __init__(self, count: int) -> None:
        self.world = world_size()
        self.rank = dist.get_rank() if self.world > 1 else 0
        sizes: list[Any] = [count]
        if self.world > 1:
            sizes = [None] * self.world
            dist.all_gather_object(sizes, count)
        order = [(j, r) for j in range(max(sizes)) for r in range(self.world) if j < sizes[r]]
        self.total = len(order)
        """Samples of all processes."""
        self.mine = {number: j for number, (j, r) in enumerate(order) if r == self.rank}
        """Number in the global batch -> row in that of this process."""

    def of_draw(self, slots: Tensor) -> Tensor:
        """This process's share of a draw that all have made: as many for each."""
        return slots[: len(slots) // self.world * self.world][self.rank :: self.world]

    def gathered(self, slots: list[int], rows: dict[str, Tensor]) -> list[tuple[list[int], dict[str, Tensor]]]:
        """What each process has for the buffer, in the order of the processes."""
        if self.world == 1:
            return [(slots, rows)]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, (slots, {name: t.cpu() for name, t in rows.items()}))
        return found

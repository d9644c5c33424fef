"""What static gates have chosen, read from their parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gateplug.moe.layers import DSelectK
from gateplug.moe.routing import ExpertGate
from gateplug.moe.tally import Report, distribution, of_load, shares, wide


class StaticTally:
    """Static gates, side by side one row a task: their weights are read at the window's end, no batch is needed.

    Args:
        gates: of one number of experts.
        title: their name.
        group: name of the tasks, None for a gate that has none.
    """

    reduced = False
    on = False

    def __init__(self, gates: list[ExpertGate], title: str, group: str | None) -> None:
        self.gates, self.title, self.group = gates, title, group
        self.experts = gates[0].experts

    def take(self, device: torch.device) -> Tensor:
        """The weights, one row after the other, then the share of frozen bits of each selector, on `device`."""
        frozen = [gate.frozen().flatten() for gate in self.gates if isinstance(gate, DSelectK)]
        return wide(torch.cat([*(gate.weights().flatten() for gate in self.gates), *frozen]).to(device))

    def report(self, sums: Tensor) -> Report:
        """What these, on the CPU, say."""
        n = self.experts * sum(gate.tasks or 1 for gate in self.gates)
        q, frozen = sums[:n].view(-1, self.experts), sums[n:]
        p = distribution(q)
        used = (q != 0).sum(-1).to(q.dtype)
        numbers = of_load(q.sum(0))
        numbers["confidence"] = float(p.amax(-1).mean())
        numbers["entropy"] = float(torch.special.entr(p).sum(-1).mean()) / math.log(self.experts)
        numbers["experts_used"] = float(used.mean())
        if len(frozen):
            numbers["frozen_bits"] = float(frozen.mean())
        return Report(shares(q.sum(0)), numbers, None if self.group is None else q, used)

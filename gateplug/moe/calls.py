"""What a call of a router has left for the statistics: its rows, without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gateplug.moe.families import Seen


class Call(NamedTuple):
    """One call, or several in a row, of a router; all tensors have the rows first."""

    logits: Tensor | None
    assigned: Tensor | None
    weights: Tensor | None
    limit: Tensor | None
    """What a capacity kept, (T, k) bool."""
    q: Tensor | None
    final: Tensor | None
    """(T, E): weights of a gate of gateplug, what was dropped left out."""
    z: Tensor | None
    mask: Tensor | None
    by_expert: bool

    def seen(self) -> Seen:
        """As a reader of routers gives it."""
        return Seen(self.logits, self.assigned, self.weights, self.limit, q=self.q, by_expert=self.by_expert)

    def kept(self) -> Call:
        """A copy, in which the model cannot write."""
        return Call(*(t.detach().clone() if isinstance(t, Tensor) else t for t in self))  # type: ignore[arg-type]


def together(calls: Sequence[Call]) -> Call:
    """The calls as one."""
    if len({call.mask is None for call in calls}) > 1:  # padding in some
        calls = [call if call.mask is not None else call._replace(mask=_all_rows(call.seen())) for call in calls]
    parts = zip(*calls, strict=True)
    return Call(*(torch.cat(part) if isinstance(part[0], Tensor) else part[0] for part in parts))  # type: ignore[arg-type]


def _all_rows(seen: Seen) -> Tensor:
    return torch.ones(seen.rows, dtype=torch.bool, device=seen.scores.device)

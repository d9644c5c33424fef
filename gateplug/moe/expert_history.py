"""The load of a router over a training, at a bounded number of moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIMIT = 200
"""Moments that are kept."""


class History:
    """Loads (E,) by step: of all looks up to :data:`LIMIT`, then of every second, every fourth …, and of the last."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.loads: list[Tensor] = []
        self._looks: list[int] = []
        self._every = 1

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, load: Tensor) -> None:
        """Keep a load; a second one of the same step takes the place of the first."""
        if self.steps and self.steps[-1] == step:
            self.loads[-1] = load
            return
        look = self._looks[-1] + 1 if self._looks else 0
        if self._looks and self._looks[-1] % self._every:  # was kept for being the last
            self._keep(range(len(self) - 1))
        self.steps.append(step)
        self.loads.append(load)
        self._looks.append(look)
        if len(self) > LIMIT:
            self._every *= 2
            self._keep([i for i, n in enumerate(self._looks) if n % self._every == 0 or n == look])

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"steps": list(self.steps), "looks": list(self._looks), "every": self._every, "loads": torch.stack(self.loads)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> History:
        """From :meth:`state_dict`."""
        history = cls()
        history.steps, history._looks, history._every = list(state["steps"]), list(state["looks"]), state["every"]
        history.loads = list(state["loads"].cpu())
        return history

    def before(self, step: int) -> History:
        """This, without what is not earlier than `step`."""
        self._keep([i for i, s in enumerate(self.steps) if s < step])
        return self

    def _keep(self, places: Any) -> None:
        self.steps, self.loads, self._looks = ([values[i] for i in places] for values in (self.steps, self.loads, self._looks))

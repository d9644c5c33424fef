"""Who leaves: scores of the rows that are still in the batch, exit by exit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gateplug.early_exit.functional import confidence_scores, entropy_scores, score_at


class Decision:
    """Scores of the rows that are still here, and what they carry from exit to exit."""

    def __init__(self, gate: str, mode: str, threshold: float) -> None:
        self.gate, self.mode, self.threshold = gate, mode, threshold
        self.taken: Tensor | None = None
        self.guess: Tensor | None = None
        self.count: Tensor | None = None

    def __call__(self, logits: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """Who leaves at the next exit: (rows,) bool, from its logits (rows, C) and what gives its gate's logits (rows,)."""
        return self._score(logits, gate) >= self.threshold

    def _score(self, logits: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        if self.gate == "patience":
            guess = logits.argmax(-1)
            same = torch.zeros_like(guess, dtype=torch.bool) if self.guess is None else guess == self.guess
            self.count = (torch.zeros_like(guess) if self.count is None else self.count + 1) * same
            self.guess = guess
            return self.count.to(logits.dtype)
        rules: dict[str, Callable[[Tensor], Tensor]] = {"confidence": confidence_scores, "entropy": entropy_scores}
        if self.gate in rules:
            return rules[self.gate](logits[:, None])[:, 0]
        g = gate(logits).sigmoid()
        if self.mode == "hazard":  # knows nothing of the gates before
            return g
        taken = torch.zeros_like(g) if self.taken is None else self.taken
        self.taken = taken + g
        return score_at(g, taken, self.mode)

    def keep(self, stay: Tensor) -> None:
        """Forget who has left."""
        for name in ("taken", "guess", "count"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[stay])


class Leaving(Decision):
    """Everybody at one exit, whatever the score, which is computed all the same: to measure what leaving there takes."""

    def __init__(self, gate: str, mode: str, exit: int) -> None:
        super().__init__(gate, mode, 0.0)
        self.exit, self.passed = exit, 0

    def __call__(self, logits: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """All or none."""
        scored = super().__call__(logits, gate)
        self.passed += 1
        return torch.full_like(scored, self.passed > self.exit)

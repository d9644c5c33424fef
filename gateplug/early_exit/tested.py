"""What a test tells of the answers of a network in which samples leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gateplug.core.batches import labels_of
from gateplug.early_exit.calibration import calibration_error
from gateplug.early_exit.conformal import conformal_sets, quality
from gateplug.early_exit.metrics import Pooled
from gateplug.early_exit.runner import ExitOutput


class TestRecords(Pooled):
    """Exit, confidence, correctness and conformal sets of every sample, over all processes.

    Args:
        exits: L.
        thresholds: variant -> (L,), from a validation; empty: no sets.
    """

    __test__ = False  # no case of pytest

    def __init__(self, exits: int, thresholds: Mapping[str, Tensor]) -> None:
        one: tuple[int, ...] = ()
        sets = {f"{v}_{what}": (one, kind) for v in thresholds for what, kind in (("covers", torch.bool), ("size", torch.int64))}
        super().__init__(
            {
                "exit": (one, torch.int64),
                "judged": (one, torch.int64),
                "confidence": (one, torch.float32),
                "correct": (one, torch.bool),
                **sets,
            }
        )
        self.exits, self.thresholds = exits, thresholds
        self._outputs: list[ExitOutput] = []

    def answered(self, out: ExitOutput) -> None:
        """Keep what the runner gave for a batch."""
        self.add(exit=out.exit)
        self._outputs.append(out)

    def update(self, batch: Any) -> None:
        """Compare it with the batch's labels; a batch without them, or for which the network was not run once, is not judged."""
        outputs, self._outputs = self._outputs, []
        try:
            labels = labels_of(batch)
        except ValueError:
            return
        if len(outputs) != 1 or len(outputs[0].exit) != len(labels):
            return
        kept = labels != -100
        exits, labels = outputs[0].exit[kept], labels[kept].to(outputs[0].exit.device)
        probs = outputs[0].logits[kept].softmax(-1)
        confidence, guess = probs.max(-1)
        self.add(judged=exits, confidence=confidence, correct=guess == labels)
        for variant, q in self.thresholds.items():
            sets = conformal_sets(probs, exits, q.to(probs))
            self.add(**{f"{variant}_covers": sets.gather(1, labels[:, None])[:, 0], f"{variant}_size": sets.sum(1)})

    def result(self, cost: Tensor) -> dict[str, float]:
        """By name: share that left at each exit, mean cost, pooled calibration errors, coverage and size of the sets.

        Args:
            cost: (L,), NaN where it is not known.
        """
        found = self.compute()
        exits = found["exit"]
        if not len(exits):
            return {}
        left = torch.bincount(exits, minlength=self.exits).double() / len(exits)
        numbers = {f"exit{i}/left": share for i, share in enumerate(left.tolist())}
        if not bool(cost.isnan().any()):
            numbers["cost"] = float(left @ cost)
        judged = found["judged"]
        if not len(judged):
            return numbers
        numbers["calibration_error"] = float(calibration_error(found["confidence"], found["correct"]))
        for i in range(self.exits):
            here = judged == i
            if bool(here.any()):
                numbers[f"exit{i}/accuracy"] = float(found["correct"][here].double().mean())
                numbers[f"exit{i}/calibration_error"] = float(
                    calibration_error(found["confidence"][here], found["correct"][here])
                )
        for variant in self.thresholds:
            sets = quality(found[f"{variant}_covers"], found[f"{variant}_size"], judged, self.exits)
            numbers |= {
                f"conformal/{variant}/coverage": float(sets.overall_coverage),
                f"conformal/{variant}/size": float(sets.overall_size),
            }
            each = zip(sets.coverage.tolist(), sets.size.tolist(), sets.samples.tolist(), strict=True)
            for i, (coverage, size, samples) in enumerate(each):
                if samples and variant == "per_exit":
                    numbers |= {f"conformal/{variant}/exit{i}/coverage": coverage, f"conformal/{variant}/exit{i}/size": size}
        return numbers

    def compute(self) -> dict[str, Tensor]:
        """All records, on the CPU."""
        return {name: self.all(name).cpu() for name in self._parts}

"""What a validation tells of every exit: accuracies, who leaves where, and the costs of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gateplug.early_exit.functional import (
    best_exit,
    calibration_error,
    confidence_scores,
    entropy_scores,
    exit_scores,
    first_exit,
    fit_threshold,
    gate_pos_weight,
    patience_scores,
)
from gateplug.early_exit.metrics import Pooled
from gateplug.early_exit.operating import operating_points
from gateplug.early_exit.thresholds import Sweep

RULES = ("jei", "confidence", "entropy", "patience")
"""How it is decided who leaves."""


class Seen(NamedTuple):
    """A whole validation; N samples, L exits, K = L − 1 gates."""

    accuracy: Tensor
    """(L,) of each exit on all samples."""
    exit: Tensor
    """(N,) where each sample leaves."""
    left: Tensor
    """(L,) share of the samples that leave at each exit."""
    answered: float
    """Accuracy of the network with exits."""
    cost: float
    """Mean cost, as a share of the whole network's."""
    pos_weight: Tensor
    """(K,) of the gates' loss."""
    points: dict[str, Sweep]
    """Rule -> what each of its thresholds comes to."""
    threshold: float
    """The one in use."""
    missed: float | None
    """The best accuracy, if it is below the one that was asked for."""
    calibration: Tensor
    """(L + 1,) pooled calibration error of each exit on all samples, and of the answers."""
    found: dict[str, Tensor]
    """Of every sample: scores (N, K) by rule, `correct`, `p_max` and `true` (1 − p of the label), (N, L)."""


def scores_of(rule: str, mode: str, gates: Tensor, logits: Tensor) -> Tensor:
    """Scores (B, K) of a rule, from gates (B, K) and logits of the exits (B, K, C)."""
    if rule == "jei":
        return exit_scores(gates, mode)
    return {"confidence": confidence_scores, "entropy": entropy_scores, "patience": patience_scores}[rule](logits)


class ExitRecords(Pooled):
    """Scores, correctness and cross-entropies of every sample of an epoch, over all processes.

    Args:
        exits: L.
    """

    def __init__(self, exits: int) -> None:
        super().__init__(
            {
                **dict.fromkeys(RULES, ((exits - 1,), torch.float32)),
                "correct": ((exits,), torch.bool),
                "ce": ((exits,), torch.float32),
                "p_max": ((exits,), torch.float32),
                "true": ((exits,), torch.float32),
            }
        )
        self.exits = exits

    def update(self, scores: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add a batch: scores (B, K) by rule, logits of every exit (B, L, C), labels (B,)."""
        kept = labels != -100
        logits, labels = logits[kept], labels[kept]
        ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(-1, self.exits), reduction="none")
        confidence, guess = logits.softmax(-1).max(-1)
        self.add(
            **{rule: values[kept] for rule, values in scores.items()},
            correct=guess == labels[:, None],
            ce=ce,
            p_max=confidence,
            true=-torch.expm1(-ce),
        )

    def compute(self) -> dict[str, Tensor]:
        """Scores (N, K) by rule; `correct`, `ce`, `p_max` and `true` (N, L) of all samples, on the CPU."""
        return {name: self.all(name).cpu() for name in self._parts}


def look(
    records: ExitRecords,
    rule: str,
    threshold: float,
    target: Mapping[str, float] | None,
    cost: Tensor,
    cost_weight: float,
    cumulative: bool,
    spent: Tensor | None = None,
) -> Seen | None:
    """What the records say; None without a sample.

    Args:
        records: of a validation.
        rule: who decides.
        threshold: of the rule.
        target: a cost or an accuracy that the threshold is fitted to instead, see :func:`functional.fit_threshold`; the best
            accuracy where that is out of reach, as it may be in the middle of a training.
        cost: (L,).
        cost_weight: λ.
        cumulative: of the gates' weights.
        spent: (L,) what a target's cost is counted in, if not in `cost`: seconds.
    """
    found = records.compute()
    correct, ce = found["correct"], found["ce"]
    if not len(ce):
        return None
    scores = found[rule]
    missed = None
    if target is not None:
        top = float(operating_points({rule: scores}, cost, correct)[rule].accuracy.max())  # type: ignore[union-attr]
        missed = top if top < target.get("accuracy", 0) - 1e-12 else None
        fitted = {f"target_{name}": value if missed is None else missed for name, value in target.items()}
        threshold = fit_threshold(scores, cost if spent is None else spent, correct=correct, **fitted)
    exits = first_exit(scores, threshold)
    left = torch.bincount(exits, minlength=records.exits).double() / len(exits)
    best = best_exit(ce, cost.to(ce.dtype), cost_weight)
    own = (found["p_max"].gather(1, exits[:, None])[:, 0], correct.gather(1, exits[:, None])[:, 0])
    parts = [*zip(found["p_max"].unbind(1), correct.unbind(1), strict=True), own]
    return Seen(
        correct.double().mean(0),
        exits,
        left,
        float(correct.gather(1, exits[:, None]).double().mean()),
        float(left @ cost.double()),
        gate_pos_weight(best, records.exits - 1, cumulative),
        operating_points({name: found[name] for name in RULES}, cost, correct),
        threshold,
        missed,
        torch.stack([calibration_error(confidence, right) for confidence, right in parts]),
        found,
    )

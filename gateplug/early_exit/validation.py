"""What a validation tells of every exit: accuracies, who leaves where, and the costs of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gateplug.early_exit.functional import (
    best_exit,
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
            }
        )
        self.exits = exits

    def update(self, scores: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Add a batch: scores (B, K) by rule, logits of every exit (B, L, C), labels (B,)."""
        ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(-1, self.exits), reduction="none")
        self.add(**scores, correct=logits.argmax(-1) == labels[:, None], ce=ce)

    def compute(self) -> dict[str, Tensor]:
        """Scores (N, K) by rule, `correct` (N, L) and `ce` (N, L) of all samples, on the CPU."""
        return {name: self.all(name).cpu() for name in (*RULES, "correct", "ce")}


def look(
    records: ExitRecords,
    rule: str,
    threshold: float,
    target: Mapping[str, float] | None,
    cost: Tensor,
    cost_weight: float,
    cumulative: bool,
) -> Seen | None:
    """What the records say; None without a sample.

    Args:
        records: of a validation.
        rule: who decides.
        threshold: of the rule.
        target: a cost or an accuracy that the threshold is fitted to instead; see :func:`functional.fit_threshold`.
        cost: (L,).
        cost_weight: λ.
        cumulative: of the gates' weights.
    """
    found = records.compute()
    correct, ce = found["correct"], found["ce"]
    if not len(ce):
        return None
    scores = found[rule]
    if target is not None:
        fitted = {f"target_{name}": value for name, value in target.items()}
        threshold = fit_threshold(scores, cost, correct=correct, **fitted)
    exits = first_exit(scores, threshold)
    left = torch.bincount(exits, minlength=records.exits).double() / len(exits)
    best = best_exit(ce, cost.to(ce.dtype), cost_weight)
    return Seen(
        correct.double().mean(0),
        exits,
        left,
        float(correct.gather(1, exits[:, None]).double().mean()),
        float(left @ cost.double()),
        gate_pos_weight(best, records.exits - 1, cumulative),
        operating_points({name: found[name] for name in RULES}, cost, correct),
        threshold,
    )

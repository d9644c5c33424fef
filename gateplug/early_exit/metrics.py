"""Metrics of a network with exits, over the whole epoch and all processes; no update reads a value back from a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from gateplug.core.errors import PlugError, whole_numbers
from gateplug.early_exit.calibration import calibration_error, check_binning
from gateplug.early_exit.conformal import check_alpha, check_variant, conformal_sets, conformal_thresholds, quality


class Pooled(Metric):
    """A metric that keeps a few numbers of every sample until the end of the epoch."""

    full_state_update = False
    is_differentiable = False

    def __init__(self, parts: dict[str, tuple[tuple[int, ...], torch.dtype | None]]) -> None:
        super().__init__()
        self._parts = parts
        for name in parts:
            self.add_state(name, [], dist_reduce_fx="cat")
        self._begin()

    def _begin(self) -> None:
        # a process that sees no sample must still bring tensors of the form that the others gather
        for name, (shape, dtype) in self._parts.items():
            getattr(self, name).append(torch.zeros(0, *shape, dtype=dtype or self.dtype, device=self.device))

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._begin()

    def add(self, **values: Tensor) -> None:
        """Add these numbers of some samples."""
        for name, value in values.items():
            getattr(self, name).append(value.detach().to(self._parts[name][1] or self.dtype))

    def all(self, name: str) -> Tensor:
        """Of all samples so far."""
        return dim_zero_cat(getattr(self, name))


class CalibrationError(Pooled):
    """Expected calibration error, pooled: see :func:`gateplug.early_exit.functional.calibration_error`.

    Args:
        bins: at least 1.
        binning: `quantile` or `width`.

    Raises:
        ValueError: a number out of its range, an unknown binning.
    """

    higher_is_better = False

    def __init__(self, bins: int = 15, binning: str = "quantile") -> None:
        check_binning(bins, binning)
        super().__init__({"confidence": ((), None), "correct": ((), torch.bool)})
        self.bins, self.binning = bins, binning

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Add a batch: confidence (B,) in [0, 1], correct (B,) bool."""
        if confidence.dim() != 1 or confidence.shape != correct.shape:
            given = f"confidence of shape {tuple(confidence.shape)} and correct of shape {tuple(correct.shape)}"
            raise ValueError(f"{given} must both be (B,), one number a sample")
        self.add(confidence=confidence, correct=correct)

    def compute(self) -> Tensor:
        """The error of all samples, a float64 scalar; NaN of none."""
        return calibration_error(self.all("confidence"), self.all("correct"), self.bins, self.binning)


class ExitCalibration(Pooled):
    """Calibration error of every exit, on all samples and on those that left there, and of the network as it answers.

    Args:
        exits: L, at least 1, the last one with them.
        bins: at least 1.
        binning: `quantile` or `width`.
        ignore_index: samples with this label are left out.

    Raises:
        ValueError: a number out of its range, an unknown binning.
    """

    higher_is_better = False

    def __init__(self, exits: int, bins: int = 15, binning: str = "quantile", ignore_index: int = -100) -> None:
        whole_numbers(exits=exits, ignore_index=ignore_index)
        if exits < 1:
            raise ValueError(f"exits={exits} must be at least 1, the last one counts")
        check_binning(bins, binning)
        parts = {"confidence": ((exits,), None), "correct": ((exits,), torch.bool)}
        super().__init__({**parts, "exit": ((), torch.int64), "counts": ((), torch.bool)})
        self.exits, self.bins, self.binning, self.ignore_index = exits, bins, binning, ignore_index

    def update(self, logits: Tensor, exit: Tensor, labels: Tensor) -> None:
        """Add a batch: logits of every exit (B, L, C), where each sample leaves (B,), labels (B,)."""
        _check_batch("logits", logits, exit, labels, self.exits)
        confidence, guess = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).max(-1)
        self.add(confidence=confidence, correct=guess == labels[:, None], exit=exit, counts=labels != self.ignore_index)

    def compute(self) -> dict[str, Tensor]:
        """`exit{l}/all`, `exit{l}/left` for each exit and `mixture`, float64 scalars; NaN where there are no samples."""
        counts = self.all("counts")
        confidence, correct, exits = (self.all(name)[counts] for name in ("confidence", "correct", "exit"))

        def error(at: int, rows: Any = slice(None)) -> Tensor:
            return calibration_error(confidence[rows, at], correct[rows, at], self.bins, self.binning)

        out = {f"exit{at}/all": error(at) for at in range(self.exits)}
        out |= {f"exit{at}/left": error(at, exits == at) for at in range(self.exits)}
        own, right = (part.gather(1, exits[:, None])[:, 0] for part in (confidence, correct))
        return {**out, "mixture": calibration_error(own, right, self.bins, self.binning)}


class ConformalCoverage(Pooled):
    """Coverage and mean size of conformal sets, at each exit and overall.

    First :meth:`fit` on calibration samples, in every process on all of them; then update on others. `thresholds` (L,) is what
    was fitted; it may be set as well. It outlives :meth:`reset`, and no state dict holds it.

    Args:
        alpha: chance of a miss, in (0, 1).
        variant: `general`, `all`, `strict` or `per_exit`, see :func:`gateplug.early_exit.functional.conformal_thresholds`.
        ignore_index: samples with this label are left out.

    Raises:
        ValueError: alpha out of its range, an unknown variant.
    """

    thresholds: Tensor | None

    def __init__(self, alpha: float = 0.05, variant: str = "per_exit", ignore_index: int = -100) -> None:
        check_alpha(alpha)
        check_variant(variant)
        whole_numbers(ignore_index=ignore_index)
        one: tuple[int, ...] = ()
        super().__init__({"covered": (one, torch.bool), "size": (one, torch.int64), "exit": (one, torch.int64)})
        self.alpha, self.variant, self.ignore_index = alpha, variant, ignore_index
        self.register_buffer("thresholds", None, persistent=False)

    @torch.no_grad()
    def fit(self, probs: Tensor, exits: Tensor, labels: Tensor) -> None:
        """Take thresholds from calibration samples: probabilities (N, L, C), where each leaves (N,), labels (N,)."""
        _check_batch("probs", probs, exits, labels)
        kept = labels != self.ignore_index
        probs, exits, labels = probs[kept], exits[kept], labels[kept]
        true = probs.gather(2, labels[:, None, None].expand(-1, probs.shape[1], 1))[..., 0]
        self.thresholds = conformal_thresholds(1 - true, exits, self.alpha, self.variant).to(self.device)

    def update(self, probs: Tensor, exits: Tensor, labels: Tensor) -> None:
        """Add a batch: probabilities (B, L, C), where each sample leaves (B,), labels (B,)."""
        if self.thresholds is None:
            raise PlugError("ConformalCoverage has no thresholds: call fit(probs, exits, labels) on calibration samples first")
        _check_batch("probs", probs, exits, labels, len(self.thresholds))
        own = probs.gather(1, exits[:, None, None].expand(-1, 1, probs.shape[2]))[:, 0]
        sets = conformal_sets(own, exits, self.thresholds)
        kept = labels != self.ignore_index
        covered = sets.gather(1, labels.masked_fill(~kept, 0)[:, None])[:, 0]
        # a sample that is left out has no exit
        self.add(covered=covered, size=sets.sum(1), exit=exits.masked_fill(~kept, -1))

    def compute(self) -> dict[str, Tensor]:
        """`exit{l}/coverage`, `exit{l}/size` for each exit, `coverage` and `size`; NaN where there are no samples."""
        exits = self.all("exit")
        kept = exits >= 0
        num_exits = 0 if self.thresholds is None else len(self.thresholds)
        seen = quality(self.all("covered")[kept], self.all("size")[kept], exits[kept], num_exits)
        out = {f"exit{at}/coverage": value for at, value in enumerate(seen.coverage)}
        out |= {f"exit{at}/size": value for at, value in enumerate(seen.size)}
        return {**out, "coverage": seen.overall_coverage, "size": seen.overall_size}


def _check_batch(name: str, values: Tensor, exits: Tensor, labels: Tensor, num_exits: int | None = None) -> None:
    if values.dim() != 3 or (num_exits is not None and values.shape[1] != num_exits):
        wanted = "(B, L, C)" if num_exits is None else f"(B, {num_exits}, C)"
        raise ValueError(f"{name} of shape {tuple(values.shape)} must be {wanted}: all exits, the last one with them")
    if exits.shape != values.shape[:1] or labels.shape != values.shape[:1]:
        given = f"exits of shape {tuple(exits.shape)} and labels of shape {tuple(labels.shape)}"
        raise ValueError(f"{given} must both be ({len(values)},), one for each sample of {name}")

"""Operating points: what every threshold of every rule comes to on the same trained exits."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from gateplug.early_exit.functional import Sweep, sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGETS = ("cost", "accuracy", "latency")
"""What a threshold can be fitted to."""
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
COLORS = {"jei": "#2166ac", "confidence": "#d6604d", "entropy": "#4d9221", "patience": "#8c8c8c"}


def check_target(target: Mapping[str, float] | None) -> None:
    """Raise ValueError unless it is None, `cost` or `accuracy` in [0, 1], or `latency` > 0 with `batch` ≥ 1 or without."""
    if target is None:
        return
    names = set(target) if isinstance(target, Mapping) else set()
    good = len(names - {"batch"}) == 1 and names <= {*TARGETS, "batch"} and ("batch" not in names or "latency" in names)
    for name, value in target.items() if good else ():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        low, high = (0, 1) if name in ("cost", "accuracy") else (1 if name == "batch" else 0, float("inf"))
        good = good and number and low <= value <= high and (name != "batch" or value == int(value))
    if not good:
        raise ValueError(
            f"operating_point={target!r} must be {{'cost': share of the network's multiply-adds}}, "
            "{'accuracy': share of right answers}, a number in [0, 1], or {'latency': seconds of a batch, 'batch': samples in it}"
        )


def operating_points(scores: Mapping[str, Tensor], cost: Tensor, correct: Tensor) -> dict[str, Sweep]:
    """The sweep of each rule; patience, which leaves after agreements, has K + 1 points.

    Args:
        scores: rule -> (N, K).
        cost: (L,).
        correct: (N, L) bool.
    """
    return {rule: sweep(values, cost, correct) for rule, values in scores.items()}


def dearest(one: Sweep, cost: float) -> int | None:
    """Place of the dearest point of a sweep that costs no more; None if there is none."""
    within = (one.cost <= cost + 1e-9).nonzero().flatten()
    return int(within[-1]) if len(within) else None


def nearest_point(one: Sweep, cost: float | None, accuracy: float | None) -> float:
    """The threshold of a sweep that meets a target, by the rules of :func:`functional.fit_threshold`.

    Raises:
        ValueError: none or both targets, or one that cannot be met.
    """
    if (cost is None) == (accuracy is None):
        raise ValueError(f"give one target: cost={cost!r} or accuracy={accuracy!r}")
    assert one.accuracy is not None
    if cost is not None:
        place = dearest(one, cost)
        if place is None:
            raise ValueError(f"no threshold costs at most {cost:g}: the least is {float(one.cost.min()):.4g}")
        return float(one.threshold[place])
    assert accuracy is not None
    reached = (one.accuracy >= accuracy - 1e-12).nonzero().flatten()
    if not len(reached):
        raise ValueError(f"no threshold reaches an accuracy of {accuracy:g}: the best is {float(one.accuracy.max()):.4g}")
    return float(one.threshold[reached[0]])


def at_equal_cost(points: Mapping[str, Sweep]) -> list[tuple[str, ...]]:
    """Rows of a table: the most that may be spent, and each rule's accuracy at its dearest point within it."""
    rows = []
    for share in SHARES:
        found = []
        for one in points.values():
            assert one.accuracy is not None
            place = dearest(one, share)
            found.append("" if place is None else f"{float(one.accuracy[place]):.4f}")
        if any(found):
            rows.append((f"{share:g}", *found))
    return rows


def write_csv(points: Mapping[str, Sweep], path: Path) -> None:
    """All points: rule, threshold, mean cost, accuracy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("rule", "threshold", "cost", "accuracy"))
        for rule, one in points.items():
            assert one.accuracy is not None
            for row in zip(one.threshold.tolist(), one.cost.tolist(), one.accuracy.tolist(), strict=True):
                out.writerow((rule, *(f"{value:.9g}" for value in row)))


def write_latency(
    rule: str, targets: Sequence[tuple[str, float, float, float]], points: Mapping[int, Sequence[tuple[float, float]]], path: Path
) -> None:
    """Points as they were run: rule, threshold, cost, accuracy, and seconds of a batch of each size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("rule", "threshold", "cost", "accuracy", "batch", "p50", "p95"))
        for batch, measured in points.items():
            for target, times in zip(targets, measured, strict=True):
                out.writerow((rule, *(f"{value:.9g}" for value in target[1:]), batch, *(f"{value:.6g}" for value in times)))


def draw(points: Mapping[str, Sweep], cost: Tensor, accuracy: Tensor, chosen: tuple[float, float], title: str) -> Figure:
    """Accuracy against cost, a line a rule, a mark for each exit if all samples left there, and the point that is used.

    Args:
        points: rule -> sweep.
        cost: (L,) of the exits.
        accuracy: (L,) of the exits on all samples.
        chosen: cost and accuracy of the threshold in use.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for rule, one in points.items():
        assert one.accuracy is not None
        x, y = one.cost.tolist(), one.accuracy.tolist()
        axes.step(x, y, where="post", color=COLORS.get(rule), label=rule, linewidth=1.6)
    axes.plot(cost.tolist(), accuracy.tolist(), "x", color="black", label="all samples at one exit")
    axes.plot(*chosen, "o", color="black", fillstyle="none", markersize=9, label="threshold in use")
    axes.set(xlabel="mean cost, share of the network's multiply-adds", ylabel="accuracy on validation samples")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure

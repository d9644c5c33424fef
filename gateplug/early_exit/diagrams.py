"""Pictures of a network with exits: how far its confidence can be believed, and accuracy against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from gateplug.early_exit.calibration import reliability
from gateplug.early_exit.operating import COLORS
from gateplug.early_exit.thresholds import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gateplug.early_exit.validation import Seen


def draw_reliability(seen: Seen, title: str) -> Figure:
    """Accuracy by confidence, a panel for each exit on all samples and one for the answers; below, how many samples.

    Args:
        seen: a validation.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    confidence, correct = seen.found["p_max"], seen.found["correct"]
    exits = seen.exit[:, None]
    panels = [(f"exit {i}", confidence[:, i], correct[:, i]) for i in range(confidence.shape[1] - 1)]
    panels.append(("network", confidence[:, -1], correct[:, -1]))
    panels.append(("answers", confidence.gather(1, exits)[:, 0], correct.gather(1, exits)[:, 0]))
    columns = min(len(panels), 5)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.3 * columns + 0.4, 2.9 * lines + 0.4), layout="constrained")
    grid = figure.add_gridspec(2 * lines, columns, height_ratios=[3, 1] * lines)
    for i, (name, confident, right) in enumerate(panels):
        row, column = divmod(i, columns)
        top, below = figure.add_subplot(grid[2 * row, column]), figure.add_subplot(grid[2 * row + 1, column])
        _panel(top, below, confident, right, f"{name}: error {float(seen.calibration[i]):.3f}")
        if column == 0:
            top.set_ylabel("accuracy", fontsize=8)
            below.set_ylabel("samples", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _panel(top: Axes, below: Axes, confidence: Tensor, correct: Tensor, title: str) -> None:
    bins = 15
    found = reliability(confidence, correct, bins, "width")
    middle = [(i + 0.5) / bins for i in range(bins)]
    accuracy, mean = found.accuracy.nan_to_num(0.0), found.confidence.nan_to_num(0.0)
    top.bar(middle, accuracy.tolist(), 1 / bins, color="#2166ac", edgecolor="white", linewidth=0.4)
    gap = mean - accuracy
    top.bar(
        middle, gap.tolist(), 1 / bins, bottom=accuracy.tolist(), color="#d6604d", alpha=0.35, edgecolor="#d6604d", linewidth=0.4
    )
    top.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    top.set(xlim=(0, 1), ylim=(0, 1), xticks=[])
    top.set_title(title, fontsize=8)
    below.bar(middle, found.samples.tolist(), 1 / bins, color="#8c8c8c")
    below.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    below.set_xlabel("confidence", fontsize=8)
    for axes in (top, below):
        axes.tick_params(labelsize=7)


def draw_latency(
    curves: Mapping[int, Mapping[str, Sweep]],
    marks: Mapping[int, Sequence[tuple[float, float, float]]],
    whole: Mapping[int, tuple[float, float]],
    rule: str,
) -> Figure:
    """Accuracy against the time of a batch, a panel for each size.

    Args:
        curves: size -> rule -> sweep whose costs are seconds: what the times of the exits come to in the mean.
        marks: size -> (accuracy, p50, p95) of operating points of `rule`, as they were run.
        whole: size -> (seconds, accuracy) when nobody leaves.
        rule: in use.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 3.8), layout="constrained")
    for axes, (batch, sweeps) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, one in sweeps.items():
            assert one.accuracy is not None
            axes.step(
                (1e3 * one.cost).tolist(), one.accuracy.tolist(), where="post", color=COLORS[name], label=name, linewidth=1.4
            )
        accuracy, middle, high = zip(*marks[batch], strict=True) if marks[batch] else ((), (), ())
        x = [1e3 * m for m in middle]
        bars = [[0.0] * len(x), [1e3 * (h - m) for m, h in zip(middle, high, strict=True)]]
        axes.errorbar(x, accuracy, xerr=bars, fmt="o", color="black", markersize=4, capsize=2, label=f"{rule}, run: p50 to p95")
        axes.plot(1e3 * whole[batch][0], whole[batch][1], "x", color="black", label="nobody leaves")
        axes.set(xlabel=f"ms for a batch of {batch}", ylabel="accuracy on validation samples")
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle("early_exit: accuracy and time on this machine", fontsize=10)
    return figure

"""Figures that the library draws, without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(rows: Mapping[str, Tensor], title: str, across: str, down: str = "layer", what: str = "openness") -> Figure:
    """Draw values in [0, 1], one row per name, each row sorted as it is; shorter rows end in grey.

    Args:
        rows: name -> vector; the vectors may differ in length.
        title: of the figure.
        across: what the horizontal axis counts, e.g. "unit".
        down: what the rows are.
        what: the values are.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = max(len(v) for v in rows.values())
    image = torch.full((len(rows), width), float("nan"))
    for i, values in enumerate(rows.values()):
        image[i, : len(values)] = values.float().cpu()
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    # the colours span the tenths around the values: gates that all stay near one half would else be of one colour
    low, high = image.nan_to_num(1.0).min(), image.nan_to_num(0.0).max()
    vmin, vmax = float((10 * low).floor() / 10), float((10 * high).ceil() / 10)
    shown = axes.imshow(
        image.numpy(), aspect="auto", vmin=vmin, vmax=max(vmax, vmin + 0.1), cmap="viridis", interpolation="nearest"
    )
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    axes.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=axes, label=what)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

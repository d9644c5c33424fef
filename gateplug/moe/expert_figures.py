"""Pictures of experts: who takes how much, layer by layer, over time, and task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gateplug.moe.expert_history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 8
"""Most layers that one picture shows over time."""
_LABEL = "load × experts (1: fair share, black: none)"


def by_layer(loads: Mapping[str, Tensor], title: str) -> Figure:
    """Layers × experts: the share of the load times E, white where an expert takes its fair share, black where nothing.

    Args:
        loads: of each router, shares (E,) that sum to 1; E may differ, shorter rows end in grey.
        title: of the figure.
    """
    names, pattern = short_names(list(loads))
    width = max(len(load) for load in loads.values())
    image = torch.full((len(loads), width), float("nan"))
    for i, load in enumerate(loads.values()):
        image[i, : len(load)] = _balanced(load)
    figure, axes = _figure(9, 2.2 + len(loads) * (0.34 if len(loads) <= 16 else 0.2))
    shown = axes.imshow(image.numpy(), aspect="auto", interpolation="nearest", **_balance(image))
    _ticks(axes, "y", names)
    axes.set_ylabel(pattern)
    axes.set_xlabel("expert")
    _ticks(axes, "x", [str(i) for i in range(width)])
    axes.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=axes, extend="both").set_label(_LABEL, fontsize=8)
    return figure


def over_time(histories: Mapping[str, History], title: str) -> Figure:
    """One panel a layer, at most :data:`PANELS` of them: experts × steps, coloured as in :func:`by_layer`.

    Args:
        histories: of each router.
        title: of the figure.
    """
    chosen = evenly(list(histories), PANELS)
    names, pattern = short_names(list(histories))
    short = dict(zip(histories, names, strict=True))
    columns = 1 if len(chosen) <= 2 else 2
    lines = -(-len(chosen) // columns)
    images = {name: _balanced(torch.stack(histories[name].loads, 1)) for name in chosen}
    look = _balance(torch.cat([image.flatten() for image in images.values()]))
    figure, grid = _figure(5.2 * columns + 1, 1.1 + 2.1 * lines, lines, columns)
    shown: Any = None
    for axes, name in zip(grid, chosen, strict=False):
        image = images[name]
        shown = axes.pcolormesh(_edges(histories[name].steps), _edges(range(len(image))) + 0.5, image.numpy(), **look)
        axes.set_facecolor("0.6")
        axes.invert_yaxis()
        axes.set_title(f"* = {short[name]}" if "*" in pattern else name, fontsize=8, pad=3)
        _ticks(axes, "y", [str(i) for i in range(len(image))], 8)
        axes.tick_params(labelsize=7)
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(chosen) - columns) : len(chosen)]:
        axes.set_xlabel("step", fontsize=8)
    for axes in grid[::columns]:
        axes.set_ylabel("expert", fontsize=8)
    some = f", {len(chosen)} of {len(histories)} layers" if len(chosen) < len(histories) else ""
    figure.suptitle(f"{title}{some}" + (f"; {pattern}" if "*" in pattern else ""), fontsize=10)
    figure.colorbar(shown, ax=list(grid), extend="both").set_label(_LABEL, fontsize=8)
    return figure


def by_task(tables: Mapping[str, Tensor], title: str) -> Figure:
    """Tasks × experts, one panel a set of tasks, at most four: the mean weight q, white where it is exactly zero.

    Args:
        tables: name -> (tasks, E).
        title: of the figure.
    """
    chosen = evenly(list(tables), 4)
    tallest = max(len(tables[name]) for name in chosen)
    widest = max(tables[name].shape[1] for name in chosen)
    height = 1.5 + min(9.0, max(1.5, tallest * (0.3 if tallest <= 24 else 0.07)))
    figure, grid = _figure((2.2 + min(8.0, max(3.0, widest * 0.26))) * len(chosen), height, 1, len(chosen))
    shown: Any = None
    for axes, name in zip(grid, chosen, strict=True):
        q = tables[name].masked_fill(tables[name] == 0, float("nan"))
        shown = axes.imshow(q.numpy(), aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=0, vmax=1)
        axes.set_facecolor("white")
        _ticks(axes, "y", [str(i) for i in range(len(q))])
        _ticks(axes, "x", [str(i) for i in range(q.shape[1])])
        axes.set_xlabel("expert")
        axes.set_title(name, fontsize=8)
    grid[0].set_ylabel("task")
    some = f" ({len(chosen)} of {len(tables)})" if len(chosen) < len(tables) else ""
    figure.suptitle(f"{title}{some}", fontsize=10)
    figure.colorbar(shown, ax=list(grid), label="weight q of the expert (white: exactly 0)")
    return figure


def evenly(names: Sequence[str], most: int) -> list[str]:
    """At most that many of the names, first and last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """What differs between names of layers, and the pattern that they have in common: `["0", "1"], "net.layers.*.gate"`."""
    parts = [name.split(".") for name in names]
    if len(parts) == 1:
        return list(names), "router"
    front = _common(parts)
    back = _common([p[front:][::-1] for p in parts])
    short = [".".join(p[front : len(p) - back]) for p in parts]
    if not all(short):  # one is the end of another
        return list(names), "router"
    return short, ".".join([*parts[0][:front], "*", *(parts[0][len(parts[0]) - back :] if back else [])])


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many first parts are the same in all."""
    return next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), min(map(len, parts)))


def _balanced(loads: Tensor) -> Tensor:
    """Shares (E,) or (E, n) times E, and −1 where a share is exactly zero."""
    return torch.where(loads == 0, -1, loads * len(loads))


def _balance(values: Tensor) -> dict[str, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    finite = values[values.isfinite()]
    most = float(finite.max()) if len(finite) else 1.0
    # without its dark ends, from which black could not be told
    colours = LinearSegmentedColormap.from_list("load", colormaps["RdBu_r"](torch.linspace(0.12, 0.88, 64).numpy()))
    # up to four times the fair share: beyond that a colour would only make all others pale
    return {"cmap": colours.with_extremes(under="black"), "norm": TwoSlopeNorm(1.0, 0.0, min(max(most, 1.5), 4.0))}


def _figure(width: float, height: float, lines: int = 0, columns: int = 0) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if not lines:
        axes = figure.add_subplot()
        axes.set_facecolor("0.6")
        return figure, axes
    return figure, figure.subplots(lines, columns, squeeze=False).flatten()


def _ticks(axes: Axes, which: str, names: Sequence[str], most: int = 32) -> None:
    """Names along an axis, every n-th of them where there are many."""
    every = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, len(names)) if len(names) <= most * n)
    places = range(0, len(names), every)
    (axes.set_xticks if which == "x" else axes.set_yticks)(list(places), [names[i] for i in places], fontsize=7)


def _edges(steps: Sequence[int]) -> Any:
    """A look tells of the steps since the one before: (n,) -> (n + 1,), for matplotlib."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return torch.tensor([max(first, -1), *steps], dtype=torch.float64).numpy()

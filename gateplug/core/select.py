"""One way to name layers, the same for every plug: by name, by pattern, by class, by a function, or "auto"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import nn

from gateplug.core.errors import PlugError, listed, nearest

Layers: TypeAlias = str | Sequence[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
"""What the `layers` argument of a plug accepts, see :func:`select`."""


def select(
    module: nn.Module, layers: Layers, candidates: Mapping[str, nn.Module], argument: str = "layers"
) -> dict[str, nn.Module]:
    """Find the layers that `layers` names in `module`, in the order of `named_modules`.

    Args:
        module: where to look.
        layers: `"auto"` for all `candidates`; a layer's name, whole or its last parts (`"output.dense"`), where `*` stands for
            any characters inside one part and `**` for any number of parts (`"encoder.layer.*.output"`); `"class:Linear"` for
            all layers of a class (by its name, subclasses included); a list of such texts; a class; or a function
            `(name, layer) -> bool`.
        candidates: what "auto" means to the calling plug, by name; also what the error lists.
        argument: what the plug calls `layers`, for the error.

    Raises:
        PlugError: nothing was found, or one of several patterns found nothing; says which and what there is.
        TypeError: `layers` is of no such kind.
    """
    if isinstance(layers, str) and layers == "auto":
        return dict(candidates)
    named: dict[str, nn.Module] = {name: layer for name, layer in module.named_modules() if name}
    if isinstance(layers, str):
        found = _by_text(layers, named, candidates, argument)
    elif isinstance(layers, type):
        found = {name: layer for name, layer in named.items() if isinstance(layer, layers)}
    elif callable(layers):
        found = {name: layer for name, layer in named.items() if layers(name, layer)}
    elif isinstance(layers, Sequence) and all(isinstance(text, str) for text in layers):
        chosen = {name for text in layers for name in _by_text(text, named, candidates, argument)}
        found = {name: layer for name, layer in named.items() if name in chosen}
    else:
        raise TypeError(
            f"{argument}={layers!r} is not a way to name layers: give 'auto', a name or pattern such as 'encoder.layer.*', "
            "'class:Linear', a list of these, a class, or a function (name, layer) -> bool"
        )
    if not found:
        raise PlugError(f"{argument}={layers!r} finds no layer. Candidates: {listed(candidates or named)}")
    return found


def _by_text(
    text: str, named: Mapping[str, nn.Module], candidates: Mapping[str, nn.Module], argument: str
) -> dict[str, nn.Module]:
    if text in named:
        return {text: named[text]}
    if text.startswith("class:"):
        found = {n: m for n, m in named.items() if text[6:] in {c.__name__ for c in type(m).__mro__}}
        known = {type(m).__name__ for m in named.values()}
    else:
        pattern = re.compile(rf"(?:.*\.)?{_expression(text)}")
        found = {n: m for n, m in named.items() if pattern.fullmatch(n)}
        known = set(named)
    if not found:
        raise PlugError(
            f"{argument}={text!r} finds no layer.{nearest(text.removeprefix('class:'), known)} "
            f"Candidates: {listed(candidates or named)}"
        )
    return found


def _expression(text: str) -> str:
    # `*` stays inside one part of the name: in BERT, "encoder.layer.*.output" must not find "encoder.layer.0.attention.output"
    parts = re.split(r"(\*\*|\*|\?)", text)
    signs = {"**": r".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(signs.get(part, re.escape(part)) for part in parts)

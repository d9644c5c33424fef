"""From what a network for several tasks returns to the part of each task."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gateplug.tasks.batch import logits_of

ALLOWED = (
    "a tensor (batch, tasks, features), one (batch, features) that all tasks share, a list with a tensor for each task in"
    " their order, or a dict with a tensor under each task's name"
)


def split_output(output: Any, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Give each task its part of what the network returned.

    Args:
        output: In one of the forms of ``ALLOWED``, or what holds such a tensor as its ``logits``.
        counts: Name of each head, and the number of its tasks.

    Returns:
        Head to ``(batch, features)``, or ``(batch, count, features)`` for a head of several tasks; whatever a head of one task
        was given by name or position is passed on as it is.

    Raises:
        TypeError: If there is no tensor in it.
        ValueError: If the number of tasks, a name or a shape does not fit.
    """
    if isinstance(output, Mapping) and not _is_logits(output, counts):
        return _named(output, counts)
    if isinstance(output, (list, tuple)) and not hasattr(output, "logits"):
        if len(output) != len(counts):
            raise ValueError(f"The network returned {len(output)} parts for {len(counts)} tasks ({_listed(counts)}).")
        return _named(dict(zip(counts, output, strict=True)), counts)
    whole = logits_of(output)
    if whole.dim() == 2:
        return {name: _shared(whole, count) for name, count in counts.items()}
    total = sum(counts.values())
    if whole.dim() != 3 or whole.shape[1] != total:
        raise ValueError(
            f"The network returned a tensor of shape {tuple(whole.shape)} for {total} tasks ({_listed(counts)}); allowed:"
            f" {ALLOWED}. A tensor (batch, {total}) of one number a task becomes one with `x.unsqueeze(-1)`."
        )
    parts, start = {}, 0
    for name, count in counts.items():
        parts[name] = whole[:, start] if count == 1 else whole[:, start : start + count]
        start += count
    return parts


def _is_logits(output: Mapping[Any, Any], counts: Mapping[str, int]) -> bool:
    return "logits" in output and not set(counts) <= set(output)


def _named(output: Mapping[Any, Any], counts: Mapping[str, int]) -> dict[str, Tensor]:
    missing = [name for name in counts if name not in output]
    if missing:
        raise ValueError(f"The network returned a dict with {sorted(map(str, output))}, without the tasks {missing}; {ALLOWED}.")
    parts: dict[str, Tensor] = {}
    for name, count in counts.items():
        part = output[name]
        if not isinstance(part, Tensor) or part.dim() == 0:
            what = "a tensor without dimensions" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            raise TypeError(f"The network returned {what} for the task {name!r}; allowed: {ALLOWED}.")
        if count > 1 and part.dim() != 2 and part.shape[1] != count:
            raise ValueError(
                f"The network returned a tensor of shape {tuple(part.shape)} for {name!r}; its {count} tasks need"
                f" (batch, {count}, features), or (batch, features) that they share."
            )
        parts[name] = _shared(part, count)
    return parts


def _shared(part: Tensor, count: int) -> Tensor:
    return part if count == 1 or part.dim() != 2 else part[:, None].expand(-1, count, -1)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(name if count == 1 else f"{name}: {count}" for name, count in counts.items())

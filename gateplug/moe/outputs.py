"""Tensors in a router's output, whatever its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def carried(out: Any) -> tuple[Tensor, ...]:
    """The tensors in a router's output that go on with a gradient, in order."""
    return tuple(t for t in _leaves(out) if t.is_floating_point() and t.requires_grad)


def replaced(out: Any, carriers: tuple[Tensor, ...]) -> Any:
    """The output with these in the places of :func:`carried`."""
    new = iter(carriers)

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(new) if value.is_floating_point() and value.requires_grad else value
        if isinstance(value, Mapping):
            return type(value)((k, put(v)) for k, v in value.items())  # type: ignore[call-arg]
        if isinstance(value, tuple | list):
            parts = [put(v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    return put(out)


def _leaves(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple | list) else ()
    return [t for part in parts for t in _leaves(part)]

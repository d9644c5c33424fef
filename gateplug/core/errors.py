"""The one error type of the house, and how its messages name neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


class PlugError(RuntimeError):
    """A plug cannot do what was asked of it; the message says what was given, what is allowed and what to do."""


def listed(names: Iterable[object], limit: int = 20) -> str:
    """Join names for a message, `a, b, c`, cut after `limit` with the count of the rest; `none` when empty."""
    texts = [str(name) for name in names]
    if not texts:
        return "none"
    rest = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + rest


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Say which allowed names look like `given`: ` Did you mean 'x'?`, or nothing when none does."""
    close = get_close_matches(given, list(allowed), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def whole_numbers(**given: Any) -> None:
    """Raise TypeError for an argument that is no whole number."""
    for name, value in given.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}, and must be a whole number")


def real_numbers(**given: Any) -> None:
    """Raise TypeError for an argument that is no number."""
    for name, value in given.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}, and must be a number")

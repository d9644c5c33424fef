"""Put something around a hook of one LightningModule instance, and take it off again.

Several owners may wrap one hook; the first to come is the innermost. When the last one leaves, the instance attribute is
gone. The wrapper is an object and no closure, so that a module that is being trained can be deep-copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Around = Callable[..., Any]
"""`around(inner, *args, **kwargs)`: calls `inner(*args, **kwargs)` or not, and returns what the hook returns."""


class Wrapped:
    """The instance attribute that stands before a hook while somebody wraps it."""

    def __init__(self, instance: nn.Module, name: str) -> None:
        self.instance, self.name = instance, name
        self.own = instance.__dict__.get(name)
        """What the user had set on the instance itself, if anything."""
        self.layers: list[tuple[object, Around]] = []

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # Lightning looks through this name for the parameters of the hook (batch_idx) and whether it is overridden
        inner: Callable[..., Any] = self.own or getattr(type(self.instance), self.name).__get__(self.instance)
        return inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the hook through everything that is around it."""
        return self._call(len(self.layers), args, kwargs)

    def _call(self, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if depth == 0:
            return self.__wrapped__(*args, **kwargs)
        return self.layers[depth - 1][1](lambda *a, **k: self._call(depth - 1, a, k), *args, **kwargs)


def wrap(instance: nn.Module, name: str, owner: object, around: Around, innermost: bool = False) -> None:
    """Put `around` about the hook `name` of `instance`; a second call by the same owner changes nothing.

    It goes around what is there already, or, `innermost`, next to the hook itself.
    """
    wrapped = instance.__dict__.get(name)
    if not isinstance(wrapped, Wrapped):
        wrapped = instance.__dict__[name] = Wrapped(instance, name)
    if all(other is not owner for other, _ in wrapped.layers):
        wrapped.layers.insert(0 if innermost else len(wrapped.layers), (owner, around))


def unwrap(instance: nn.Module, owner: object) -> None:
    """Take everything off that `owner` has put about hooks of `instance`."""
    for name, wrapped in list(instance.__dict__.items()):
        if not isinstance(wrapped, Wrapped):
            continue
        wrapped.layers = [(other, around) for other, around in wrapped.layers if other is not owner]
        if not wrapped.layers:
            del instance.__dict__[name]
            if wrapped.own is not None:
                instance.__dict__[name] = wrapped.own

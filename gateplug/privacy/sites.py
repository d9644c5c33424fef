"""Find the activations of a model: modules, functions held in attributes, and calls that nobody can reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gateplug.core.activations import ACTIVATIONS, ATTRIBUTES, activation_name, is_activation

_POOLERS = ("pooler", "pooling")
"""Modules that squash a summary of a text; their tanh is no hidden activation."""

_FUNCTIONAL = {
    "relu": {"relu", "relu_"},
    "gelu": {"gelu"},
    "gelu_tanh": {"gelu"},
    "silu": {"silu", "silu_"},
    "sigmoid": {"sigmoid", "sigmoid_"},
    "tanh": {"tanh", "tanh_"},
}
"""Names under which torch has an activation as a function or tensor method."""


@dataclass(frozen=True)
class Old:
    """Which activation is looked for: the class, and the function it computes if that has a name."""

    cls: type[nn.Module] | None
    function: str | None

    @staticmethod
    def of(old: type[nn.Module] | str) -> Old:
        """From a class or a function's name.

        Raises:
            ValueError: an unknown name.
            TypeError: something else.
        """
        if isinstance(old, str):
            if old not in ACTIVATIONS:
                raise ValueError(f"old={old!r} is not known; allowed are {', '.join(ACTIVATIONS)}, or a class such as nn.ReLU")
            return Old(None, old)
        if not (isinstance(old, type) and issubclass(old, nn.Module)):
            raise TypeError(f"old={old!r} must be an activation class such as nn.ReLU, or a name among {', '.join(ACTIVATIONS)}")
        try:
            return Old(old, activation_name(old()))
        except TypeError:  # a class with required arguments is found by class alone
            return Old(old, None)

    def matches(self, thing: Any) -> bool:
        """Whether a module or function is the activation."""
        if self.cls is not None and isinstance(thing, self.cls):
            # nn.GELU(approximate="tanh") is of the class and another function: take what was asked for by class
            return True
        return self.function is not None and activation_name(thing) == self.function

    def __str__(self) -> str:
        return self.cls.__name__ if self.cls is not None else str(self.function)


@dataclass(frozen=True)
class Site:
    """Where an activation sits: `holder.attribute`."""

    holder: str
    attribute: str
    module: bool
    """A sub-module; otherwise a function held in an instance attribute."""

    @property
    def name(self) -> str:
        """Full name."""
        return f"{self.holder}.{self.attribute}" if self.holder else self.attribute


def find(root: nn.Module, old: Old) -> list[Site]:
    """All sites of an activation in `root`; an instance that several layers share has one site in each."""
    return [site for site, thing in _all(root) if old.matches(thing)]


def present(root: nn.Module) -> list[str]:
    """All activations of `root`, as `name (class or function)`, for messages."""
    return [f"{site.name} ({getattr(thing, '__name__', type(thing).__name__)})" for site, thing in _all(root)]


def _all(root: nn.Module) -> Iterator[tuple[Site, Any]]:
    inside: set[int] = set()
    for holder, module in root.named_modules():
        if id(module) in inside:
            continue
        for name, child in module._modules.items():
            if child is not None and is_activation(child):
                # what an activation is made of (GELUActivation.act) is no site of its own
                inside.update(id(m) for m in child.modules())
                yield Site(holder, name, True), child
        for name in ATTRIBUTES:
            thing = module.__dict__.get(name)
            if callable(thing) and not isinstance(thing, type):
                yield Site(holder, name, False), thing


def is_pooler(site: Site) -> bool:
    """Whether the site belongs to a pooler."""
    return any(part in _POOLERS for part in site.holder.split("."))


class _Calls(TorchFunctionMode):
    def __init__(self, names: set[str], stack: list[str]) -> None:
        super().__init__()
        self.names, self.stack = names, stack
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names and self.stack:
            self.seen.append(self.stack[-1])
        return func(*args, **(kwargs or {}))


def _leave(stack: list[str]) -> None:
    stack.pop()


@contextmanager
def calls_of(root: nn.Module, old: Old) -> Iterator[list[str]]:
    """While this lasts, note the modules of `root` in whose own forward the functional form of `old` is called.

    Calls by an activation module itself are not noted: such a module is a site.
    """
    names = _FUNCTIONAL.get(old.function or "", set())
    stack: list[str] = []
    handles: list[RemovableHandle] = []
    for name, module in root.named_modules():
        shown = "" if is_activation(module) else f"{name or 'the module itself'} ({type(module).__name__})"
        handles.append(module.register_forward_pre_hook(lambda m, a, n=shown: stack.append(n)))
        handles.append(module.register_forward_hook(lambda m, a, o: _leave(stack), always_call=True))
    mode = _Calls(names, stack)
    seen: list[str] = []
    try:
        with mode:
            yield seen
    finally:
        seen.extend(dict.fromkeys(n for n in mode.seen if n))
        for handle in handles:
            handle.remove()

"""Find the activations of a model: modules, functions held in attributes, and calls that nobody can reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gateplug.core.activations import ACTIVATIONS, ATTRIBUTES, activation_name, is_activation
from gateplug.core.gate import Gate

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
            if old not in ACTIVATIONS or old == "linear":
                known = ", ".join(name for name in ACTIVATIONS if name != "linear")
                raise ValueError(f"old={old!r} is not known; allowed are {known}, or a class such as nn.ReLU")
            return Old(None, old)
        if not (isinstance(old, type) and issubclass(old, nn.Module)):
            raise TypeError(f"old={old!r} must be an activation class such as nn.ReLU, or a name among {', '.join(ACTIVATIONS)}")
        if old is nn.Module or (old.__module__.startswith("torch.nn.") and old.__module__ != "torch.nn.modules.activation"):
            raise TypeError(
                f"old={old.__name__} is no activation: give one such as nn.ReLU, or a name among {', '.join(ACTIVATIONS)}"
            )
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
    def __init__(self, names: set[str], stack: list[str | None]) -> None:
        super().__init__()
        self.names, self.stack = names, stack
        self.seen: list[str | None] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names and self.stack:
            self.seen.append(self.stack[-1])
        return func(*args, **(kwargs or {}))


class _Enter:
    """Forward pre-hook that puts a name on the stack."""

    def __init__(self, stack: list[str | None], name: str | None) -> None:
        self.stack, self.name = stack, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.name)


class _Leave:
    """Forward hook that takes it off."""

    def __init__(self, stack: list[str | None]) -> None:
        self.stack = stack

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()


@contextmanager
def calls_of(root: nn.Module, old: Old, own: Iterable[nn.Module] = ()) -> Iterator[list[str]]:
    """While this lasts, note the names of the modules of `root` in whose own forward the functional form of `old` is called.

    Calls by an activation module itself are not noted, such a module is a site; nor are those by gates and the modules in `own`.
    """
    inside = {id(m) for module in own for m in module.modules()}
    names = _FUNCTIONAL.get(old.function or "", set())
    stack: list[str | None] = []
    handles: list[RemovableHandle] = []
    for name, module in root.named_modules():
        # what a gate computes of its own parameters is no activation of the network
        noted = None if is_activation(module) or isinstance(module, Gate) or id(module) in inside else name
        handles.append(module.register_forward_pre_hook(_Enter(stack, noted)))
        handles.append(module.register_forward_hook(_Leave(stack), always_call=True))
    mode = _Calls(names, stack)
    seen: list[str] = []
    try:
        with mode:
            yield seen
    finally:
        seen.extend(dict.fromkeys(n for n in mode.seen if n is not None))
        for handle in handles:
            handle.remove()

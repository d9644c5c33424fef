"""The changes that a plug makes to a model, as values: they can be planned, applied, undone, folded, copied and pickled.

An edit speaks of layers by name and holds no reference to a trainer, so a model that carries edits can be deep-copied and
saved. Where edits are kept, and in which order they are undone: :mod:`gateplug.core.record`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from gateplug.core.errors import PlugError
from gateplug.core.gate import Gate, RunBefore, RunGate

_HELD = "_gateplug_held"
"""Where a layer keeps what stood in an attribute before, and how many edits have set it."""


@dataclass
class Replace:
    """Put another module into the slot of a layer; the slot keeps its name."""

    layer: str
    new: nn.Module
    what: str = ""
    everywhere: bool = True
    """Also under the other names of a layer that stands in several places; False for this one slot."""
    original: nn.Module | None = None

    @property
    def slot(self) -> str:
        """What this edit occupies: the layer's name."""
        return self.layer

    def apply(self, root: nn.Module) -> None:
        """Make the change in `root`."""
        self.original = root.get_submodule(self.layer)
        self.new.train(self.original.training)
        self._put(root, self.new)

    def undo(self, root: nn.Module) -> None:
        """Take it back."""
        assert self.original is not None
        self.original.train(self.new.training)
        # the model may have moved since; a layer without parameters may hold a buffer that tells
        if (like := next(chain(self.new.parameters(), self.new.buffers()), None)) is not None:
            self.original.to(like.device, like.dtype if like.is_floating_point() else None)
        self._put(root, self.original)

    def _put(self, root: nn.Module, module: nn.Module) -> None:
        parent, _, name = self.layer.rpartition(".")
        root.get_submodule(parent)._modules[name] = module

    def fold(self, root: nn.Module) -> nn.Module:
        """It stays. What has a plainer form takes it at the end of a fold, with whatever stands on it by then."""
        return root

    def attached(self, root: nn.Module) -> nn.Module:
        """The module that came in."""
        return self.new


@dataclass
class AddGate:
    """Make a gate a sub-module of the layer it gates, `layer.gate`, and run it on the layer's output by a forward hook.

    A gate that stands before its layer (`Gate.before`) is run on what the layer is called with.

    Where the layer has something of that name, it is `layer.<room>_gate`.

    A plain `nn.Sequential` runs its children by itself: there the gate is simply the last of them, without a hook.
    """

    layer: str
    gate: Gate
    name: str = "gate"
    what: str = ""

    @property
    def slot(self) -> str:
        """What this edit occupies: the name of the gate."""
        return f"{self.layer}.{self.name}".lstrip(".")

    def apply(self, root: nn.Module) -> None:
        """Make the change in `root`; PlugError when the layer has such a child already or is never called."""
        layer = root.get_submodule(self.layer)
        if hasattr(layer, self.name) and self.gate.room:  # a gated feed-forward has a `gate` of its own
            self.name = f"{self.gate.room}_{self.name}"
        if hasattr(layer, self.name):
            raise PlugError(
                f"{type(layer).__name__} has something named {self.name!r} already: the gate cannot be its {self.name!r}"
            )
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear | nn.ModuleList | nn.ModuleDict):
            raise PlugError(f"a {type(layer).__name__} is never called itself and cannot be gated: name a layer around or in it")
        self.gate.train(layer.training)
        layer.add_module(self.name, self.gate)
        if self.gate.before:
            layer.register_forward_pre_hook(RunBefore(self.name))
        elif type(layer).forward is not nn.Sequential.forward:
            layer.register_forward_hook(RunGate(self.name))

    def undo(self, root: nn.Module) -> None:
        """Take gate and hook away."""
        layer = root.get_submodule(self.layer)
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, RunGate | RunBefore) and hook.name == self.name:
                    del hooks[key]
        del layer._modules[self.name]

    def fold(self, root: nn.Module) -> nn.Module:
        """The layer `root` with its gate worked in (:meth:`Gate.fold`)."""
        gate = self.attached(root)
        assert isinstance(gate, Gate)
        self.undo(root)
        return gate.fold(root)

    def attached(self, root: nn.Module) -> nn.Module:
        """The gate."""
        return root.get_submodule(self.slot)


@dataclass
class SetAttribute:
    """Set an attribute of a layer that is no sub-module: a function, a flag."""

    layer: str
    attribute: str
    value: Any
    what: str = ""
    shared: bool = False
    """Several plugs may need the same flag; it goes back to what it was when the last of them is detached."""
    passing: bool = False
    """A training alone needs it: a fold takes it back."""

    @property
    def slot(self) -> str:
        """What this edit occupies: the attribute's full name."""
        return f"{self.layer}.{self.attribute}".lstrip(".")

    def apply(self, root: nn.Module) -> None:
        """Make the change in `root`."""
        layer = root.get_submodule(self.layer)
        held = layer.__dict__.setdefault(_HELD, {})
        original, users = held.get(self.attribute, (getattr(layer, self.attribute), 0))
        held[self.attribute] = (original, users + 1)
        self._set(layer, self.value)

    def undo(self, root: nn.Module) -> None:
        """Take it back, unless another plug still needs it."""
        layer = root.get_submodule(self.layer)
        held = layer.__dict__[_HELD]
        original, users = held.pop(self.attribute)
        if users > 1:
            held[self.attribute] = (original, users - 1)
        else:
            self._set(layer, original)
        if not held:
            del layer.__dict__[_HELD]

    def _set(self, layer: nn.Module, value: Any) -> None:
        # a function in the way of a module must go first: torch refuses to register a module over it
        delattr(layer, self.attribute)
        setattr(layer, self.attribute, value)

    def fold(self, root: nn.Module) -> nn.Module:
        """The value stays, unless a training alone needs it; what stood there before is forgotten."""
        layer = root.get_submodule(self.layer)
        if self.passing:
            self.undo(root)
        elif (held := layer.__dict__.get(_HELD)) is not None:
            held.pop(self.attribute, None)
            if not held:
                del layer.__dict__[_HELD]
        return root

    def attached(self, root: nn.Module) -> nn.Module | None:
        """The module that came in, if it is one."""
        return self.value if isinstance(self.value, nn.Module) else None


@dataclass
class AddModule:
    """Give a layer a sub-module that is never run: a place for state that belongs to the layer."""

    layer: str
    module: nn.Module
    name: str
    what: str = ""

    @property
    def slot(self) -> str:
        """What this edit occupies: the name of the sub-module."""
        return f"{self.layer}.{self.name}".lstrip(".")

    def apply(self, root: nn.Module) -> None:
        """Make the change in `root`; PlugError when the layer has something of that name already."""
        layer = root.get_submodule(self.layer)
        if hasattr(layer, self.name):
            raise PlugError(f"{type(layer).__name__} has something named {self.name!r} already")
        self.module.train(layer.training)
        layer.add_module(self.name, self.module)

    def undo(self, root: nn.Module) -> None:
        """Take it away."""
        del root.get_submodule(self.layer)._modules[self.name]

    def fold(self, root: nn.Module) -> nn.Module:
        """State of a plug is not needed any more."""
        self.undo(root)
        return root

    def attached(self, root: nn.Module) -> nn.Module:
        """The module that came in."""
        return root.get_submodule(self.slot)


Edit = Replace | AddGate | SetAttribute | AddModule

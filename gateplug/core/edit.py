"""The changes that a plug makes to a model, as values: they can be planned, applied, undone, folded, copied and pickled.

An edit speaks of layers by name and holds no reference to a trainer, so a model that carries edits can be deep-copied and
saved. The record of a plug's edits lies on the module that was attached, outside of its parameters and state dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gateplug.core.errors import PlugError
from gateplug.core.gate import Gate, RunGate

_SLOT = "_gateplug_records"


def swap(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands below `root`; a layer that is shared under several names is replaced in all."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


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
        self._put(root, self.original, self.new)

    def undo(self, root: nn.Module) -> None:
        """Take it back."""
        assert self.original is not None
        self.original.train(self.new.training)
        self._put(root, self.new, self.original)

    def _put(self, root: nn.Module, old: nn.Module, new: nn.Module) -> None:
        if self.everywhere:
            swap(root, old, new)
        else:
            parent, _, name = self.layer.rpartition(".")
            root.get_submodule(parent)._modules[name] = new

    def fold(self, root: nn.Module) -> None:
        """Make it permanent, without anything that only a plug needs."""
        if isinstance(self.new, Gate):
            swap(root, self.new, self.new.folded())

    def attached(self, root: nn.Module) -> nn.Module:
        """The module that came in."""
        return self.new


@dataclass
class AddGate:
    """Make a gate a sub-module of the layer it gates, `layer.gate`, and run it on the layer's output by a forward hook.

    A plain `nn.Sequential` runs its children by itself: there the gate is simply the last of them, without a hook.
    """

    layer: str
    gate: Gate
    name: str = "gate"
    what: str = ""

    @property
    def slot(self) -> str:
        """What this edit occupies: the name of the gate."""
        return f"{self.layer}.{self.name}"

    def apply(self, root: nn.Module) -> None:
        """Make the change in `root`; PlugError when the layer has such a child already or is never called."""
        layer = root.get_submodule(self.layer)
        if hasattr(layer, self.name):
            raise PlugError(f"layer {self.layer!r} has something named {self.name!r} already")
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear | nn.ModuleList | nn.ModuleDict):
            raise PlugError(f"layer {self.layer!r} ({type(layer).__name__}) is never called itself: name a layer around or in it")
        self.gate.train(layer.training)
        layer.add_module(self.name, self.gate)
        if type(layer).forward is not nn.Sequential.forward:
            layer.register_forward_hook(RunGate(self.name))

    def undo(self, root: nn.Module) -> None:
        """Take gate and hook away."""
        layer = root.get_submodule(self.layer)
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, RunGate) and hook.name == self.name:
                del layer._forward_hooks[key]
        del layer._modules[self.name]

    def fold(self, root: nn.Module) -> None:
        """Put the layer with its gate worked in (:meth:`Gate.fold`) into the layer's slot."""
        layer, gate = root.get_submodule(self.layer), self.attached(root)
        assert isinstance(gate, Gate)
        self.undo(root)
        swap(root, layer, gate.fold(layer))

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
    original: Any = None

    @property
    def slot(self) -> str:
        """What this edit occupies: the attribute's full name."""
        return f"{self.layer}.{self.attribute}"

    def apply(self, root: nn.Module) -> None:
        """Make the change in `root`."""
        layer = root.get_submodule(self.layer)
        others = [e for r in records(root) for e in r.edits if isinstance(e, SetAttribute) and e.slot == self.slot]
        self.original = others[0].original if others else getattr(layer, self.attribute)
        # a function in the way of a module must go first: torch refuses to register a module over it
        delattr(layer, self.attribute)
        setattr(layer, self.attribute, self.value)

    def undo(self, root: nn.Module) -> None:
        """Take it back, unless another plug still needs it."""
        others = [e for r in records(root) for e in r.edits if isinstance(e, SetAttribute) and e.slot == self.slot]
        if any(e is not self for e in others):
            return
        layer = root.get_submodule(self.layer)
        delattr(layer, self.attribute)
        setattr(layer, self.attribute, self.original)

    def fold(self, root: nn.Module) -> None:
        """Nothing to do: the value stays."""

    def attached(self, root: nn.Module) -> nn.Module | None:
        """The module that came in, if it is one."""
        return self.value if isinstance(self.value, nn.Module) else None


Edit = Replace | AddGate | SetAttribute


@dataclass
class Record:
    """What one plug did to one module."""

    plug: str
    key: str
    arguments: dict[str, Any]
    edits: list[Edit] = field(default_factory=list)
    announced: bool = False

    @property
    def layers(self) -> dict[str, str]:
        """What was done, by the layer's name; flags that were only set along with it are left out."""
        return {e.slot if isinstance(e, SetAttribute) else e.layer: e.what for e in self.edits if e.what}

    def parameters(self, root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (as in `root.named_parameters()`) and parameters that came with the edits."""
        mine = {id(p) for e in self.edits if (m := e.attached(root)) is not None for p in m.parameters()}
        return ((name, p) for name, p in root.named_parameters() if id(p) in mine)


def records(root: nn.Module) -> list[Record]:
    """The records that lie on `root` itself; the list is live."""
    found: list[Record] = root.__dict__.setdefault(_SLOT, [])
    return found


def all_records(module: nn.Module) -> list[tuple[str, nn.Module, Record]]:
    """(prefix, the module that carries it, record) of every plug attached to `module` or to a module inside it."""
    return [(prefix, m, r) for prefix, m in module.named_modules() for r in m.__dict__.get(_SLOT, ())]


def apply(root: nn.Module, record: Record) -> None:
    """Make all edits of a record, or none: what was done before an error is undone.

    Raises:
        PlugError: a slot is taken by a plug that is attached already, or lies in a layer that would be replaced.
    """
    taken = {(p + "." if p else "") + e.slot: r.plug for p, _, r in all_records(root) for e in r.edits if not _shared(e)}
    for edit in record.edits:
        if not _shared(edit) and edit.slot in taken:
            raise PlugError(
                f"{record.plug} and {taken[edit.slot]} both change {edit.slot!r}: "
                "give them different layers with `layers=`, or leave one out"
            )
        inside = next((slot for slot in taken if isinstance(edit, Replace) and slot.startswith(f"{edit.layer}.")), None)
        if inside is not None:
            raise PlugError(
                f"{record.plug} would replace {edit.layer!r} and lose what {taken[inside]} has attached to it: put "
                f"{record.plug} before {taken[inside]} in the list of callbacks"
            )
    done: list[Edit] = []
    try:
        for edit in record.edits:
            edit.apply(root)
            done.append(edit)
    except BaseException:
        for edit in reversed(done):
            edit.undo(root)
        raise
    records(root).append(record)


def undo(root: nn.Module, record: Record) -> None:
    """Take all edits of a record back.

    Raises:
        PlugError: a later plug changed something inside what this one brought in; it has to be detached first.
    """
    mine = {edit.layer for edit in record.edits if isinstance(edit, Replace)}
    later = records(root)[records(root).index(record) + 1 :]
    for other in later:
        inside = [e.layer for e in other.edits for layer in mine if f"{e.layer}.".startswith(f"{layer}.")]
        if inside:
            raise PlugError(f"detach {other.plug} first: it changed {inside[0]!r}, which {record.plug} had put in")
    for edit in reversed(record.edits):
        edit.undo(root)
    records(root).remove(record)
    if not records(root):
        del root.__dict__[_SLOT]


def _shared(edit: Edit) -> bool:
    return isinstance(edit, SetAttribute) and edit.shared

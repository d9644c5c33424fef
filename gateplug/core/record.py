"""What plugs did to a model, kept on the very modules that they changed: made whole or not at all, and undone in order.

A record is read off the model each time. So it moves with a part that is put into another module, is copied and pickled
with it, and a part can be folded by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from gateplug.core.compiled import forget_compiled
from gateplug.core.edit import AddGate, AddModule, Edit, Replace, SetAttribute
from gateplug.core.errors import PlugError

_SLOT = "_gateplug_pieces"


@dataclass
class Piece:
    """One edit of a plug, as it lies on the module that it changed; the edit's names are relative to that module."""

    plug: str
    key: str
    arguments: dict[str, Any]
    owner: int
    """Which plug object made it; two lambdas can be told apart by nothing else."""
    order: int
    edit: Edit


@dataclass
class Record:
    """All pieces of one plug in a model."""

    plug: str
    key: str
    arguments: dict[str, Any]
    owner: int
    pieces: list[tuple[str, nn.Module, Piece]] = field(default_factory=list)
    """(name of the changed module, that module, piece), in the order in which they were made."""

    @property
    def layers(self) -> dict[str, str]:
        """What was done, by the layer's name; flags that were only set along with it are left out."""
        edits = [(name, piece.edit) for name, _, piece in self.pieces if piece.edit.what]
        found: dict[str, list[str]] = {}
        for name, e in edits:
            found.setdefault(join(name, "" if isinstance(e, AddGate | AddModule) else e.slot), []).append(e.what)
        return {name: "; ".join(what) for name, what in found.items()}

    def attached(self) -> list[tuple[str, nn.Module]]:
        """Modules that came in, by their names in the model."""
        found = [(join(name, p.edit.slot), p.edit.attached(module)) for name, module, p in self.pieces]
        return [(name, module) for name, module in found if module is not None]

    def parameters(self, root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (as in `root.named_parameters()`) and parameters that came with the edits.

        What a later plug has attached inside is that plug's.
        """
        mine = {id(p) for _, module in self.attached() for p in module.parameters()}
        records = all_records(root)
        place = next((i for i, record in enumerate(records) if record.key == self.key), len(records))
        mine -= {id(p) for later in records[place + 1 :] for _, module in later.attached() for p in module.parameters()}
        return ((name, p) for name, p in root.named_parameters() if id(p) in mine)


def join(*parts: str) -> str:
    """A dotted name of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def all_records(model: nn.Module) -> list[Record]:
    """Every plug attached to `model` or to a part of it, in the order in which they came."""
    found: dict[str, Record] = {}
    for name, module, piece in sorted(_pieces(model), key=lambda entry: entry[2].order):
        record = found.setdefault(piece.key, Record(piece.plug, piece.key, piece.arguments, piece.owner))
        record.pieces.append((name, module, piece))
    return list(found.values())


def _pieces(model: nn.Module) -> list[tuple[str, nn.Module, Piece]]:
    return [(name, m, piece) for name, m in model.named_modules() for piece in m.__dict__.get(_SLOT, ())]


def apply(model: nn.Module, plug: str, key: str, arguments: dict[str, Any], owner: int, edits: list[Edit]) -> None:
    """Make all edits of a plug, or none: what was done before an error is undone.

    Args:
        model: where; the edits name layers of it.
        plug: the plug's class, for messages and checkpoints.
        key: tells plugs of one class apart.
        arguments: of the plug, as plain Python.
        owner: identity of the plug object.
        edits: what to do, in order.

    Raises:
        PlugError: a slot is taken by a plug that is attached already, or lies in a layer that would be replaced.
    """
    order = 1 + max((piece.order for _, _, piece in _pieces(model)), default=0)
    done: list[tuple[nn.Module, Piece]] = []
    try:
        for edit in edits:
            for module, local in _localise(model, edit):
                _check_free(module, local, edit, plug, key)
                local.apply(module)
                piece = Piece(plug, key, arguments, owner, order + len(done), local)
                module.__dict__.setdefault(_SLOT, []).append(piece)
                done.append((module, piece))
    except BaseException:
        for module, piece in reversed(done):
            _undo(module, piece)
        raise
    forget_compiled()


def undo(model: nn.Module, record: Record) -> None:
    """Take everything of a record back.

    Raises:
        PlugError: a later plug changed something inside what this one brought in; it has to be detached first.
    """
    inside = {id(m) for _, module in record.attached() for m in module.modules()}
    for name, module, piece in _pieces(model):
        if piece.key != record.key and id(module) in inside:
            raise PlugError(f"detach {piece.plug} first: it changed {name!r}, which {record.plug} had put in")
    for _, module, piece in reversed(record.pieces):
        _undo(module, piece)
    forget_compiled()


def forget(model: nn.Module) -> None:
    """Drop all records of a model; what they did stays done."""
    for module in model.modules():
        module.__dict__.pop(_SLOT, None)


def _undo(module: nn.Module, piece: Piece) -> None:
    piece.edit.undo(module)
    left = [other for other in module.__dict__[_SLOT] if other is not piece]
    if left:
        module.__dict__[_SLOT] = left
    else:
        del module.__dict__[_SLOT]


def _localise(model: nn.Module, edit: Edit) -> list[tuple[nn.Module, Edit]]:
    """The modules that an edit changes, and the edit in terms of each."""
    if not isinstance(edit, Replace):
        return [(model.get_submodule(edit.layer), replace(edit, layer=""))]
    old = model.get_submodule(edit.layer)
    if not edit.everywhere:
        parent, _, name = edit.layer.rpartition(".")
        return [(model.get_submodule(parent), replace(edit, layer=name))]
    slots = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    return [(parent, replace(edit, layer=name)) for parent, name in slots]


def _two_gates(one: Edit, other: Edit) -> bool:
    """Gates of two methods, which may stand on one layer."""
    return isinstance(one, AddGate) and isinstance(other, AddGate) and one.gate.room != other.gate.room


def _check_free(module: nn.Module, local: Edit, edit: Edit, plug: str, key: str) -> None:
    if isinstance(local, SetAttribute) and local.shared:
        return
    for other in module.__dict__.get(_SLOT, ()):
        if _two_gates(local, other.edit):  # the second takes the name of its room
            continue
        if other.key != key and other.edit.slot == local.slot:
            raise PlugError(
                f"{plug} and {other.plug} both change {edit.slot!r}: give them different layers with `layers=`, or leave one out"
            )
    replaced = module._modules[local.layer] if isinstance(local, Replace) else None
    lost = [] if replaced is None else [piece.plug for _, _, piece in _pieces(replaced) if piece.key != key]
    if lost:
        raise PlugError(
            f"{plug} would replace {edit.layer!r} and lose what {lost[0]} has attached to it: put "
            f"{plug} before {lost[0]} in the list of callbacks"
        )

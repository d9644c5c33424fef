"""What a plug did to a module, kept on the module itself: made whole or not at all, and undone in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gateplug.core.edit import Edit, Replace, SetAttribute
from gateplug.core.errors import PlugError

_SLOT = "_gateplug_records"


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


def forget(root: nn.Module) -> None:
    """Drop the records of `root`; what they did stays done."""
    root.__dict__.pop(_SLOT, None)


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

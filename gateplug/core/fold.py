"""The way out: from a trained, plugged module to the plain network."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from lightning import LightningModule
from torch import nn
from torchmetrics import Metric

from gateplug.core.edit import AddGate
from gateplug.core.errors import PlugError, listed
from gateplug.core.gate import Foldable, Folded, Gate
from gateplug.core.hook import drop_training_hooks
from gateplug.core.objective import Objective
from gateplug.core.record import all_records, forget
from gateplug.core.strip import strip
from gateplug.core.wrap import Wrapped

_LIGHTNING = frozenset(LightningModule().__dict__) - frozenset(nn.Module().__dict__)
"""Attributes that Lightning gives an instance."""


def fold(module: nn.Module) -> nn.Module:
    """Make the plain `nn.Module` that was trained: no hooks, no Lightning, no plugs, the same output in eval mode.

    Args:
        module: a network or a LightningModule, with or without plugs; it is copied and stays as it is. Of a LightningModule
            whose parameters and buffers all lie in one sub-module (`self.net`, metrics apart) that sub-module comes back, without
            what the module's own `forward` may do around it; of any other, a plain module with the same children and `forward`.

    Returns:
        A copy, in eval mode, on the same device, that `torch.export` takes if it takes the network without plugs. A network with
        exits becomes a :class:`gateplug.ExitRunner`, whose `export` writes a program for each stage.

    Raises:
        PlugError: a LightningModule without a forward of its own holds parameters in several sub-modules.
    """
    folded = copy.deepcopy(_without_run(module))
    drop_training_hooks(folded)
    records = all_records(folded)
    gates: dict[type[Gate], list[Folded]] = {}
    # from the last to the first: of several gates on a layer, the one that came first stays next to it
    for record in reversed(records):
        for name, part, piece in reversed(record.pieces):
            gate = piece.edit.attached(part) if isinstance(piece.edit, AddGate) else None
            if isinstance(gate, Gate):
                gates.setdefault(type(gate), []).insert(0, Folded(name, gate, record.arguments))
            new = piece.edit.fold(part)
            folded = new if part is folded else _swap(folded, part, new)
    forget(folded)
    plain = _settled(_plain(folded), {}).eval()
    for model in plain.modules() if records else ():
        if callable(getattr(model, "save_pretrained", None)):
            model.__dict__["save_pretrained"] = SavePretrained(model)
    for kind, parts in gates.items():
        plain = kind.finish(plain, module, parts)
    return plain


def _settled(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Every layer in its plainer form, from the outside in; a layer that stands in several places stays one."""
    if module not in done:
        done[module] = new = module.folded() if isinstance(module, Foldable) else module
        done[new] = new
        for name, child in list(new._modules.items()):
            if child is not None:
                new._modules[name] = _settled(child, done)
    return done[module]


class SavePretrained:
    """Stands before `save_pretrained` of a folded Hugging Face model, and warns."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save, with the warning."""
        name = type(self.model).__name__
        warnings.warn(
            f"the config of {name} does not know the layers that plugs have put in: from_pretrained will not build them again. "
            "Keep the state dict, or export the network (torch.export, `gateplug fold`)",
            stacklevel=2,
        )
        return type(self.model).save_pretrained(self.model, *args, **kwargs)  # type: ignore[attr-defined]


def _swap(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands below `root`, and return `root`."""
    for parent in [] if new is old else list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                parent._modules[name] = new
    return root


def _without_run(module: nn.Module) -> nn.Module:
    """A shallow stand-in without what a running Trainer has put on the module, so that none of it is copied."""
    shell = copy.copy(module)
    shell.__dict__ = {k: v for k, v in module.__dict__.items() if not isinstance(v, Wrapped | Objective)}
    if isinstance(shell, LightningModule):
        shell.__dict__.update(_trainer=None, _fabric=None)
    return shell


def _plain(module: nn.Module) -> nn.Module:
    """A module without Lightning, also inside."""
    for name, child in list(module.named_children()):
        plain = _plain(child)
        if plain is not child:
            module._modules[name] = plain
    if not isinstance(module, LightningModule):
        return module
    holders = [child for child in module.children() if any(True for _ in child.parameters())]
    own_forward = type(module).forward is not LightningModule.forward
    # what lies beside the network (a buffer with the mean of the data …) belongs to the forward; metrics do not
    others = [c for c in module.children() if c not in holders and not isinstance(c, Metric) and any(True for _ in c.buffers())]
    beside = bool(module._parameters or module._buffers or others)
    if len(holders) == 1 and not (beside and own_forward):
        return holders[0]
    if not own_forward:
        names = [name for name, child in module.named_children() if child in holders]
        raise PlugError(
            f"{type(module).__name__} has no forward and holds parameters in several parts ({listed(names)}): "
            "fold the part that you need, e.g. gp.fold(module.net), or give the module a forward"
        )
    return strip(type(module), {k: v for k, v in module.__dict__.items() if k not in _LIGHTNING or k == "_hparams"})

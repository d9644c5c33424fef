"""A LightningModule's class with Lightning taken out, for a network that keeps the user's own forward."""

from __future__ import annotations

import types
from typing import Any

import torch
from lightning import LightningModule
from torch import nn


class _Bare(nn.Module):
    """What stands in the place of LightningModule: the few of its attributes that a forward may use."""

    @property
    def device(self) -> torch.device:
        """Where the first parameter or buffer lies."""
        return next((t.device for t in [*self.parameters(), *self.buffers()]), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    @property
    def hparams(self) -> Any:
        """The hyperparameters that `save_hyperparameters` kept."""
        return self.__dict__["_hparams"]

    def __reduce__(self) -> Any:
        return strip, (self._lightning_class, self.__dict__)


def strip(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """An object of the bare form of a LightningModule class.

    Args:
        cls: the user's class.
        state: the instance's attributes, without Lightning's.
    """
    bare = _mirror(cls)
    plain: nn.Module = nn.Module.__new__(bare)
    nn.Module.__init__(plain)
    plain.__dict__.update(state)
    return plain


def _mirror(cls: type) -> Any:
    """The same class over `_Bare`: the user's classes between it and LightningModule are rebuilt, so that `super()` works."""
    if cls.__module__.startswith("lightning.") and issubclass(cls, LightningModule):
        return _Bare
    if not issubclass(cls, LightningModule):
        return cls
    bases = tuple(dict.fromkeys(_mirror(base) for base in cls.__bases__))
    cell = types.CellType()
    kept = {k: _rebind(v, cell) for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__init__")}
    new = type(cls.__name__, bases, {**kept, "_lightning_class": cls})
    cell.cell_contents = new
    return new


def _rebind(value: Any, cell: types.CellType) -> Any:
    """A function whose `super()` means the new class."""
    if not isinstance(value, types.FunctionType) or "__class__" not in value.__code__.co_freevars:
        return value
    names = value.__code__.co_freevars
    closure = tuple(cell if n == "__class__" else c for n, c in zip(names, value.__closure__ or (), strict=True))
    new = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    new.__kwdefaults__ = value.__kwdefaults__
    return new

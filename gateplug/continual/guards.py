"""Parameters that no gate stands for: how available each of their weights still is, or that they do not train at all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gateplug.continual.layers import Availability
from gateplug.core.gate import Reshaped


class Guards(Reshaped):
    """Availability of parameters of a layer, elementwise, kept on the layer that has them.

    Whether they are held back or frozen may follow from how the network was made (pretrained or not), and a checkpoint may be
    loaded into one that was made in another way: then it is as it was in the checkpoint.

    Args:
        layer: that has them.
        held: names of parameters of the layer that are held back.
        frozen: names of those that do not train at all.
    """

    holds: Tensor

    def __init__(self, layer: nn.Module, held: Iterable[str], frozen: Iterable[str]) -> None:
        super().__init__()
        self.layer = (layer,)  # no sub-module: it is this module's parent
        self.of = nn.ModuleDict()
        self.names = sorted({*held, *frozen})
        self._hold(set(held))

    def _hold(self, held: set[str]) -> None:
        self.frozen = [name for name in self.names if name not in held]
        for name in self.names:
            key = f"of_{name}"
            if name in held and key not in self.of:
                parameter = self.layer[0].get_parameter(name)
                self.of[key] = Availability(parameter.shape).to(parameter.device)
            elif name not in held and key in self.of:
                del self.of[key]
        device = self.layer[0].get_parameter(self.names[0]).device
        self.register_buffer("holds", torch.tensor([name in held for name in self.names], device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Nothing: an `nn.Sequential` with parameters of its own runs all that is in it."""
        return x

    def before_load(self, state: dict[str, Tensor], name: str) -> None:
        """Hold back what the checkpoint held back, and freeze the rest."""
        stored = state.get(f"{name}.holds".lstrip("."))
        if stored is not None and len(stored) == len(self.names):
            self._hold({name for name, held in zip(self.names, stored.tolist(), strict=True) if held})

    def availability(self, name: str) -> Availability:
        """Of one parameter."""
        found = self.of[f"of_{name}"]
        assert isinstance(found, Availability)
        return found

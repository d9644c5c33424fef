"""A network that is held still while something on it is trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class Frozen:
    """Takes gradients and the training mode off modules, and gives them back."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._modules: list[tuple[nn.Module, bool]] = []

    def hold(self, net: nn.Module, but: Iterable[nn.Module]) -> None:
        """No gradient for the parameters of `net`, those of `but` left out."""
        kept = {id(p) for part in but for p in part.parameters()}
        self.keep(p for p in net.parameters() if id(p) not in kept)

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """No gradient for these."""
        for p in parameters:
            if p.requires_grad:
                p.requires_grad_(False)
                self._parameters.append(p)

    def still(self, net: nn.Module, but: Iterable[nn.Module]) -> None:
        """Eval mode for `net`, training for `but`: no dropout, no statistics that move."""
        kept = {m for part in but for m in part.modules()}
        if not self._modules:
            self._modules = [(m, m.training) for m in net.modules()]
        for m in net.modules():
            m.training = m in kept

    def release(self) -> None:
        """As it was."""
        for p in self._parameters:
            p.requires_grad_(True)
        for m, training in self._modules:
            m.training = training
        self._parameters, self._modules = [], []

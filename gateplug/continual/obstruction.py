"""Holding back what other contexts need: of each parameter, the part of an update that its availability lets through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gateplug.continual.functional import parameter_relevance
from gateplug.continual.layers import Availability


class Guarded:
    """A parameter that is held back.

    Args:
        layer: that has it.
        name: in the layer.
        availability: of its elements, or of the units that its rows belong to.
        spread: from the availability of units to that of rows; None: the availability is elementwise.
        transposed: the units are its second dimension.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        availability: Availability,
        spread: Callable[[Tensor], Tensor] | None = None,
        transposed: bool = False,
    ) -> None:
        self.layer, self.name, self.availability, self.spread, self.transposed = layer, name, availability, spread, transposed
        self._a: Tensor | None = None
        self._zero: Tensor | None = None
        self._old: Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """It."""
        found = self.layer._parameters[self.name]
        assert found is not None
        return found

    def prepare(self) -> None:
        """A context begins: how much of the parameter may move in it. It is read once, as it stays until the next."""
        a = self.availability.committed
        if self.spread is not None:
            a = self.spread(a)
            shape = [1] * self.parameter.dim()
            shape[1 if self.transposed else 0] = -1
            a = a.reshape(shape)
        free = bool((a == 1).all())
        self._a = None if free else a
        zero = a == 0
        self._zero = zero if not free and bool(zero.any()) else None
        self._old = None

    def obstruct_gradient(self) -> None:
        """The gradient times availability."""
        if self._a is not None and self.parameter.grad is not None:
            self.parameter.grad.mul_(self._a.to(self.parameter.grad))

    def remember(self) -> None:
        """Before the update."""
        if self._a is None:
            return
        if self._old is None:
            self._old = torch.empty_like(self.parameter)
        self._old.copy_(self.parameter)

    def blend(self) -> None:
        """After it: what `functional.blend_update` says, in place."""
        if self._a is None or self._old is None:
            return
        p = self.parameter
        torch.lerp(self._old, p, self._a.to(p), out=p)
        if self._zero is not None:
            torch.where(self._zero, self._old, p, out=p)


class Obstruction:
    """All parameters that are held back, around the updates of an optimizer.

    Args:
        parts: the parameters.
        kind: `update`: a part of each update is let through, whatever the optimizer makes of the gradient; `grad`: the gradient
            is made smaller.
    """

    def __init__(self, parts: Iterable[Guarded], kind: str) -> None:
        self.parts, self.kind = list(parts), kind

    @torch.no_grad()
    def prepare(self, optimizer: Optimizer | None = None) -> None:
        """A context begins.

        Args:
            optimizer: whose state of these parameters is dropped where gradients are obstructed: old momentum would move them.
        """
        for part in self.parts:
            part.prepare()
            if self.kind == "grad" and optimizer is not None:
                optimizer.state.pop(part.parameter, None)

    @torch.no_grad()
    def measure(self, eta: float, reactivation: float) -> None:
        """Step the availability of what is guarded elementwise, by the gradients in place."""
        for part in self.parts:
            p = part.parameter
            if part.spread is None and p.grad is not None:
                part.availability.step(parameter_relevance(p.detach().float(), p.grad.float()), eta, reactivation)

    @torch.no_grad()
    def before(self) -> None:
        """Right before an update."""
        for part in self.parts:
            if self.kind == "grad":
                part.obstruct_gradient()
            else:
                part.remember()

    @torch.no_grad()
    def after(self) -> None:
        """Right after it."""
        if self.kind == "update":
            for part in self.parts:
                part.blend()

    def __getstate__(self) -> dict[str, Any]:
        """What a run holds is not copied nor saved."""
        return {"parts": [], "kind": self.kind}

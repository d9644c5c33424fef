"""Holding back what other contexts need: of each parameter, the part of an update that its availability lets through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gateplug.continual.functional import parameter_relevance
from gateplug.continual.guards import Guards
from gateplug.continual.layers import Availability, ContextGate


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
        p = self.parameter
        if self._a is not None and p.grad is not None:
            p.grad = p.grad * self._a.to(p) if p.grad.is_sparse else p.grad.mul_(self._a.to(p.grad))

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


class Spread:
    """From the availability of a gate's units to that of the rows of a parameter."""

    def __init__(self, gate: ContextGate, part: str) -> None:
        self.gate, self.part = gate, part

    def __call__(self, availability: Tensor) -> Tensor:
        """Of the rows."""
        attention = self.gate.attention
        return availability if attention is None else attention.rows(availability)[self.part]


def guarded(gates: Iterable[ContextGate], guards: Iterable[Guards]) -> Iterator[Guarded]:
    """What gates and guards of a model hold back."""
    for gate in gates:
        if gate.availability is not None:
            for layer, name, part in gate.rows_of:
                p = layer._parameters[name]
                transposed = type(layer).__name__ == "Conv1D" and p is not None and p.dim() == 2
                yield Guarded(layer, name, gate.availability, Spread(gate, part), transposed)
    for guard in guards:
        for key in guard.of:
            name = key.removeprefix("of_")
            yield Guarded(guard.layer[0], name, guard.availability(name))


def _gradient(part: Guarded) -> Tensor | None:
    """Of a parameter that is guarded elementwise."""
    grad = part.parameter.grad
    if part.spread is not None or grad is None:
        return None
    return grad.to_dense() if grad.is_sparse else grad


class Obstruction:
    """All parameters that are held back, around the updates of an optimizer.

    Args:
        parts: the parameters.
        kind: `update`: a part of each update is let through, whatever the optimizer makes of the gradient; `grad`: the gradient
            is made smaller.
    """

    def __init__(self, parts: Iterable[Guarded], kind: str) -> None:
        self.parts, self.kind = list(parts), kind
        self._relevances: dict[Guarded, Tensor] = {}

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
    def read(self) -> None:
        """Take the relevance of what is guarded elementwise from the gradients as they are now, before they are cut off."""
        found = [(part, _gradient(part)) for part in self.parts]
        self._relevances = {p: parameter_relevance(p.parameter.detach().float(), g.float()) for p, g in found if g is not None}

    def forget(self) -> None:
        """What was read does not count."""
        self._relevances = {}

    @torch.no_grad()
    def measure(self, eta: float, reactivation: float) -> None:
        """Step the availability of what is guarded elementwise, by what was read, or else by the gradients in place."""
        for part, relevance in self._relevances.items():
            part.availability.step(relevance, eta, reactivation)
        for part in () if self._relevances else self.parts:
            grad = _gradient(part)
            if grad is not None:
                part.availability.step_by(part.parameter, grad, eta, reactivation)
        self.forget()

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

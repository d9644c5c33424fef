"""The part of GateON that needs no Trainer: contexts that come and go, relevance of every step, updates that are held back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gateplug.continual.layers import Availability, ContextGate, Guards
from gateplug.continual.norms import ContextStatistics
from gateplug.continual.obstruction import Guarded, Obstruction
from gateplug.continual.relevance import Listener
from gateplug.core.errors import PlugError
from gateplug.core.frozen import Frozen
from gateplug.core.processes import world_size
from gateplug.core.stream import TaskPlug
from gateplug.core.update import AroundUpdate, insert_parameter


class Spread:
    """From the availability of a gate's units to that of the rows of a parameter."""

    def __init__(self, gate: ContextGate, part: str) -> None:
        self.gate, self.part = gate, part

    def __call__(self, availability: Tensor) -> Tensor:
        """Of the rows."""
        attention = self.gate.attention
        return availability if attention is None else attention.rows(availability)[self.part]


class Contexts(TaskPlug):
    """What :class:`GateON` does to a network that is trained in contexts. It sets the arguments."""

    relevance: str
    contexts: int | None
    obstruct: str
    eta: float
    reactivation: float
    open_share: float

    def _begin(self) -> None:
        self._gates: list[ContextGate] = []
        self._guards: list[Guards] = []
        self._norms: list[ContextStatistics] = []
        self._names: dict[ContextGate | Guards, str] = {}
        self._frozen = Frozen()
        self._listener: Listener | None = None
        self._around: AroundUpdate | None = None
        self._obstruction = Obstruction((), self.obstruct)
        self._optimizer: Optimizer | None = None
        self._warned: set[str] = set()
        self._context_of: dict[int, int] = {}
        """Which context a task is trained in."""
        self._led = False
        """A detector says which context it is."""

    def _settle(self, module: nn.Module) -> None:
        super()._settle(module)
        found = self._found(module)
        attached = found.attached() if found is not None else []
        self._gates = [m for _, m in attached if isinstance(m, ContextGate)]
        self._guards = [m for _, m in attached if isinstance(m, Guards)]
        self._norms = [m for _, m in attached if isinstance(m, ContextStatistics)]
        self._names = {m: name.rpartition(".")[0] for name, m in attached if isinstance(m, ContextGate | Guards)}

    @property
    def context(self) -> int:
        """The context that is being trained."""
        return self._gates[0].trained if self._gates else 0

    @property
    def known(self) -> int:
        """How many contexts were trained, the one that is being trained among them."""
        return self._gates[0].opened if self._gates else 0

    # ------------------------------------------------------------------ contexts

    @torch.no_grad()
    def switch(self, module: nn.Module, context: int) -> None:
        """Train another context from now on; what the one before it has used is held from now on.

        Args:
            module: that this plug is attached to.
            context: its number; the next one after those that are known opens a new one.

        Raises:
            PlugError: a number further on, or more contexts than `contexts` allows.
        """
        if context == self.context:
            self.show(module, context)
            return
        if not 0 <= context <= self.known:
            raise PlugError(f"GateON: context {context} is unknown. There are 0 … {self.known - 1}, and {self.known} is new")
        if context == self.known:
            self._open(context)
        for availability in self.availabilities().values():
            availability.commit()
        for gate in self._gates:
            gate.place(context, gate.active)
        self.show(module, context)
        self._obstruction.prepare(self._optimizer)

    def _open(self, context: int) -> None:
        if self.contexts is not None and context >= self.contexts:
            raise PlugError(
                f"GateON(contexts={self.contexts}): context {context} would be one too many. Allow more, or "
                "contexts=None for as many as come"
            )
        for gate in self._gates:
            if context < len(gate.rows):
                continue
            before, new = gate.rows[-1], gate.grow()
            if world_size() > 1:
                dist.broadcast(new.data, 0)
            if self._optimizer is not None:
                insert_parameter(self._optimizer, new, before, f"{self._names[gate]}.rows.{context}")
        for norm in self._norms:
            norm.grow(context + 1)

    @torch.no_grad()
    def show(self, module: nn.Module, context: int) -> None:
        """Run the network in a context that is known, without training it: for a validation, or before `gp.fold`.

        Raises:
            PlugError: there is no such context.
        """
        if not 0 <= context < self.known:
            raise PlugError(f"GateON: context {context} is unknown. There are 0 … {self.known - 1}")
        shown = self._gates[0].active
        if context == shown:
            return
        for gate in self._gates:
            gate.place(gate.trained, context)
        for norm in self._norms:
            norm.swap(shown, context)

    def availabilities(self) -> dict[str, Availability]:
        """Availability of units and weights, by the name of the layer (and parameter)."""
        units = {self._names[g]: g.availability for g in self._gates if g.availability is not None}
        weights = {f"{self._names[g]}.{n[3:]}": a for g in self._guards for n, a in g.of.items() if isinstance(a, Availability)}
        return {**units, **weights}

    # ------------------------------------------------------------------ around the updates of an optimizer

    def follow(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Estimate relevance in every backward pass, and hold updates of `optimizer` back, until :meth:`unfollow`.

        In a Trainer this is done by itself; in a loop of your own call it before the first step.
        """
        self.unfollow()
        self._optimizer = optimizer
        if self.obstruct == "none":
            return
        if self.relevance == "neuron":
            self._listener = Listener([(gate, gate.reads[0] if gate.reads else None) for gate in self._gates])
        self._obstruction = Obstruction(self._guarded(), self.obstruct)
        self._obstruction.prepare()
        self._around = AroundUpdate(optimizer, self._before_update, self._obstruction.after)

    def forget(self) -> None:
        """What was read of the step so far does not count: a step that was skipped, or is held back."""
        if self._listener is not None:
            self._listener.forget()

    def unfollow(self) -> None:
        """Stop."""
        if self._listener is not None:
            self._listener.remove()
        if self._around is not None:
            self._around.remove()
        self._listener, self._around, self._optimizer = None, None, None
        self._obstruction = Obstruction((), self.obstruct)

    def _guarded(self) -> Iterable[Guarded]:
        for gate in self._gates:
            if gate.availability is not None:
                for layer, name, part in gate.rows_of:
                    p = layer._parameters[name]
                    transposed = type(layer).__name__ == "Conv1D" and p is not None and p.dim() == 2
                    yield Guarded(layer, name, gate.availability, Spread(gate, part), transposed)
        for guards in self._guards:
            for name in guards.of:
                yield Guarded(guards.layer[0], name[3:], guards.availability(name[3:]))

    def _before_update(self) -> None:
        if self._listener is not None:
            for gate, relevance in self._listener.take().items():
                assert gate.availability is not None
                gate.availability.step(relevance, self.eta, self.reactivation)
        self._obstruction.measure(self.eta, self.reactivation)
        self._obstruction.before()

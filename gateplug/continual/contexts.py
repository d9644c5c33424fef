"""The part of GateON that needs no Trainer: contexts that come and go, relevance of every step, updates that are held back."""

from __future__ import annotations

import operator

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from gateplug.continual.guards import Guards
from gateplug.continual.layers import Availability, ContextGate
from gateplug.continual.norms import ContextStatistics
from gateplug.continual.obstruction import Obstruction, guarded
from gateplug.continual.plan import UNITS
from gateplug.continual.relevance import Listener
from gateplug.core.errors import PlugError, listed
from gateplug.core.frozen import Frozen
from gateplug.core.optim import check_trained
from gateplug.core.processes import world_size
from gateplug.core.record import all_records
from gateplug.core.stream import TaskPlug
from gateplug.core.update import AroundUpdate, insert_parameter


class Contexts(TaskPlug):
    """What :class:`GateON` does to a network that is trained in contexts. It sets the arguments."""

    relevance: str
    contexts: int | None
    obstruct: str
    eta: float
    reactivation: float
    open_share: float
    bn: str

    def _begin(self) -> None:
        self._module: nn.Module | None = None
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

    def _settle(self, module: nn.Module) -> None:
        super()._settle(module)
        found = self._found(module)
        attached = found.attached() if found is not None else []
        self._module = module
        self._gates = [m for _, m in attached if isinstance(m, ContextGate)]
        self._guards = [m for _, m in attached if isinstance(m, Guards)]
        self._norms = [m for _, m in attached if isinstance(m, ContextStatistics)]
        self._names = {m: name.rpartition(".")[0] for name, m in attached if isinstance(m, ContextGate | Guards)}

    def _parts(self, module: nn.Module) -> tuple[list[ContextGate], list[ContextStatistics]]:
        """Gates and statistics in a module, which may be a copy of what is trained."""
        if module is self._module:
            return self._gates, self._norms
        found = self._found(module)
        if found is None:
            raise PlugError(f"this {type(module).__name__} does not carry this GateON: call attach(module) first")
        attached = [m for _, m in found.attached()]
        return [m for m in attached if isinstance(m, ContextGate)], [m for m in attached if isinstance(m, ContextStatistics)]

    def _turn_to(self, module: nn.Module) -> None:
        """Take a module as the one that is trained."""
        gates, _ = self._parts(module)
        if self._gates and gates[0] is self._gates[0]:
            return
        if self._optimizer is not None:
            raise PlugError("GateON follows the training of another module: call unfollow() first")
        self._settle(module)

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
            PlugError: a number further on, more contexts than `contexts` allows, or a module without this plug.
        """
        context = operator.index(context)
        self._turn_to(module)
        if context == self.context:
            self.show(module, context)
            return
        if not 0 <= context <= self.known:
            raise PlugError(f"GateON: context {context} is unknown. There are 0 … {self.known - 1}, and {self.known} is new")
        if context == self.known:
            self._open(context)
        for availability in self.availabilities().values():
            availability.commit()
        self.show(module, self.context)
        for norm in self._norms:
            norm.agree()
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
                name = next(n for n, p in self._module.named_parameters() if p is new) if self._module is not None else None
                insert_parameter(self._optimizer, new, before, name)
        for norm in self._norms:
            norm.grow(context + 1)

    @torch.no_grad()
    def show(self, module: nn.Module, context: int) -> None:
        """Run the network in a context that is known, without training it: for a validation, or before `gp.fold`.

        Raises:
            PlugError: there is no such context, or the module does not carry this plug.
        """
        gates, norms = self._parts(module)
        known, shown = gates[0].opened, gates[0].active
        if not 0 <= context < known:
            raise PlugError(f"GateON: context {context} is unknown. There are 0 … {known - 1}")
        if context == shown:
            return
        for gate in gates:
            gate.place(gate.trained, operator.index(context))
        for norm in norms:
            norm.swap(shown, context)

    def availabilities(self) -> dict[str, Availability]:
        """Availability of units and weights, by the name of the layer (and parameter)."""
        units = {self._names[g]: g.availability for g in self._gates if g.availability is not None}
        weights = {f"{self._names[g]}.{n[3:]}": a for g in self._guards for n, a in g.of.items() if isinstance(a, Availability)}
        return {**units, **weights}

    # ------------------------------------------------------------------ around the updates of an optimizer

    def follow(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Estimate relevance in every backward pass, and hold updates of `optimizer` back, until :meth:`unfollow`.

        In a Trainer this is done by itself; in a loop of your own call it before the first step, and :meth:`forget` where you
        throw a gradient away. Parameters that are frozen do not require gradients until :meth:`unfollow`.

        Args:
            module: that this plug is attached to.
            optimizer: of all its parameters.

        Raises:
            PlugError: the optimizer has not the gates, or calls its closure several times; an activation was replaced since.
        """
        self.unfollow()
        self._turn_to(module)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise PlugError("LBFGS moves the parameters several times in one step, and GateON stands around a step: use another")
        check_trained([optimizer], self.parameters(module), type(self).__name__)
        self._freeze()
        if self.relevance in UNITS:
            heard = [(gate, self._heard(module, gate)) for gate in self._gates]
            self._listener = Listener(heard, self.relevance == "activity")
        self._optimizer = optimizer
        self._obstruction = Obstruction(guarded(self._gates, self._guards), self.obstruct)
        self._obstruction.prepare()
        self._around = AroundUpdate(optimizer, self._before_update, self._obstruction.after)

    def _freeze(self) -> None:
        self._frozen.keep(g.layer[0].get_parameter(name) for g in self._guards for name in g.frozen)

    def _heard(self, module: nn.Module, gate: ContextGate) -> nn.Module | None:
        if gate.reads and all(m is not gate.reads[0] for m in module.modules()):
            keys = {record.key: record.plug for record in all_records(module)}
            later = [plug for key, plug in keys.items() if list(keys).index(key) > list(keys).index(self.state_key)]
            raise PlugError(
                f"GateON reads the activations of {self._names[gate]} from a {type(gate.reads[0]).__name__} that was replaced "
                f"since: put {listed(later)} before GateON in the list of callbacks"
            )
        return gate.reads[0] if gate.reads else None

    def forget(self) -> None:
        """What was read of the step so far does not count: a step that was skipped, or is held back."""
        self._obstruction.forget()
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
        self._frozen.release()

    def _before_update(self) -> None:
        for gate in self._gates:
            for context, row in enumerate(gate.rows):
                if context != gate.trained:  # with a gradient of zero, momentum would move it
                    row.grad = None
        if self._listener is not None:
            for availability, relevance in self._listener.take().items():
                availability.step(relevance, self.eta, self.reactivation)
        self._obstruction.measure(self.eta, self.reactivation)
        self._obstruction.before()

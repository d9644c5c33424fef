"""What a plug does to a model, with or without a Trainer: choose layers, attach, describe, detach."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar
from uuid import uuid4

from torch import Tensor, nn

from gateplug.core import record as records
from gateplug.core.arguments import encode, has_lost
from gateplug.core.checkpoint import guard, spelled, unguard
from gateplug.core.edit import Edit
from gateplug.core.errors import PlugError, listed
from gateplug.core.fast_path import without_fast_path
from gateplug.core.gate import Gate
from gateplug.core.objective import Injection
from gateplug.core.optim import GroupOptions
from gateplug.core.record import Record, all_records
from gateplug.core.select import Layers, select


class Attachable:
    """The part of a plug that needs no Trainer.

    A method overrides :meth:`candidates` (what `layers="auto"` means) and :meth:`plan` (which edits it makes), and, if it has
    them, :meth:`terms` and :attr:`group`. Each constructor argument is kept, unchanged, as the attribute of the same name:
    this is how a checkpoint knows how to build the plug again.
    """

    room: ClassVar[str] = ""
    """The folder of the method; first part of everything it logs."""
    summary: ClassVar[str] = ""
    """One line for `gateplug plugs`."""
    paper: ClassVar[str] = ""
    attaches: ClassVar[bool] = True
    """Whether the plug changes the model at all; one that does and finds nothing raises."""
    injects: ClassVar[bool] = False
    """Whether gates of this plug use `Gate.injection`."""
    refuses: ClassVar[dict[str, str]] = {}
    """Plugs (by class name) that cannot be used beside this one, and why."""
    layers: Layers = "auto"
    chooser: ClassVar[str] = "layers"
    """What the method calls the argument that is kept in `layers`."""
    _injection: Injection | None = None
    group: GroupOptions | None = None
    """How the attached parameters are trained, if not like all others."""

    # ------------------------------------------------------------------ what a method writes

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        """Layers of `module` that `layers="auto"` stands for, by name."""
        return {}

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        """Edits for the selected layers. Nothing of `module` may be changed here, so that an error leaves it as it was."""
        return ()

    def terms(self, module: nn.Module) -> Mapping[str, Tensor]:
        """Weighted scalar loss terms of the step that has just run, by name; logged as `<room>/<name>`."""
        return {}

    # ------------------------------------------------------------------ by hand, on any nn.Module

    def attach(self, module: nn.Module) -> None:
        """Change `module`. Attaching again changes nothing; a plug of the same kind and arguments takes over.

        Raises:
            PlugError: there is nothing to attach to, or another plug is in the way. The module is then as it was.
        """
        if not self.attaches:
            return
        found = self._found(module)
        arguments = encode(self.arguments())
        if found is not None:
            # a lambda can be told from another one only by the plug that holds it
            if found.arguments != arguments or (has_lost(arguments) and found.owner != self._identity):
                raise PlugError(
                    f"the model carries {found.plug}({spelled(found.arguments)}) already; "
                    f"call detach(module) on it before attaching {spelled(arguments)}"
                )
            self._settle(module)
            return
        try:
            chosen = select(module, self.layers, self.candidates(module), self.chooser)
        except PlugError as error:
            raise PlugError(f"{type(self).__name__}: {error}") from None
        plan = list(self.plan(module, chosen)) if chosen else []
        if not plan:
            before = [r.plug for r in all_records(module)]
            raise PlugError(self.nothing(module) + (f". {listed(before)} changed this model before" if before else ""))
        flags = {e.slot: e for layer in {e.layer for e in plan} for e in without_fast_path(module, layer)}
        plan += [flags[slot] for slot in sorted(flags)]
        records.apply(module, type(self).__name__, self.state_key, arguments, self._identity, plan)
        self._settle(module)

    def detach(self, module: nn.Module) -> None:
        """Give `module` back as it was, original layers with the weights they had when they were replaced."""
        self._release(module)
        if (found := self._found(module)) is not None:
            records.undo(module, found)
            unguard(module)

    def nothing(self, module: nn.Module) -> str:
        """The message for a module in which there is nothing to attach to."""
        linear = [f"{n} ({type(m).__name__})" for n, m in module.named_modules() if n and not list(m.children())]
        return (
            f"{type(self).__name__} with {self.chooser}={self.layers!r} finds nothing to attach to. Name layers with it; "
            f"there are: {listed(linear)}"
        )

    def total_loss(self, module: nn.Module, loss: Tensor) -> Tensor:
        """For a training loop of one's own: `loss` with the terms of this plug; call backward on what comes back.

        Several plugs are chained: `b.total_loss(net, a.total_loss(net, loss))`. In a Trainer with automatic optimization
        this is done by itself.
        """
        for value in self.terms(module).values():
            loss = loss + value.to(loss.device)
        if self._injection is not None:
            self._injection.clear()
            self._injection.watch(loss)
        return loss

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters that this plug brought into `module`, by name."""
        found = self._found(module)
        return dict(found.parameters(module)) if found else {}

    def gates(self, module: nn.Module) -> dict[str, Gate]:
        """Gates that this plug brought into `module`, by name."""
        found = self._found(module)
        return {name: m for name, m in found.attached() if isinstance(m, Gate)} if found else {}

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments, by name."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    def describe(self, module: nn.Module) -> dict[str, str]:
        """What was attached where: layer name -> one line."""
        found = self._found(module)
        return found.layers if found else {}

    @property
    def state_key(self) -> str:
        """Two plugs of one kind differ by their layers."""
        return f"{type(self).__qualname__}{{'layers': {encode(self.layers)!r}}}"

    def _release(self, module: nn.Module) -> None:
        for gate in self.gates(module).values():
            gate.injection = None

    def _settle(self, module: nn.Module) -> None:
        guard(module)
        if self.injects:
            self._injection = self._injection or Injection()
            for gate in self.gates(module).values():
                gate.injection = self._injection

    @property
    def _identity(self) -> int:
        """Tells this plug from any other, also from one that came to lie where it lay in memory: no `id()`."""
        identity: int = self.__dict__.setdefault("_identity_number", uuid4().int)
        return identity

    def _found(self, module: nn.Module) -> Record | None:
        return next((found for found in all_records(module) if found.key == self.state_key), None)

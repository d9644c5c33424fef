"""Plug: what every method's callback is made of. A method says what it changes and what it adds; the house does the rest."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from gateplug.core import record as records
from gateplug.core.arguments import encode, has_lost
from gateplug.core.checkpoint import guard, spelled, unguard
from gateplug.core.edit import Edit
from gateplug.core.errors import PlugError, listed
from gateplug.core.fast_path import without_fast_path
from gateplug.core.gate import Gate
from gateplug.core.objective import Objective
from gateplug.core.optim import Claim, GroupOptions, check_trained, grouping
from gateplug.core.record import Record, all_records
from gateplug.core.select import Layers, select
from gateplug.core.table import print_table
from gateplug.core.wrap import unwrap, wrap


class Plug(Callback):
    """Base of every plug.

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
    _announced: bool = False
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

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise ValueError or PlugError, before anything is changed, for a set-up in which the method would be wrong."""

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
            if found.arguments != arguments or (has_lost(arguments) and found.owner != id(self)):
                raise PlugError(
                    f"the model carries {found.plug}({spelled(found.arguments)}) already; "
                    f"call detach(module) on it before attaching {spelled(arguments)}"
                )
            return
        try:
            chosen = select(module, self.layers, self.candidates(module))
        except PlugError as error:
            raise PlugError(f"{type(self).__name__}: {error}") from None
        plan = list(self.plan(module, chosen)) if chosen else []
        if not plan:
            before = [r.plug for r in all_records(module)]
            raise PlugError(self.nothing(module) + (f". {listed(before)} changed this model before" if before else ""))
        flags = {e.slot: e for layer in {e.layer for e in plan} for e in without_fast_path(module, layer)}
        plan += [flags[slot] for slot in sorted(flags)]
        records.apply(module, type(self).__name__, self.state_key, arguments, id(self), plan)

    def detach(self, module: nn.Module) -> None:
        """Give `module` back as it was, original layers with the weights they had when they were replaced."""
        self._release(module)
        if (found := self._found(module)) is not None:
            records.undo(module, found)

    def nothing(self, module: nn.Module) -> str:
        """The message for a module in which there is nothing to attach to."""
        linear = [f"{n} ({type(m).__name__})" for n, m in module.named_modules() if n and not list(m.children())]
        return (
            f"{type(self).__name__} with layers={self.layers!r} finds nothing to attach to. Name layers with `layers=`; "
            f"there are: {listed(linear)}"
        )

    def total_loss(self, module: nn.Module, loss: Tensor) -> Tensor:
        """For a training loop of one's own: `loss` with the terms of this plug; call backward on what comes back."""
        return self._join(module).total(loss)[0]

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

    # ------------------------------------------------------------------ in a Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach before the optimizer exists and before weights are restored."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            name = type(other).__name__
            if other is not self and isinstance(other, Plug) and other.state_key == self.state_key:
                raise PlugError(
                    f"there are two {name} for layers={self.layers!r} in the callbacks: leave one out, or name layers"
                )
            if other is not self and name in self.refuses:
                raise PlugError(f"{type(self).__name__} cannot be used with {name}: {self.refuses[name]}")
        self.check(trainer, pl_module)
        if self._adds() and not pl_module.automatic_optimization:
            raise PlugError(
                f"{type(self).__name__} adds to the loss and needs automatic optimization: with "
                "automatic_optimization=False there is no one place where the loss is known. Leave the plug out of "
                "the Trainer, call plug.attach(module) yourself and plug.total_loss(module, loss) before manual_backward"
            )
        # layers that are built in these hooks do not exist yet in Callback.setup
        late = [hook for hook in ("setup", "configure_model") if is_overridden(hook, pl_module)]
        if late:
            wrap(pl_module, late[-1], self, partial(self._attach_after, pl_module, stage))
        else:
            self._enter(pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was attached, and make sure that all of it will be trained."""
        found = self._found(pl_module)
        if self.attaches and found is None:
            raise PlugError(self.nothing(pl_module))
        if found is not None:
            check_trained(trainer.optimizers, self.parameters(pl_module), type(self).__name__)
            if not self._announced:
                self._announced = True
                print_table(type(self).__name__, ("layer", "change"), found.layers.items())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the layers attached, take everything else off the module."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same as at the end of a run: Lightning calls no teardown after an exception."""
        self._release(pl_module)

    def _attach_after(self, module: LightningModule, stage: str, hook: Any, /, *args: Any, **kwargs: Any) -> None:
        hook(*args, **kwargs)
        self._enter(module, stage)

    def _enter(self, module: LightningModule, stage: str) -> None:
        guard(module)
        self.attach(module)
        if stage == "fit":
            if self._adds():
                self._join(module)
            if self.group is not None:
                wrap(module, "configure_optimizers", self, partial(self._configure, module))

    def _configure(self, module: LightningModule, configure: Any) -> Any:
        assert self.group is not None
        with grouping([Claim(type(self).__name__, self.group, self.parameters(module))]):
            return configure()

    def _adds(self) -> bool:
        return self.injects or type(self).terms is not Plug.terms

    def _join(self, module: nn.Module) -> Objective:
        objective = Objective.of(module)
        objective.join(self)
        for gate in self.gates(module).values():
            gate.injection = objective.injection
        return objective

    def _release(self, module: nn.Module) -> None:
        for gate in self.gates(module).values():
            gate.injection = None
        Objective.of(module).leave(self)
        unwrap(module, self)
        unguard(module)

    def _found(self, module: nn.Module) -> Record | None:
        return next((found for found in all_records(module) if found.key == self.state_key), None)

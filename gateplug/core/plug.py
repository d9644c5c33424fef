"""Plug: what every method's callback is made of. A method says what it changes and what it adds; the house does the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from gateplug.core.arguments import encode
from gateplug.core.attach import Attachable
from gateplug.core.checkpoint import guard, unguard
from gateplug.core.errors import PlugError
from gateplug.core.objective import Objective
from gateplug.core.optim import Claim, check_trained, grouping
from gateplug.core.table import print_table
from gateplug.core.wrap import unwrap, wrap

_GROUPS = "gateplug.groups"


class Plug(Attachable, Callback):
    """Base of every plug.

    A method overrides :meth:`candidates` (what `layers="auto"` means) and :meth:`plan` (which edits it makes), and, if it has
    them, :meth:`terms` and :attr:`group`. Each constructor argument is kept, unchanged, as the attribute of the same name:
    this is how a checkpoint knows how to build the plug again.
    """

    _announced: bool = False
    _fresh: bool = False
    """Attached for the run that is being set up, and not trained yet."""

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise ValueError or PlugError, before anything is changed, for a set-up in which the method would be wrong."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach before the optimizer exists and before weights are restored."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            name = type(other).__name__
            if other is not self and name in self.refuses:
                raise PlugError(f"{type(self).__name__} cannot be used with {name}: {self.refuses[name]}")
        self._not_after_a_copy(trainer)
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
        try:
            self._enter(pl_module, stage)
        except PlugError:
            if not late:
                raise

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on an error leaves the layers attached: there is something to lose."""
        self._fresh = False

    def state_dict(self) -> dict[str, Any]:
        """The arguments: so Lightning knows, and says, that a checkpoint needs this plug."""
        return {"arguments": encode(self.arguments())} if self.attaches else {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the layers attached, take everything else off the module."""
        self._fresh = False
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same as at the end of a run: Lightning calls no teardown after an exception.

        Where the run failed before its first batch, layers that were attached for it come off again.
        """
        self._release(pl_module)
        for plug in reversed([c for c in trainer.callbacks if isinstance(c, Plug)]):  # type: ignore[attr-defined]
            if plug._fresh:
                plug._fresh = False
                plug.detach(pl_module)

    def _attach_after(self, module: LightningModule, stage: str, hook: Any, /, *args: Any, **kwargs: Any) -> None:
        hook(*args, **kwargs)
        self._enter(module, stage)

    def _enter(self, module: LightningModule, stage: str) -> None:
        new = self._found(module) is None
        self.attach(module)
        guard(module)
        self._fresh = self._fresh or (new and self.attaches)
        if stage == "fit":
            if self._adds():
                self._join(module)
            if self.group is not None:
                wrap(module, "configure_optimizers", _GROUPS, partial(_configure, module))

    def _not_after_a_copy(self, trainer: Trainer) -> None:
        """Raise if a callback before this one copies the model in its own setup: the copy would have no plug."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self:
                return
            if self.attaches and isinstance(other, WeightAveraging | StochasticWeightAveraging):
                name = type(other).__name__
                raise PlugError(
                    f"{name} copies the model when it is set up: put {type(self).__name__} before it in the callbacks"
                )

    def _adds(self) -> bool:
        return self.injects or type(self).terms is not Plug.terms

    def _join(self, module: nn.Module) -> None:
        objective = Objective.of(module)
        objective.join(self)
        for gate in self.gates(module).values():
            gate.injection = objective.injection

    def _release(self, module: nn.Module) -> None:
        super()._release(module)
        Objective.of(module).leave(self)
        unwrap(module, self)
        unwrap(module, _GROUPS)
        unguard(module)


def _configure(module: LightningModule, configure: Any) -> Any:
    """Build the optimizers with a group per plug, in an order that does not depend on the order of the callbacks."""
    plugs = [c for c in module.trainer.callbacks if isinstance(c, Plug) and c.group is not None]  # type: ignore[attr-defined]
    plugs.sort(key=lambda plug: plug.state_key)
    with grouping([Claim(type(p).__name__, p.group, p.parameters(module)) for p in plugs if p.group is not None]):
        return configure()

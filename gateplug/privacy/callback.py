"""ReplaceActivation: another activation in every place where a model has one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from torch import nn

from gateplug.core.cost import call, still
from gateplug.core.edit import Edit, Replace, SetAttribute
from gateplug.core.errors import PlugError, listed
from gateplug.core.optim import GroupOptions
from gateplug.core.plug import Plug
from gateplug.core.select import Layers, select
from gateplug.core.wrap import unwrap, wrap
from gateplug.privacy.layers import TemperedSigmoid
from gateplug.privacy.sites import Old, Site, calls_of, find, is_pooler, present


class ReplaceActivation(Plug):
    """Replace an activation in all its places: sub-modules, Hugging Face's `ACT2FN` objects, functions held in attributes.

    A call in somebody's `forward` (`F.relu(x)`) cannot be replaced. If the first training step, or the example given to
    :meth:`attach`, makes one in a selected part of the model, the plug refuses, names the module and puts everything back.

    Args:
        old: what to replace: a class (`nn.ReLU`) or the name of a function (`relu`, `gelu`, `gelu_tanh`, `silu`, `quick_gelu`,
            `sigmoid`, `tanh`, `linear`). A class also finds other spellings of the function it computes.
        new: what comes in: a class or function that makes a module (one per place), or a module (copied for each place).
        layers: where, see :func:`gateplug.core.select.select`; names select the activations in and below them. "auto" is
            everywhere except in poolers.
        share: one instance for all places, so that trainable parameters are shared.

    Raises:
        ValueError: `old` is an unknown name.
        TypeError: `old` is no activation, or `new` makes no module.
        PlugError: there is no such activation, or one is out of reach.
    """

    room: ClassVar[str] = "privacy"
    summary: ClassVar[str] = "another activation (tempered sigmoid, tanh …) in every place where a model has one"
    paper: ClassVar[str] = "arXiv 2007.14191"

    def __init__(
        self,
        old: type[nn.Module] | str = nn.ReLU,
        new: nn.Module | Callable[[], nn.Module] = TemperedSigmoid,
        layers: Layers = "auto",
        share: bool = False,
    ) -> None:
        self._old = Old.of(old)
        if not isinstance(new, nn.Module) and not callable(new):
            raise TypeError(f"new={new!r} must be a module, or a class or function that makes one, such as gp.TemperedSigmoid")
        self.old, self.new, self.layers, self.share = old, new, layers, share
        self.group = GroupOptions(weight_decay=0.0)
        """Scale, temperature and offset are no weights: decay would pull them to 0."""

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        """The modules that hold the activation."""
        return {s.holder or s.attribute: module.get_submodule(s.holder) for s in find(module, self._old) if not is_pooler(s)}

    def nothing(self, module: nn.Module) -> str:
        """Say which activations there are."""
        return (
            f"ReplaceActivation finds no {self._old} held as a module or attribute in layers={self.layers!r}; "
            f"there are: {listed(present(module))}"
        )

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        """One edit per place."""
        sites = [s for s in find(module, self._old) if self._selected(s, layers)]
        shared = self._make() if sites and self.share else None
        return [self._edit(module, site, shared if shared is not None else self._make()) for site in sites]

    def attach(self, module: nn.Module, example: Any = None) -> None:
        """Replace the activations of `module`.

        Args:
            module: any network.
            example: what it is called with (a mapping, a tuple or one tensor). If given, the module is run once to make
                sure that no activation of the kind is called out of reach.

        Raises:
            PlugError: nothing to replace, or one out of reach. The module is then as it was.
        """
        super().attach(module)
        if example is None:
            return
        try:
            with still(module), calls_of(module, self._old, self._own(module)) as seen:
                call(module, example)
        except BaseException:
            self.detach(module)
            raise
        self._refuse(module, seen)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, and have the first training step watched."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            wrap(pl_module, "training_step", self, partial(self._watch, pl_module))

    def _watch(self, module: LightningModule, step: Any, /, *args: Any, **kwargs: Any) -> Any:
        # a compiled network shows no calls: this one step runs uncompiled
        with torch.compiler.set_stance("force_eager"), calls_of(module, self._old, self._own(module)) as seen:
            out = step(*args, **kwargs)
        self._refuse(module, seen)
        unwrap(module, self)  # one step tells, and the others shall cost nothing
        return out

    def _refuse(self, module: nn.Module, seen: list[str]) -> None:
        try:
            chosen = [""] if self.layers == "auto" else list(select(module, self.layers, {}))
        except PlugError:  # the layers were named by the class of the activation, which is gone
            chosen = [name.rpartition(".")[0] for name in self.describe(module)]
        mine = [n for n in seen if any(not c or f"{n}.".startswith(f"{c}.") for c in chosen)]
        if mine:
            mine = [f"{n or 'the module itself'} ({type(module.get_submodule(n)).__name__})" for n in mine]
            self.detach(module)
            raise PlugError(
                f"{self._old} is called as a function in the forward of {listed(mine)}, where no plug can reach it: hold "
                "it as a module (self.act = nn.ReLU()), or leave these parts out with `layers=`. The model is as it was"
            )

    def _selected(self, site: Site, layers: Mapping[str, nn.Module]) -> bool:
        if self.layers == "auto":
            return not is_pooler(site)
        return any(not n or f"{site.name}.".startswith(f"{n}.") for n in layers)

    def _own(self, module: nn.Module) -> list[nn.Module]:
        found = self._found(module)
        return [m for _, m in found.attached()] if found else []

    def _make(self) -> nn.Module:
        made = copy.deepcopy(self.new) if isinstance(self.new, nn.Module) else self.new()
        if not isinstance(made, nn.Module):
            raise TypeError(f"new={self.new!r} made {made!r}, which is no module")
        return made

    def _edit(self, module: nn.Module, site: Site, new: nn.Module) -> Edit:
        holder = module.get_submodule(site.holder)
        if (like := next(module.parameters(), None)) is not None:
            new = new.to(like.device)
        if site.module:
            old = holder._modules[site.attribute]
            return Replace(site.name, new, f"{type(old).__name__} → {new}", everywhere=False)
        old = holder.__dict__[site.attribute]
        return SetAttribute(site.holder, site.attribute, new, f"{getattr(old, '__name__', old)} → {new}")

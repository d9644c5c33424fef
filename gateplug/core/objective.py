"""The one place where a loss term or a gradient enters a training.

A *term* is a value that is added to the loss that `training_step` returns. An *injection* is for a term that is computed
deep inside the network: an identity at that place whose backward adds the term's own gradient, times the factor by which
the loss of the running backward pass was multiplied (1 / accumulation, the GradScaler's scale). That factor is the gradient
that arrives at the loss itself, and it arrives before anything else in that backward pass. Both ways give the same
gradient; only the injection keeps it when reentrant activation checkpointing runs the layer under `no_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gateplug.core.wrap import unwrap, wrap

_SLOT = "_gateplug_objective"

Value = Callable[[], Tensor]
"""A scalar without a graph, computed when somebody asks for it: most steps are not logged."""


def in_backward() -> bool:
    """Whether a backward pass is running in this thread: a layer that runs now is being recomputed."""
    current: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


class Injection:
    """What the places of injection and the loss of one module share: the scale of this backward, the values of this step."""

    def __init__(self) -> None:
        self.scale: Tensor | None = None
        self._values: list[tuple[str, Value]] = []

    def values(self) -> dict[str, Tensor]:
        """The terms that were put in since :meth:`clear`, by name; those of one name are added up."""
        return added_up((name, value()) for name, value in self._values)

    def clear(self) -> None:
        """Forget the values: a step begins."""
        self._values = []

    def __getstate__(self) -> dict[str, Any]:
        """What a step has left is not copied nor saved."""
        return {"scale": None, "_values": []}

    def add(self, x: Tensor, name: str, term: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `x` and, in backward, add the gradient of `term(x)` to its gradient.

        Args:
            x: any shape; what the term is a function of.
            name: under which the term's value is logged, `<room>/<term>`; values of one name add up over the layers.
            term: a scalar of `x`, weighted already. It is computed in float32 or more, outside of autocast.
        """
        return self.tether((x,), x, name, term)[0]

    def tether(self, carriers: Sequence[Tensor], x: Tensor, name: str, term: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """As :meth:`add` for an `x` that goes no further itself: router logits that a layer only reports.

        Args:
            carriers: tensors that do go on to the loss, at least one of them with a gradient. The term's gradient enters at `x`
                when backward passes any of them, once.
            x: any shape; what the term is a function of.
            name: as in :meth:`add`.
            term: as in :meth:`add`.

        Returns:
            The carriers; go on with these.
        """
        with torch.autocast(x.device.type, enabled=False):
            leaf = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            if not torch.is_grad_enabled():  # reentrant checkpointing runs the layer first where nothing is differentiated
                early = term(leaf)
                return self.send(carriers, x, None, {name: lambda: early})
            value = term(leaf.requires_grad_())
            (gradient,) = torch.autograd.grad(value, leaf)
        return self.send(carriers, x, gradient, {name: value.detach})

    def send(
        self, carriers: Sequence[Tensor], x: Tensor, gradient: Tensor | None, values: Mapping[str, Value]
    ) -> tuple[Tensor, ...]:
        """As :meth:`tether` for terms whose gradient is known.

        Args:
            carriers: as in :meth:`tether`.
            x: any shape.
            gradient: of the sum of the terms with respect to `x`; None: the values count, and nothing is put in.
            values: the weighted terms by name, `<room>/<term>`.

        Returns:
            The carriers; go on with these.
        """
        if not in_backward():
            self._values.extend(values.items())
        if gradient is None or not carriers or not torch.is_grad_enabled():
            return tuple(carriers)
        injected: tuple[Tensor, ...] = _Inject.apply(gradient, self, x, *carriers)  # type: ignore[no-untyped-call]
        return injected

    def watch(self, loss: Tensor) -> None:
        """Learn the scale from the gradient that will arrive at `loss`."""
        if loss.requires_grad:
            loss.register_hook(self._learn)  # type: ignore[no-untyped-call]

    def _learn(self, gradient: Tensor) -> None:
        self.scale = gradient.detach()


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, injection: Injection, x: Tensor, *carriers: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gradient)
        ctx.injection, ctx.dtype = injection, x.dtype
        ctx.set_materialize_grads(False)  # a carrier that nobody uses sends nothing back
        return tuple(carrier.view_as(carrier) for carrier in carriers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scale = ctx.injection.scale
        # without a watched loss (a loop of somebody's own that calls loss.backward()) the loss counts once
        scaled = gradient if scale is None else gradient * scale.to(gradient)
        return None, None, scaled.to(ctx.dtype), *grads


class Terms(Protocol):
    """Who adds to an objective: a plug."""

    @property
    def room(self) -> str:
        """First part of the names under which the terms are logged."""

    def terms(self, module: nn.Module) -> Mapping[str, Tensor]:
        """Weighted scalar terms of this step, by name."""


class Objective:
    """The loss of one module with everything that plugs add to it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.injection = Injection()
        self.sources: list[Terms] = []
        self._values: list[tuple[str, Tensor]] = []

    @staticmethod
    def of(module: nn.Module) -> Objective:
        """The objective of `module`, made on the first call."""
        found = module.__dict__.get(_SLOT)
        if not isinstance(found, Objective):
            found = module.__dict__[_SLOT] = Objective(module)
        return found

    def join(self, source: Terms) -> None:
        """Let a plug add its terms; in a LightningModule they enter around `training_step`."""
        if source not in self.sources:
            self.sources.append(source)
        if hasattr(self.module, "training_step"):
            wrap(self.module, "training_step", self, self.around_step)

    def leave(self, source: Terms) -> None:
        """Take a plug's terms out; the last one to leave takes everything off the module."""
        self.sources = [other for other in self.sources if other is not source]
        if not self.sources:
            unwrap(self.module, self)
            self.module.__dict__.pop(_SLOT, None)

    def total(self, loss: Tensor) -> Tensor:
        """Add all terms to `loss`: the sum, which backward must start from."""
        self._values = []
        for source in self.sources:
            for name, value in source.terms(self.module).items():
                loss = loss + value.to(loss.device)
                self._values.append((f"{source.room}/{name}", value.detach()))
        self.injection.watch(loss)
        return loss

    def values(self) -> dict[str, Tensor]:
        """The detached value of each term and injection of the last total, by `<room>/<term>`; one name's are added up."""
        return added_up([*self.injection.values().items(), *self._values])

    def around_step(self, step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Stand around `training_step`: a tensor or a mapping with "loss" gets the terms, None (a skipped batch) stays."""
        self.injection.clear()
        self.injection.scale = None
        out = step(*args, **kwargs)
        loss = out.get("loss") if isinstance(out, Mapping) else out
        if not isinstance(loss, Tensor):
            return out
        total = self.total(loss)
        if self._logging():
            samples = batch_size(args[0] if args else next(iter(kwargs.values()), None))
            for name, value in self.values().items():
                self.module.log(name, value, batch_size=samples)  # type: ignore[operator]
        return {**out, "loss": total} if isinstance(out, Mapping) else total

    def _logging(self) -> bool:
        """Whether the Trainer logs after this step, or the run may end: `log` takes its time, also when nobody reads it."""
        trainer: Any = self.module.trainer
        every = trainer.log_every_n_steps
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        ending: bool = trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step + 1
        return ending or (every > 0 and steps % every == 0)


def added_up(values: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Values of one name as one."""
    found: dict[str, Tensor] = {}
    for name, value in values:
        found[name] = found[name] + value if name in found else value
    return found


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor in it that has one, 1 if there is none."""
    return next((len(t) for t in _tensors(batch) if t.dim()), 1)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)

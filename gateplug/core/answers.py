"""What the network inside somebody's LightningModule was asked and what it answered, and steps that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from gateplug.core.batches import logits_of
from gateplug.core.errors import PlugError
from gateplug.core.wrap import Wrapped


class Answer(NamedTuple):
    """One call of a network."""

    net: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """Without labels: those are the loss's."""
    logits: Tensor
    """(B, C), as the network gave them, with their graph."""


class Answers:
    """Listens to the network of a module.

    Heard is the child of the LightningModule that holds all its parameters, or the module itself where there is no such child
    or it is not called as a whole. Use it as a context; of several calls the last one counts.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._heard: dict[nn.Module, Answer] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Answers:
        self._heard = {}
        for net in dict.fromkeys((network(self.module), self.module)):
            self._handles.append(net.register_forward_hook(self._hear, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hear(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        try:
            logits = logits_of(out)
        except ValueError:
            return
        self._heard[net] = Answer(net, args, {k: v for k, v in kwargs.items() if k != "labels"}, logits)

    @property
    def last(self) -> Answer:
        """The last call.

        Raises:
            PlugError: no call gave logits.
        """
        for net in (network(self.module), self.module):
            if net in self._heard:
                return self._heard[net]
        raise PlugError(
            f"neither {type(self.module).__name__} nor the network in it was called as a whole, or none gave logits (batch, "
            "classes): call self(batch) or self.net(batch) in the step, and not single layers"
        )


def network(module: nn.Module) -> nn.Module:
    """The network inside a LightningModule: its only child with parameters, as :func:`gateplug.fold` takes it."""
    if not hasattr(module, "training_step"):
        return module
    holders = [child for child in module.children() if any(True for _ in child.parameters())]
    return holders[0] if len(holders) == 1 else module


def own_step(module: nn.Module, name: str = "training_step") -> Callable[..., Any]:
    """A step of a LightningModule as the user wrote it, without what plugs have put around it."""
    step: Any = getattr(module, name)
    while isinstance(step, Wrapped):
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def loss_of(out: Any) -> Tensor | None:
    """The loss in what a `training_step` returned, None for a skipped batch."""
    loss = out.get("loss") if isinstance(out, Mapping) else out
    return loss if isinstance(loss, Tensor) else None


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """While this lasts, steps of a LightningModule log nothing, and its metrics are afterwards as they were before."""
    metrics = [(m, _kept(m)) for m in module.modules() if isinstance(m, Metric)]
    silenced = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in silenced:
        module.__dict__[name] = _nothing
    try:
        yield
    finally:
        for name, own in silenced.items():
            del module.__dict__[name]
            if own is not None:
                module.__dict__[name] = own
        for metric, kept in metrics:
            metric.__dict__.update(kept)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _kept(metric: Metric) -> dict[str, Any]:
    """State of a metric: an update may change a tensor in place, so its tensors are copied."""
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    held = {name: metric.__dict__[name] for name in names if name in metric.__dict__}
    return {name: _copied(value) for name, value in held.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copied(v) for v in value] if isinstance(value, list) else value

"""What a gate is: a module that lets a part of something through, can say how open it is, and can be worked in for good."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gateplug.core.objective import Injection, in_backward


class Folded(NamedTuple):
    """A gate that was taken off a network in folding."""

    layer: str
    """Name of the layer that it stood on, in the module that was folded."""
    gate: Gate
    arguments: Mapping[str, Any]
    """Of the plug that had brought it."""


@dataclass(frozen=True)
class Openness:
    """How open a gate is: `values` in [0, 1], one name per axis of `values` in `axes`, e.g. `("unit",)`."""

    values: Tensor
    axes: tuple[str, ...]
    rows: int = 1
    """How many samples or tokens it is the mean of."""


class Foldable(nn.Module):
    """A layer that has a plainer form once training is over; `gp.fold` puts it in its place."""

    def folded(self) -> nn.Module:
        """That form, in eval mode equal to this layer; the layer itself where there is none."""
        return self


class Reshaped(nn.Module):
    """A module that a plug brings and whose shape a training may change: it takes the shape that a checkpoint has for it."""

    def before_load(self, state: dict[str, Tensor], name: str) -> None:
        """Take the shape that a checkpoint has for this module, just before the strict load of its weights.

        Args:
            state: the checkpoint's state dict, whole.
            name: this module's name in it.
        """

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # torch asks a module before its children, so what grows here is loaded
        self.before_load(state_dict, prefix.removesuffix("."))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Gate(Foldable, Reshaped):
    """Base of every gate.

    A gate whose openness depends on the data calls :meth:`record` in its forward; it costs nothing unless somebody (the
    GateMonitor) has set `recording`. A gate whose openness is a state overrides :meth:`openness`.
    """

    room: ClassVar[str] = ""
    """The folder of the method, first part of its TensorBoard names."""
    axes: ClassVar[tuple[str, ...]] = ("unit",)
    whole: ClassVar[bool] = False
    """The gate takes and returns a layer's whole output, whatever its form, and not its first tensor alone."""
    before: ClassVar[bool] = False
    """The gate stands on what a layer is called with, and not on what it returns."""
    recording: bool = False
    injection: Injection | None = None
    """Where a plug with a loss term deep in the network puts it in; None outside of a training."""

    def __init__(self) -> None:
        super().__init__()
        self._sum: Tensor | None = None
        self._rows = 0

    def record(self, values: Tensor) -> None:
        """Add a batch of opennesses `(…, *axes)`, in [0, 1], to the running sums, once per batch.

        A layer that activation checkpointing runs a second time in backward is not counted again.
        """
        if in_backward():
            return
        rows = values.detach().reshape(-1, *values.shape[values.dim() - len(self.axes) :])
        total = rows.sum(0, dtype=torch.float32)
        self._sum = total if self._sum is None else self._sum + total
        self._rows += len(rows)

    def openness(self) -> Openness | None:
        """Mean over all that was recorded since :meth:`reset`, or None when nothing was."""
        if self._sum is None:
            return None
        return Openness(self._sum / max(self._rows, 1), self.axes, max(self._rows, 1))

    def reset(self) -> None:
        """Forget what was recorded."""
        self._sum, self._rows = None, 0

    def folded(self) -> nn.Module:
        """The module that stays in the place of this gate: itself, recording off."""
        self.recording, self.injection = False, None
        self.reset()
        return self

    @classmethod
    def finish(cls, network: nn.Module, original: nn.Module, gates: Sequence[Folded]) -> nn.Module:
        """The form of a whole network from which gates of this class were folded away, for gates that change how it is run.

        Args:
            network: plain.
            original: what is folded, as it stands.
            gates: of this class.
        """
        return network

    def fold(self, layer: nn.Module) -> nn.Module:
        """The plain module that computes what `layer` with this gate on its output (or input) computes in eval mode."""
        parts = [("layer", layer), ("gate", self.folded())]
        return nn.Sequential(OrderedDict(parts[::-1] if self.before else parts))


class RunBefore:
    """Forward pre-hook that sends what a layer is called with, its first argument, through the layer's own gate."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the first one gated."""
        gate = layer._modules[self.name]
        assert isinstance(gate, Gate)
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(f"a gate before a {type(layer).__name__} needs it to be called with a tensor by position")
        return (gate(args[0]), *args[1:])


class RunGate:
    """Forward hook that sends a layer's output, or the first part of a tuple, through the layer's own gate."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Return the gated output, in the form of `output`."""
        gate = layer._modules[self.name]
        assert isinstance(gate, Gate)
        if gate.whole:
            return gate(output)
        if isinstance(output, Tensor):
            return gate(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            first = gate(output[0])
            return type(output)(first, *output[1:]) if hasattr(output, "_fields") else (first, *output[1:])
        raise TypeError(f"a gate needs a layer that returns a tensor or a tuple that begins with one, not {type(output)}")

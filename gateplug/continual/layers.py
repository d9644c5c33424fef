"""Gates with a row for each context, and how available what they gate still is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gateplug.continual.attention import Attention
from gateplug.continual.blocks import step_in_blocks
from gateplug.continual.functional import availability_step, gate, normalized_gate, parameter_relevance
from gateplug.core.gate import Gate, Openness, RunBefore, RunGate

USED = 0.05
"""Availability below which a unit or weight counts as used (the official code's figure)."""


class Availability(nn.Module):
    """How available units or weights are: 1 for what no context needs, 0 for what must not move.

    `draft` follows the relevance of the running context; `committed` is what holds back updates, and takes the draft over only
    when the context changes, so that a context is never slowed by its own relevance.

    Args:
        shape: of the units, or of a parameter.
    """

    committed: Tensor
    draft: Tensor
    skipped: Tensor

    def __init__(self, shape: torch.Size | tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("committed", torch.ones(shape))
        self.register_buffer("draft", torch.ones(shape))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Availability:
        # in half precision, steps of η = .01 from 1 would be lost: device moves count, dtypes do not
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = self._buffers[name]
            assert new is not None
            if new.dtype != old.dtype:
                self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(new.device)
        return self

    def step(self, relevance: Tensor, eta: float, reactivation: float) -> None:
        """Move the draft by the relevance of an optimizer step; one that is not finite is counted and left out."""
        self.skipped += ~relevance.mean().isfinite()
        self.draft.copy_(availability_step(self.draft, relevance.to(self.draft), eta, reactivation))

    def step_by(self, weight: Tensor, grad: Tensor, eta: float, reactivation: float) -> None:
        """The same for single weights, by the gradient of the step."""
        tensors = (self.draft, weight, grad)
        if all(t.device.type == "cpu" and t.is_contiguous() for t in tensors):
            self.skipped += not step_in_blocks(*tensors, eta, reactivation)
        else:
            self.step(parameter_relevance(weight.detach().float(), grad.float()), eta, reactivation)

    def commit(self) -> None:
        """The context is over: what it needed is held from now on."""
        self.committed.copy_(self.draft)

    def used(self) -> Tensor:
        """Share of what is used up, a scalar."""
        return (self.draft < USED).float().mean()


class ContextGate(Gate):
    """Multiplies the units of a layer by tanh(relu(G_c))², over its root mean square, G_c a row of its own for each context c.

    Args:
        units: of the layer, n.
        contexts: rows to begin with, ≥ 1.
        open_share: share of the units that a new context starts with open, in (0, 1): G ~ N(μ, 1) with P(G > 0) = open_share.
            One is open in any case.
        seed: of the rows.
        trailing: dimensions behind the units: 0 for (B, …, n), 2 for images (B, n, h, w).
        repeat: numbers of a unit side by side in that dimension: the width of an attention head, 1 for a neuron.
        units_kept: whether availability is of units (n-GateON) and kept here.
    """

    room: ClassVar[str] = "continual"
    origin: Tensor
    contexts_now: Tensor
    """(3,): `trained`, `active` and `opened`, for the state dict; reading a tensor in each forward would halt a GPU."""

    def __init__(
        self, units: int, contexts: int, open_share: float, seed: int, trailing: int = 0, repeat: int = 1, units_kept: bool = True
    ) -> None:
        super().__init__()
        self.units, self.open_share, self.trailing, self.repeat = units, open_share, trailing, repeat
        self.register_buffer("origin", torch.tensor(seed, dtype=torch.int64))
        self.register_buffer("contexts_now", torch.tensor([0, 0, 1]))
        self.rows = nn.ParameterList()
        self.trained, self.active, self.opened = 0, 0, 1
        """The context that is being trained, the one in which the network runs, and how many were trained so far."""
        self.availability = Availability((units,)) if units_kept else None
        self.rows_of: list[tuple[nn.Module, str, str]] = []
        """Parameters whose rows are those of the units: (layer, name in it, name of the projection of an attention)."""
        self.attention: Attention | None = None
        self.reads: tuple[nn.Module, ...] = ()
        """The module whose output the activations are; none: the gate's own. In a tuple: it is no part of the gate."""
        for _ in range(contexts):
            self.grow()

    def grow(self) -> nn.Parameter:
        """Add a row for a new context: a function of the gate's seed and the context's number."""
        generator = torch.Generator().manual_seed((int(self.origin) + 7919 * len(self.rows)) % 2**63)  # the CPU's, wherever it is
        centre = torch.special.ndtri(torch.tensor(self.open_share, dtype=torch.float64)).float()
        row = torch.randn(self.units, generator=generator) + centre
        if not (row > 0).any():  # likely for a few heads: no unit would ever open, as a closed gate has no gradient
            row[row.argmax()].abs_()
        like = self.rows[0] if len(self.rows) else self.origin
        new = nn.Parameter(row.to(like.device, like.dtype if like.is_floating_point() else torch.float32))
        self.rows.append(new)
        return new

    def place(self, trained: int, active: int) -> None:
        """Say which context is trained, and in which one the network runs."""
        self.trained, self.active, self.opened = trained, active, max(self.opened, trained + 1)
        self.contexts_now.copy_(torch.tensor([self.trained, self.active, self.opened]))

    def before_load(self, state: dict[str, Tensor], name: str) -> None:
        """Have as many rows as the checkpoint, and be in its contexts."""
        if (now := state.get(f"{name}.contexts_now".lstrip("."))) is not None:
            self.trained, self.active, self.opened = now.tolist()
        stored = sum(key.startswith(f"{name}.rows.".lstrip(".")) for key in state)
        while len(self.rows) < stored:
            self.grow()
        if 0 < stored < len(self.rows):
            self.rows = nn.ParameterList(list(self.rows)[:stored])

    def scale(self) -> Tensor:
        """What the numbers of the gated dimension are multiplied by in the active context: (n · repeat,)."""
        opened = normalized_gate(self.rows[self.active])
        return opened.repeat_interleave(self.repeat) if self.repeat > 1 else opened

    def forward(self, x: Tensor) -> Tensor:
        """Gate the units of `x`."""
        return x * self.scale().to(x.dtype).reshape(-1, *[1] * self.trailing)

    def openness(self) -> Openness:
        """Of the units in the active context."""
        return Openness(gate(self.rows[self.active].detach()), self.axes)

    def opennesses(self) -> Tensor:
        """Of the units in every context that was trained: (C, n)."""
        return torch.stack([gate(row.detach()) for row in list(self.rows)[: self.opened]])

    def folded(self) -> nn.Module:
        """The factors of the active context alone."""
        return Scale(self.scale().detach().clone(), self.trailing)

    def fold(self, layer: nn.Module) -> nn.Module:
        """The layer with the active context's factors in its weights; a sequence where that is not possible."""
        others = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
        if any(isinstance(hook, RunGate | RunBefore) for hook in others) or not _plain(layer):
            return super().fold(layer)
        return scaled_layer(layer, self.scale().detach(), self.before)


class HeadGate(ContextGate):
    """A context gate on attention heads, at the input of the output projection."""

    before: ClassVar[bool] = True
    axes: ClassVar[tuple[str, ...]] = ("head",)


class Scale(nn.Module):
    """Multiplies units by constants.

    Args:
        factors: (n,).
        trailing: dimensions behind the units.
    """

    factors: Tensor

    def __init__(self, factors: Tensor, trailing: int) -> None:
        super().__init__()
        self.register_buffer("factors", factors.reshape(-1, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.factors.to(x.dtype)


def _plain(layer: nn.Module) -> bool:
    """Whether factors can go into the weights of a layer: a dense or convolutional one, and nothing that computes its weight."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    own = isinstance(layer._parameters.get("weight"), nn.Parameter)  # not of weight_norm and the like
    return own and (type(layer) in kinds or type(layer).__name__ == "Conv1D")


def scaled_layer(layer: nn.Module, factors: Tensor, inputs: bool = False) -> nn.Module:
    """A copy of a dense or convolutional layer whose outputs (or inputs) are multiplied by factors (n,)."""
    new: Any = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    weight = new.weight.detach()
    axis = 1 if inputs else 0
    if type(layer).__name__ == "Conv1D":  # its weight is (in, out)
        axis = 1 - axis
    shape = [1] * weight.dim()
    shape[axis] = -1
    new.weight = nn.Parameter(weight * factors.to(weight).reshape(shape))
    if new.bias is not None and not inputs:
        new.bias = nn.Parameter(new.bias.detach() * factors.to(weight))
    return new  # type: ignore[no-any-return]


class Heard(nn.Module):
    """Stands in the place of an activation that is a plain function, so that what it gives can be listened to.

    Args:
        function: the activation.
    """

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        out: Tensor = self.function(x)
        return out

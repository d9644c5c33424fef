"""A batch on its way through the blocks of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from gateplug.core.batches import rows_of

if TYPE_CHECKING:
    from gateplug.early_exit.stages import Stages


class Flow:
    """Where a batch is, and what goes with it.

    Args:
        stages: of the network.
        hidden: what the first block is called with first.
        rest: its other arguments, by place.
        named: and by name.
        args: arguments of the network.
        kwargs: and by name.
    """

    def __init__(
        self,
        stages: Stages,
        hidden: Tensor,
        rest: tuple[Any, ...],
        named: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.stages, self.hidden = stages, hidden
        paths, self.form = tree_flatten_with_path((rest, named))
        self.beside = [value for _, value in paths]
        """What a block is called with beside the hidden tensor, part by part."""
        self._call = (rest, named)
        self._names = ["".join(str(getattr(key, "key", "")) for key in path) for path, _ in paths]
        self.args, self.kwargs = args, kwargs
        self.size = len(hidden)
        self.next = 0
        self.gave: list[int | None] = []
        """What each block that was run gives beside the hidden tensor: how many values, None where it gives the tensor alone."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.hidden.device

    @property
    def follows(self) -> list[bool]:
        """Of each part of `beside`, whether it follows the rows.

        Never by the length alone: a mask (S, S) with as many tokens as there are samples is of all of them. In the families,
        masks (B, 1, S, S) and position_ids (B, S) are of the samples.
        """
        if self.stages.follow is not None:
            return [i in self.stages.follow for i in range(len(self.beside))]
        tensors = [value if isinstance(value, Tensor) else None for value in self.beside]
        rows = len(self.hidden)
        return [
            value is not None and (value.dim() == 4 or name == "position_ids") and len(value) == rows
            for name, value in zip(self._names, tensors, strict=True)
        ]

    def block(self, i: int) -> None:
        """Run block i."""
        rest, named = self._call
        out = self.stages.layers[i](self.hidden, *rest, **named)
        self.gave.append(None if isinstance(out, Tensor) else len(out) - 1)
        self.hidden = out if isinstance(out, Tensor) else out[0]
        self.next = i + 1

    def keep(self, stay: Tensor) -> None:
        """Go on with some of the rows."""
        self.beside = [value[stay] if cut else value for value, cut in zip(self.beside, self.follows, strict=True)]
        self._call = tree_unflatten(self.beside, self.form)
        self.hidden = self.hidden[stay]
        if self.stages.end is None and not self.stages.sequential:
            self.args, self.kwargs = rows_of((self.args, self.kwargs), stay, len(stay))
        if self.stages.places is not None:
            self.stages.place(self.stages.places[stay])

    def end(self) -> Any:
        """Run the blocks that are left and what comes after them, on the rows that are left."""
        stages = self.stages
        if stages.sequential or stages.end is not None:
            while self.next < len(stages.layers):
                self.block(self.next)
            return self.hidden if stages.end is None else stages.end(stages.net, self.hidden, stages.places)
        # the network once more, on the inputs of these rows, with the blocks that were run giving what they gave
        numbers = range(self.next)
        given = [Given(self.hidden if i == self.next - 1 else None, self.gave[i]) for i in numbers]
        with standing_in(stages.layers[: self.next], given):
            return stages.net(*self.args, **self.kwargs)


class Given:
    """Stands in for the forward of a block that was run already.

    Args:
        hidden: what it gave; None: it gives what it is called with.
        beside: how many values it gives beside that, None for the tensor alone.
    """

    def __init__(self, hidden: Tensor | None, beside: int | None) -> None:
        self.hidden, self.beside = hidden, beside

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Give it."""
        given = hidden if self.hidden is None else self.hidden
        return given if self.beside is None else (given, *[None] * self.beside)


@contextmanager
def standing_in(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some layers."""
    own = [(layer, layer.__dict__.get("forward")) for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, before in own:
            del layer.__dict__["forward"]
            if before is not None:
                layer.__dict__["forward"] = before

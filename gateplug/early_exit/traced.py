"""Stages of a network as modules that torch.export follows: without hooks, and without an exception on the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from gateplug.core.batches import logits_of
from gateplug.early_exit.branch import Reading, last_places
from gateplug.early_exit.flow import Given, standing_in
from gateplug.early_exit.stages import Stages


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of a call, in one order whatever the order of its keywords."""
    paths, _ = tree_flatten_with_path((args, dict(sorted(kwargs.items()))))
    found = [(path, value) for path, value in paths if isinstance(value, Tensor)]
    names = [".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path[1:]) for path, _ in found]
    return names, [value for _, value in found]


class _Called(nn.Module):
    """A network that is called with an example's arguments, its tensors replaced."""

    def __init__(self, stages: Stages, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.net = stages.net
        self._stages = stages
        more = {"use_cache": False} if stages.stack.reads == "last" else {}
        paths, self._form = tree_flatten_with_path((args, dict(sorted({**kwargs, **more}.items()))))
        self._fixed = [None if isinstance(value, Tensor) else value for _, value in paths]
        self._taken = [isinstance(value, Tensor) for _, value in paths]

    def call(self, tensors: tuple[Tensor, ...]) -> Any:
        """Run it."""
        given = iter(tensors)
        values = [next(given) if taken else fixed for fixed, taken in zip(self._fixed, self._taken, strict=True)]
        args, kwargs = tree_unflatten(values, self._form)
        return self.net(*args, **kwargs)


class Start(_Called):
    """Inputs -> the first block's hidden tensor, the tensors beside it, and the places of the last tokens where they are read."""

    def __init__(self, stages: Stages, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(stages, args, kwargs)
        told: list[list[bool]] = []
        self._tell = told.append  # torch.export puts attributes back as they were
        self._told = told.pop
        self._ids = names.index("input_ids") if stages.stack.reads == "last" else None

    def told(self) -> list[bool]:
        """After a run: of what the first block is called with beside the hidden tensor, which parts are tensors.

        A mask that a network leaves out where it hides nothing is there in a program, which must serve for other batches.
        """
        return self._told()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the whole network and return what its first block is called with: of no use for that is what comes after."""
        caught: list[tuple[Any, ...]] = []
        block = self._stages.layers[0]
        run = block.forward

        def first(hidden: Tensor, *rest: Any, **named: Any) -> Any:
            beside = [value for _, value in tree_flatten_with_path((rest, named))[0]]
            self._tell([isinstance(value, Tensor) for value in beside])
            caught.append((hidden, [value for value in beside if isinstance(value, Tensor)]))
            return run(hidden, *rest, **named)

        with standing_in([block], [first]):
            self.call(tensors)
        hidden, beside = caught[0]
        if self._ids is None:
            return hidden, *beside
        return hidden, *beside, last_places((tensors[self._ids],), {}, self.net.config.pad_token_id)  # type: ignore[union-attr, arg-type]


class Part(nn.Module):
    """Hidden tensor, those beside it -> hidden tensor after some blocks, and logits and gate of the exit there."""

    def __init__(self, stages: Stages, beside: Beside, first: int, last: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(stages.layers[first : last + 1])
        self.branch = stages.branches[last]
        self._beside = beside
        self._last = stages.stack.reads == "last"

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run them."""
        hidden, *tensors = given
        hidden = run_blocks(self.blocks, hidden, self._beside, tensors)
        if isinstance(self.branch.reading, Reading):
            self.branch.reading.places = tensors[-1] if self._last else None
        z = self.branch.answer(hidden)
        return hidden, z, self.branch.gate(z)


class Ending(_Called):
    """Hidden tensor, those beside it -> logits; a network of no known family takes its inputs as well."""

    def __init__(
        self,
        stages: Stages,
        beside: Beside,
        gave: int | None,
        first: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__(stages, args, kwargs)
        self.alone = stages.sequential or stages.end is not None
        self.blocks = nn.ModuleList(stages.layers[first:])
        self._beside, self._gave = beside, gave
        self._number = sum(beside.tensors) + (stages.stack.reads == "last")

    def forward(self, *given: Tensor) -> Tensor:
        """Run what is left."""
        hidden, *tensors = given
        beside = tensors[: self._number]
        hidden = run_blocks(self.blocks, hidden, self._beside, beside)
        if self._stages.sequential:
            return hidden
        if self._stages.end is not None:
            return self._stages.end(self.net, hidden, beside[-1] if self._stages.stack.reads == "last" else None)
        layers = self._stages.layers
        with standing_in(layers, [Given(hidden, self._gave), *[Given(None, self._gave)] * (len(layers) - 1)]):
            return logits_of(self.call(tuple(tensors[self._number :])))


class Beside(NamedTuple):
    """What a block is called with beside the hidden tensor."""

    fixed: list[Any]
    """Part by part; where it is a tensor, any value."""
    tensors: list[bool]
    form: Any
    """Of the arguments (by place, by name)."""


def run_blocks(blocks: nn.ModuleList, hidden: Tensor, beside: Beside, tensors: Sequence[Tensor]) -> Tensor:
    """Run blocks one after the other, the tensors of what they are called with replaced."""
    given = iter(tensors)
    values = [next(given) if tensor else fixed for fixed, tensor in zip(beside.fixed, beside.tensors, strict=True)]
    rest, named = tree_unflatten(values, beside.form)
    for block in blocks:
        out = block(hidden, *rest, **named)
        hidden = out if isinstance(out, Tensor) else out[0]
    return hidden

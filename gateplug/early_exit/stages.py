"""A network block by block: what comes before the first, what each is called with, and what comes after the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gateplug.core.errors import PlugError
from gateplug.early_exit.branch import ExitBranch, Reading, last_places
from gateplug.early_exit.stacks import Stack, find_stack


class _Reached(Exception):  # no error: the way out of a forward at the first block
    pass


class Stages:
    """The parts of a network with exits.

    Args:
        net: the network.
        stack: its blocks, in order.
        layers: the blocks themselves.
        branches: exits by the number of their block.
    """

    def __init__(self, net: nn.Module, stack: Stack, layers: list[nn.Module], branches: Mapping[int, ExitBranch]) -> None:
        self.net, self.stack, self.layers, self.branches = net, stack, layers, dict(branches)
        self.sequential = type(net) is nn.Sequential
        self._checked = self.sequential or stack.reads != "any"

    @property
    def blocks(self) -> int:
        """How many blocks are run one by one: up to the last exit."""
        return max(self.branches) + 1

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        """Run what comes before the first block.

        Raises:
            PlugError: the network does not call its first block with one hidden tensor first.
        """
        if self.sequential:
            given = [*args, *kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], Tensor):
                raise PlugError(f"an nn.Sequential takes one tensor, got {len(args)} arguments and {sorted(kwargs)}")
            return Flow(self, given[0], (), {}, args, kwargs)
        if self.stack.reads == "last":  # a cache would hold the keys of samples that have left
            kwargs = {**kwargs, "use_cache": False}
            self.place(last_places(args, kwargs, self.net.config.pad_token_id))  # type: ignore[union-attr, arg-type]
        if not self._checked:
            self._check_chain(args, kwargs)
            self._checked = True
        reached: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(block: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> None:
            reached.append((a, k))
            raise _Reached

        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.net(*args, **kwargs)
        except _Reached:
            pass
        finally:
            handle.remove()
        if not reached or not reached[0][0] or not isinstance(reached[0][0][0], Tensor):
            raise PlugError(
                f"{type(self.net).__name__} cannot be run block by block: its first block {self.stack.blocks[0]} is "
                f"{'not called' if not reached else 'not called with a hidden tensor first'}. Name other blocks with at=[…]"
            )
        (hidden, *rest), k = reached[0]
        return Flow(self, hidden, tuple(rest), k, args, kwargs)

    def place(self, places: Tensor | None) -> None:
        """Tell exits that read the last token where it is."""
        for branch in self.branches.values():
            if isinstance(branch.reading, Reading):
                branch.reading.places = places

    def _check_chain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a network of somebody's own once, and see that each block is called, once, with what the one before it gave.

        Raises:
            PlugError: it is not so: what lies between two blocks would be left out.
        """
        seen: list[tuple[str, Any]] = []
        handles = []
        for name, layer in zip(self.stack.blocks, self.layers, strict=True):
            handles.append(layer.register_forward_pre_hook(lambda _, a, n=name: seen.append((n, a[0] if a else None))))
            handles.append(layer.register_forward_hook(lambda _, a, out, n=name: seen.append((n, out))))
        try:
            self.net(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if [name for name, _ in seen] != [name for name in self.stack.blocks for _ in range(2)]:
            raise PlugError(f"{type(self.net).__name__} does not run its blocks one after the other, each once: {self._advice()}")
        for (before, gave), (after, into) in zip(seen[1::2], seen[2::2], strict=False):
            out = gave if isinstance(gave, Tensor) else gave[0]
            if not isinstance(into, Tensor) or into.shape != out.shape or not torch.equal(into, out):
                raise PlugError(f"{type(self.net).__name__} does something between {before} and {after}: {self._advice()}")

    def _advice(self) -> str:
        return (
            "samples that leave between blocks cannot be left out of what is not in a block. Put it into the blocks' forward (a "
            "residual, a norm), or train with EarlyExit and run the whole network"
        )


class Flow:
    """A batch on its way."""

    def __init__(
        self,
        stages: Stages,
        hidden: Tensor,
        rest: tuple[Any, ...],
        named: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.stages, self.hidden, self.rest, self.named = stages, hidden, rest, named
        self.args, self.kwargs = args, kwargs
        self.size = len(hidden)
        self.next = 0
        self.beside: list[int | None] = []
        """What each block that was run gives beside the hidden tensor: how many values, None where it gives the tensor alone."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.hidden.device

    def block(self, i: int) -> None:
        """Run block i."""
        out = self.stages.layers[i](self.hidden, *self.rest, **self.named)
        self.beside.append(None if isinstance(out, Tensor) else len(out) - 1)
        self.hidden = out if isinstance(out, Tensor) else out[0]
        self.next = i + 1

    def keep(self, stay: Tensor) -> None:
        """Go on with some of the rows."""
        before = len(stay)
        self.hidden = self.hidden[stay]
        self.rest = tuple(_rows("", value, stay) for value in self.rest)
        self.named = {key: _rows(key, value, stay) for key, value in self.named.items()}
        self.args = tuple(_inputs(value, stay, before) for value in self.args)
        self.kwargs = {key: _inputs(value, stay, before) for key, value in self.kwargs.items()}
        reading = next(iter(self.stages.branches.values())).reading
        if isinstance(reading, Reading) and reading.places is not None:
            self.stages.place(reading.places[stay])

    def end(self) -> Any:
        """Run the blocks that are left and what comes after them, on the rows that are left."""
        if self.stages.sequential:
            for layer in self.stages.layers[self.next :]:
                self.hidden = layer(self.hidden)
            return self.hidden
        # the network once more, on the inputs of these rows, with the blocks that were run giving what they gave
        own = [(layer, layer.__dict__.get("forward")) for layer in self.stages.layers[: self.next]]
        for i, (layer, _) in enumerate(own):
            layer.__dict__["forward"] = _Given(self.hidden if i == self.next - 1 else None, self.beside[i])
        try:
            return self.stages.net(*self.args, **self.kwargs)
        finally:
            for layer, forward in own:
                del layer.__dict__["forward"]
                if forward is not None:
                    layer.__dict__["forward"] = forward


class _Given:
    """Stands in for the forward of a block that was run already."""

    def __init__(self, hidden: Tensor | None, beside: int | None) -> None:
        self.hidden, self.beside = hidden, beside

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = hidden if self.hidden is None else self.hidden
        return given if self.beside is None else (given, *[None] * self.beside)


def stages_of(module: nn.Module) -> Stages:
    """The stages of a module with exits."""
    stack = find_stack(module)
    layers = [module.get_submodule(name) for name in stack.blocks]
    branches = {}
    for i, layer in enumerate(layers):
        found = [child for child in layer.children() if isinstance(child, ExitBranch)]
        if found:
            branches[i] = found[0]
    return Stages(module.get_submodule(stack.net), stack, layers, branches)


def _rows(name: str, value: Any, stay: Tensor) -> Any:
    """An argument of a block for the rows that stay: of masks (B, 1, S, S) and position_ids (B, S) the samples' own part.

    Never by the length alone: a mask (S, S) with as many tokens as there are samples is of all of them.
    """
    if isinstance(value, Tensor) and (value.dim() == 4 or name == "position_ids") and len(value) == len(stay):
        return value[stay]
    return value


def _inputs(value: Any, stay: Tensor, before: int) -> Any:
    if isinstance(value, Tensor):
        return value[stay] if value.dim() and len(value) == before else value
    if isinstance(value, Mapping):
        return {key: _inputs(item, stay, before) for key, item in value.items()}
    return value

"""A network block by block: what comes before the first, what each is called with, and what comes after the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from gateplug.core.batches import Call, holds_rows, logits_of, rows_of
from gateplug.core.errors import PlugError
from gateplug.early_exit.branch import ExitBranch, Reading, last_places
from gateplug.early_exit.flow import Flow
from gateplug.early_exit.stacks import Stack, find_stack


class _Reached(Exception):  # no error: the way out of a forward at the first block
    pass


class Stages:
    """The parts of a network with exits.

    A known family is run by its own layers. Of any other network the first batch tells how it is run: each block must be called
    once, with what the one before it gave; what follows the rows of the batch is seen on half of them, and the answers for that
    half must be those of the whole network.

    Args:
        net: the network.
        stack: its blocks, in order.
        layers: the blocks themselves.
        branches: exits by the number of their block.
    """

    def __init__(self, net: nn.Module, stack: Stack, layers: list[nn.Module], branches: Mapping[int, ExitBranch]) -> None:
        self.net, self.stack, self.layers, self.branches = net, stack, layers, dict(branches)
        self.sequential = type(net) is nn.Sequential
        self.end = stack.end
        """How the network ends, by its own layers; None: it is run again with what its blocks gave."""
        self.follow: set[int] | None = None
        """Which parts of :attr:`Flow.beside` follow the rows; None: by the rules of the families."""
        self.places: Tensor | None = None
        """(B,) of the last tokens, in the families that read them."""
        self._checked = self.sequential
        self._learned = self.sequential or stack.reads != "any"

    @property
    def blocks(self) -> int:
        """How many blocks are run one by one: up to the last exit."""
        return max(self.branches) + 1

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        """Run what comes before the first block.

        Raises:
            PlugError: the network does not call its first block with one hidden tensor first, or cannot be run by blocks.
        """
        if self.sequential:
            given = [*args, *kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], Tensor):
                raise PlugError(f"an nn.Sequential takes one tensor, got {len(args)} arguments and {sorted(kwargs)}")
            return Flow(self, given[0], (), {}, args, kwargs)
        if self.stack.reads == "last":  # a cache would hold the keys of samples that have left
            kwargs = {**kwargs, "use_cache": False}
            self.place(last_places(args, kwargs, self.net.config.pad_token_id))  # type: ignore[union-attr, arg-type]
        flow = self._enter(args, kwargs)
        if not self._checked and self.stack.reads != "any":
            self._checked = True
            self._check_end(flow)
        elif not self._checked or (not self._learned and flow.size > 1):  # of one sample, nobody is left alone
            want = self._check_chain(args, kwargs)
            self._checked = True
            if flow.size > 1:
                self._learn(flow, want)
        else:
            return flow
        return self._enter(args, kwargs)

    def place(self, places: Tensor | None) -> None:
        """Where the last token of each row is, for exits that read it."""
        self.places = places
        for branch in self.branches.values():
            if isinstance(branch.reading, Reading):
                branch.reading.places = places

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        """Up to the call of the first block."""
        reached: list[Call] = []

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

    def _check_end(self, flow: Flow) -> None:
        """Of a known family: the end by its own layers must give what the network gives; else it is not used."""
        want = logits_of(self.net(*flow.args, **flow.kwargs))
        while flow.next < len(self.layers):
            flow.block(flow.next)
        if not _equal(logits_of(flow.end()), want, flow.hidden):
            self.end = None
            rank_zero_warn(
                f"ExitRunner: {type(self.net).__name__} does not end as others of its class (something was added to it), so for "
                "samples that do not leave it is run once more with its blocks left out: what comes before them is paid twice"
            )

    # ------------------------------------------------------------------ networks of somebody's own

    def _learn(self, flow: Flow, want: Tensor) -> None:
        """Run half of the rows, see what follows them, and compare with what the whole network gives.

        Raises:
            PlugError: the network cannot be run by blocks.
        """
        stay = torch.arange(flow.size, device=flow.device) < flow.size // 2
        inputs = rows_of((flow.args, flow.kwargs), stay, flow.size)
        cut = [f"argument {i}" for i, value in enumerate(flow.args) if holds_rows(value, flow.size)]
        cut += [repr(name) for name, value in flow.kwargs.items() if holds_rows(value, flow.size)]
        try:
            half = self._enter(*inputs)
            pairs = enumerate(zip(flow.beside, half.beside, strict=True))
            self.follow = {i for i, (whole, part) in pairs if _follows(whole, part, flow.size)}
            flow.block(0)
            flow.keep(stay)
            while flow.next < len(self.layers):
                flow.block(flow.next)
            got = logits_of(flow.end())
        except (RuntimeError, IndexError, ValueError) as error:
            raise PlugError(self._lost(cut, f"fails on some of the rows of a batch: {error}")) from error
        if not _equal(got, want[stay], flow.hidden):
            raise PlugError(self._lost(cut, "answers otherwise for some of the rows of a batch than for all of them"))
        self._learned = True

    def _lost(self, cut: list[str], what: str) -> str:
        return (
            f"{type(self.net).__name__} {what}. What has as many rows as there are samples was cut: {', '.join(cut)}. Give "
            "what belongs to all samples another form (a buffer, or a dimension of 1 first), and let no sample depend on another"
        )

    def _check_chain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the network once, and see that each block is called, once, with what the one before it gave; its logits.

        Raises:
            PlugError: it is not so: what lies between two blocks would be left out.
        """
        seen: list[tuple[str, Any]] = []
        handles = []
        for name, layer in zip(self.stack.blocks, self.layers, strict=True):
            handles.append(layer.register_forward_pre_hook(lambda _, a, n=name: seen.append((n, a[0] if a else None))))
            handles.append(layer.register_forward_hook(lambda _, a, out, n=name: seen.append((n, out))))
        try:
            out = self.net(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if [name for name, _ in seen] != [name for name in self.stack.blocks for _ in range(2)]:
            raise PlugError(f"{type(self.net).__name__} does not run its blocks one after the other, each once: {_ADVICE}")
        for (before, gave), (after, into) in zip(seen[1::2], seen[2::2], strict=False):
            given = gave if isinstance(gave, Tensor) else gave[0]
            if not isinstance(into, Tensor) or into.shape != given.shape or not torch.equal(into, given):
                raise PlugError(f"{type(self.net).__name__} does something between {before} and {after}: {_ADVICE}")
        return logits_of(out)


_ADVICE = (
    "samples that leave between blocks cannot be left out of what is not in a block. Put it into the blocks' forward (a "
    "residual, a norm), or train with EarlyExit and run the whole network"
)


def stages_of(module: nn.Module, classes: int | None = None) -> Stages:
    """The stages of a module with exits; `classes` as of :func:`find_stack`."""
    stack = find_stack(module, classes)
    layers = [module.get_submodule(name) for name in stack.blocks]
    branches = {}
    for i, layer in enumerate(layers):
        found = [child for child in layer.children() if isinstance(child, ExitBranch)]
        if found:
            branches[i] = found[0]
    return Stages(module.get_submodule(stack.net), stack, layers, branches)


def _follows(whole: Any, part: Any, rows: int) -> bool:
    if not isinstance(whole, Tensor) or not isinstance(part, Tensor) or not whole.dim() or whole.dim() != part.dim():
        return False
    return len(whole) == rows and len(part) == rows // 2


def _equal(a: Tensor, b: Tensor, hidden: Tensor) -> bool:
    """Whether logits are the same up to rounding, which in half precision is coarse."""
    near = 8 * torch.finfo(hidden.dtype).eps
    size = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=max(1e-3, near), atol=max(1e-4, near) * size)

"""From a folded network and its exits to a runner without hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from gateplug.core.gate import Folded
from gateplug.early_exit.branch import ExitBranch, Reading
from gateplug.early_exit.runner import ExitRunner
from gateplug.early_exit.stacks import Stack, find_stack
from gateplug.early_exit.stages import Stages


def plain_runner(network: nn.Module, original: nn.Module, exits: Sequence[Folded]) -> ExitRunner:
    """A runner of a plain network, with its exits beside it.

    Args:
        network: folded.
        original: the module with exits that it was made of.
        exits: taken off it.
    """
    arguments = exits[0].arguments
    stack = find_stack(original, arguments["classes"])
    numbers = [stack.block_of(part.layer) for part in exits]
    found = _within(network, stack)
    branches = {}
    for number, part in sorted(zip(numbers, exits, strict=True), key=lambda pair: pair[0]):
        assert isinstance(part.gate, ExitBranch)
        if isinstance(part.gate.reading, Reading):  # its norm may have been folded, too
            part.gate.reading = Reading(found.reads, network.get_submodule(found.through) if found.through else None)
        branches[number] = part.gate
    layers = [network.get_submodule(name) for name in found.blocks]
    stages = Stages(network.get_submodule(found.net), found, layers, branches)
    return ExitRunner.of_stages(stages, str(arguments["gate"]), str(arguments["mode"]))


def _within(network: nn.Module, stack: Stack) -> Stack:
    """The stack, by its names in the folded network: the module around it may be gone."""
    if _has(network, stack):
        return stack
    prefix = f"{stack.net}."
    names = [name.removeprefix(prefix) for name in (*stack.blocks, stack.through)]
    return replace(stack, net="", blocks=tuple(names[:-1]), through=names[-1])


def _has(network: nn.Module, stack: Stack) -> bool:
    try:
        network.get_submodule(stack.blocks[0])
    except AttributeError:
        return False
    return True

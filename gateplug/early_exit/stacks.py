"""Where a network can be left: its stack of blocks, what an exit reads of a block's output, and how many classes there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gateplug.core.errors import PlugError, listed
from gateplug.core.gate import Foldable
from gateplug.early_exit import ends

Widths = Callable[[Any, int], int]


@dataclass(frozen=True)
class Family:
    """A row of the table: how a model of the transformers library is laid out."""

    blocks: tuple[str, ...]
    """Where its list of blocks may be, newest release first."""
    reads: str
    """`token`: the first token; `last`: the last one that is no padding; `maps`: feature maps through the model's own pooler."""
    through: str = ""
    """A module of the model's own that every exit goes through: its last norm, or its pooler."""
    end: ends.End | None = None
    """What comes after the last block."""
    widths: Widths = lambda config, block: int(config.hidden_size)
    """Width of what an exit reads of a block."""


FAMILIES: dict[str, Family] = {
    "ViTForImageClassification": Family(("vit.layers", "vit.encoder.layer"), "token", "vit.layernorm", ends.vit),
    "DeiTForImageClassification": Family(("deit.layers", "deit.encoder.layer"), "token", "deit.layernorm", ends.deit),
    "DeiTForImageClassificationWithTeacher": Family(
        ("deit.layers", "deit.encoder.layer"), "token", "deit.layernorm", ends.deit_with_teacher
    ),
    "BertForSequenceClassification": Family(("bert.encoder.layer",), "token", end=ends.bert),
    "RobertaForSequenceClassification": Family(("roberta.encoder.layer",), "token", end=ends.roberta),
    "DistilBertForSequenceClassification": Family(
        ("distilbert.transformer.layer",), "token", end=ends.distilbert, widths=lambda config, block: int(config.dim)
    ),
    "GPT2ForSequenceClassification": Family(("transformer.h",), "last", "transformer.ln_f", ends.gpt2),
    "ResNetForImageClassification": Family(
        ("resnet.encoder.stages",), "maps", "resnet.pooler", ends.resnet, lambda config, block: int(config.hidden_sizes[block])
    ),
}


@dataclass(frozen=True)
class Stack:
    """The blocks of a network in the order in which they run."""

    net: str
    """Name of the network whose output are the logits; empty for the module itself."""
    blocks: tuple[str, ...]
    reads: str
    through: str
    widths: tuple[int | None, ...]
    """Of each block; None where the structure does not tell."""
    classes: int
    end: ends.End | None = None
    """What comes after the last block, where the family is known."""

    def block_of(self, name: str) -> int:
        """The number of a block, by its name."""
        return self.blocks.index(name)


def find_stack(module: nn.Module, classes: int | None = None) -> Stack:
    """The stack of `module`: a known family, the children of the `nn.Sequential` that is its network, a `ModuleList` of blocks.

    Args:
        module: a network, or a LightningModule with one.
        classes: of the network, where its structure does not tell.

    Raises:
        PlugError: there is none, or the network does not classify; says what was looked at.
    """
    net = _network(module)
    for name, m in module.named_modules():
        if (family := FAMILIES.get(type(m).__name__)) is not None:
            return _of_family(name, m, family)
    name, m = net
    if type(m) is nn.Sequential:
        return _of_children(name, m, [_join(name, child) for child, _ in m.named_children()], classes)
    for path, holder in m.named_modules():
        blocks = list(holder.named_children()) if isinstance(holder, nn.ModuleList) else []
        if len(blocks) > 1 and len({type(block) for _, block in blocks}) == 1:
            return _of_children(name, m, [_join(name, path, child) for child, _ in blocks], classes)
    raise PlugError(
        "EarlyExit finds no stack of blocks: the network is no nn.Sequential, holds no nn.ModuleList of two blocks of one class, "
        f"and is none of {listed(FAMILIES)}. There are: {listed(_names(m))}"
    )


def _network(module: nn.Module) -> tuple[str, nn.Module]:
    """The network: the only child of a LightningModule that holds parameters, or the module itself."""
    if hasattr(module, "training_step"):
        holders = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
        if len(holders) == 1:
            return holders[0]
    return "", module


def _of_family(name: str, model: nn.Module, family: Family) -> Stack:
    config: Any = model.config
    classes = int(config.num_labels)
    if classes < 2 or getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise PlugError(
            f"{type(model).__name__} has num_labels={classes}, problem_type={getattr(config, 'problem_type', None)!r}: EarlyExit "
            "is for classification with one label of two classes or more; a number has no confidence to leave by"
        )
    for path in family.blocks:
        try:
            holder = model.get_submodule(path)
        except AttributeError:
            continue
        blocks = tuple(_join(name, path, child) for child, _ in holder.named_children())
        if len(blocks) < 2:
            raise PlugError(f"{type(model).__name__} has {len(blocks)} block: an exit needs a block after it")
        widths = tuple(family.widths(config, i) for i in range(len(blocks)))
        return Stack(
            name, blocks, family.reads, _join(name, family.through) if family.through else "", widths, classes, family.end
        )
    raise PlugError(f"{type(model).__name__} holds its blocks at none of {listed(family.blocks)}: name them with at=[…]")


def _of_children(name: str, net: nn.Module, blocks: Sequence[str], classes: int | None) -> Stack:
    if len(blocks) < 2:
        raise PlugError(f"{name or 'the network'} has {len(blocks)} layer: an exit needs a layer after it")
    inside = [net.get_submodule(block.removeprefix(f"{name}.") if name else block) for block in blocks]
    classes = _classes(net, inside) if classes is None else classes
    if classes < 2:
        raise PlugError(
            f"{name or 'the network'} gives {classes} outputs by its last Linear layer: EarlyExit is for classification into two "
            "classes or more. Give classes=… if that is not what it returns"
        )
    widths = tuple(_width_after(inside, i) for i in range(len(inside)))
    return Stack(name, tuple(blocks), "any", "", widths, classes)


def _classes(net: nn.Module, blocks: Sequence[nn.Module]) -> int:
    """Outputs of the last Linear layer in no gate or mixture: of one outside of the blocks if there is one; 0 where none is."""
    gates = {m for part in net.modules() if isinstance(part, Foldable) for m in part.modules()}
    linear = [m for m in net.modules() if isinstance(m, nn.Linear) and m not in gates]
    inside = {m for block in blocks for m in block.modules()}
    # a head may be registered before the blocks
    last = ([m for m in linear if m not in inside] or linear)[-1:]
    return last[0].out_features if last else 0


def _width_after(children: Sequence[nn.Module], block: int) -> int | None:
    """Features (the last dimension of rows and tokens, channels of maps) of the output of a child, from the layers up to it."""
    for child in reversed(list(children[: block + 1])):
        for m in reversed(list(child.modules())):
            if isinstance(m, nn.Flatten):
                return None
            for attribute in ("out_features", "out_channels", "num_features", "num_channels"):
                if isinstance(getattr(m, attribute, None), int):
                    return int(getattr(m, attribute))
            if isinstance(m, nn.LayerNorm):
                return int(m.normalized_shape[-1])
    return None


def chosen_blocks(stack: Stack, at: Iterable[str] | int | None) -> list[str]:
    """Names of the blocks that get an exit, in order; the last block has the network's own head.

    Args:
        stack: of the network.
        at: names; a number n for the blocks n − 1, 2n − 1, …; None for all.

    Raises:
        PlugError: a name that is no block, names out of order, the last block, or a step longer than the stack.
    """
    inner = list(stack.blocks[:-1])
    if at is None:
        return inner
    if isinstance(at, int):
        found = inner[at - 1 :: at]
        if not found:
            raise PlugError(f"at={at} puts the first exit after block {at}, and there are {len(stack.blocks)} blocks")
        return found
    names = list(at)
    unknown = [name for name in names if name not in stack.blocks]
    if unknown:
        raise PlugError(f"at names {listed(unknown)}, which are no blocks of the stack. Blocks are: {listed(stack.blocks)}")
    if stack.blocks[-1] in names:
        raise PlugError(f"at names the last block, {stack.blocks[-1]}: there the network has its own head. Leave it out")
    if names != sorted(set(names), key=stack.block_of):
        raise PlugError(f"at={names} must name blocks in the order in which they run, each once: {listed(stack.blocks)}")
    return names


def blocks_of(stack: Stack, module: nn.Module) -> Mapping[str, nn.Module]:
    """The blocks by name."""
    return {name: module.get_submodule(name) for name in stack.blocks}


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _names(module: nn.Module) -> list[str]:
    return [f"{name} ({type(m).__name__})" for name, m in module.named_modules() if name and list(m.children())]

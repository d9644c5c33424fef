"""Find the feed-forwards of a model: by structure, and confirmed by running them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gateplug.core.activations import ATTRIBUTES, activation_name, is_activation
from gateplug.core.cost import ordinary_attention, still
from gateplug.core.edit import Edit, Replace, SetAttribute


@dataclass(frozen=True)
class FeedForward:
    """A block first → activation → second of a model, with the names of its parts."""

    holder: str
    """The module that holds the activation."""
    attribute: str
    """Under which name it does."""
    first: str
    second: str
    dim: int
    hidden: int
    out: int
    activation: str | None
    """The function's name, None if it is none of the known ones."""

    @property
    def slot(self) -> str:
        """Full name of the activation."""
        return f"{self.holder}.{self.attribute}" if self.holder else self.attribute


def replace_activation(root: nn.Module, block: FeedForward, new: nn.Module) -> Edit:
    """Edit that puts `new` in the place of a block's activation, a module or a function, and of no other."""
    if block.attribute in root.get_submodule(block.holder)._modules:
        return Replace(block.slot, new, everywhere=False)
    return SetAttribute(block.holder, block.attribute, new)


def sizes(block: FeedForward) -> str:
    """`64→256→64`."""
    return f"{block.dim}→{block.hidden}→{block.out}"


def widths(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of an `nn.Linear` or of Hugging Face's Conv1D, whose weight is (in, out)."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense layer in one of the two forms that models use."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def find(module: nn.Module) -> tuple[list[FeedForward], list[str]]:
    """All feed-forwards of `module`, in order, and in words the pairs that were looked at and left.

    A candidate is a dense layer d→h beside an activation, with a dense layer from h in the same module or next to it. It is
    confirmed by a run of the smallest module around it on a small random input, in eval mode and without gradient: the
    activation must receive what the first layer gave, and the second layer what the activation gave. Forward hooks that
    somebody has put on these layers run along.
    """
    found: list[FeedForward] = []
    rejected: dict[str, tuple[str, str]] = {}
    used: set[str] = set()
    for block in _candidates(module):
        if block.first in used or block.slot in used:
            continue
        why = _run(module, block)
        if why is None:
            found.append(block)
            used |= {block.first, block.slot}
        else:
            text = f"{block.first} → {block.attribute} → {block.second} ({why})"
            rejected.setdefault(block.first, (block.slot, text))
    return found, [text for first, (slot, text) in rejected.items() if not {first, slot} & used]


def _candidates(module: nn.Module) -> Iterator[FeedForward]:
    for holder, layer in module.named_modules():
        firsts = [(n, m) for n, m in layer.named_children() if is_linear(m)]
        acts = _activations(layer)
        if not firsts or not acts:
            continue
        parent = holder.rpartition(".")[0]
        near = [(f"{holder}.{n}" if holder else n, m) for n, m in firsts]
        around = [] if not holder else _next_to(module.get_submodule(parent), parent, holder)
        for i, (name, first) in enumerate(near):
            d, h = widths(first)
            # of two layers in one module, the second is the one that was built later
            seconds = [(n, m) for n, m in near[i + 1 :] + around if widths(m)[0] == h]
            for attribute, activation in acts:
                for second_name, second in seconds:
                    out = widths(second)[1]
                    yield FeedForward(holder, attribute, name, second_name, d, h, out, activation_name(activation))


def _activations(layer: nn.Module) -> list[tuple[str, Any]]:
    # not named_children, which gives an instance that stands twice only once
    children = [(n, m) for n, m in layer._modules.items() if m is not None and is_activation(m)]
    functions = [(n, layer.__dict__[n]) for n in ATTRIBUTES if callable(layer.__dict__.get(n))]
    named = [(n, m) for n, m in layer._modules.items() if n in ATTRIBUTES and m is not None and not is_linear(m)]
    return list({n: (n, m) for n, m in children + functions + named}.values())


def _next_to(parent: nn.Module, name: str, holder: str) -> list[tuple[str, nn.Module]]:
    """Dense layers of the parent and of the holder's siblings: BERT keeps its second one in `output`."""
    if isinstance(parent, nn.ModuleList | nn.ModuleDict):
        return []
    prefix = f"{name}." if name else ""
    pairs = [(f"{prefix}{n}", m) for n, m in parent.named_children() if f"{prefix}{n}" != holder]
    inner = [(f"{n}.{k}", c) for n, m in pairs for k, c in m.named_children()]
    return [(n, m) for n, m in pairs + inner if is_linear(m)]


class _Witness(nn.Module):
    """Stands in for an activation and remembers what came in and what went out."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        self.seen = (x, out)
        return out


def _run(root: nn.Module, block: FeedForward) -> str | None:
    """Why a candidate is no feed-forward, or None if it is one."""
    holder, first = root.get_submodule(block.holder), root.get_submodule(block.first)
    second = root.get_submodule(block.second)
    weight = first.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return "its weights are on the meta device and cannot be run: attach after they are made, e.g. in configure_model"
    for layer in (first, second):
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            return f"a {type(layer).__name__} is more than a linear layer, and would be lost"
    original = getattr(holder, block.attribute)
    witness = _Witness(original)
    seen: dict[str, Tensor] = {}
    hooks = [
        first.register_forward_hook(lambda m, a, out: seen.__setitem__("first", out)),
        second.register_forward_pre_hook(lambda m, a: seen.__setitem__("second", a[0])),
    ]
    ran = False
    _set(holder, block.attribute, witness)
    try:
        around = surroundings(root, holder, block)
        with still(around), ordinary_attention():
            for example in examples(block.dim, weight):
                seen.clear()
                witness.seen = None
                try:
                    around(*example)
                except Exception:  # whatever a module makes of an input that is not of its kind
                    continue
                ran = True
                if witness.seen is None or not {"first", "second"} <= seen.keys() or not same(seen["first"], witness.seen[0]):
                    continue
                if same(witness.seen[1], seen["second"]):
                    return None
                return "the second layer does not receive what the activation gives (a block that is gated already?)"
        return "the activation is not called on the first layer's output" if ran else "it could not be run on its own"
    finally:
        _set(holder, block.attribute, original)
        for hook in hooks:
            hook.remove()


def surroundings(root: nn.Module, holder: nn.Module, block: FeedForward) -> nn.Module:
    """The smallest module that can be run and holds the whole block."""
    if block.holder and not block.second.startswith(f"{block.holder}."):
        return root.get_submodule(block.holder.rpartition(".")[0])
    if type(holder).forward is not nn.Sequential.forward:
        return holder
    # of a sequence, the block alone: what comes before it may have another width
    names = list(holder._modules)
    start, stop = (names.index(name.rpartition(".")[2]) for name in (block.first, block.second))
    return nn.Sequential(*list(holder._modules.values())[start : stop + 1])  # type: ignore[arg-type]


def _set(holder: nn.Module, attribute: str, value: Any) -> None:
    if attribute in holder._modules:
        if isinstance(value, nn.Module):
            holder._modules[attribute] = value
            return
        del holder._modules[attribute]
        object.__setattr__(holder, attribute, value)
    elif isinstance(value, nn.Module):
        holder.__dict__.pop(attribute, None)
        holder._modules[attribute] = value
    else:
        object.__setattr__(holder, attribute, value)


def examples(dim: int, like: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Small inputs in the forms that blocks take: (batch, tokens, d), with a memory, images, rows."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, dim), (2, dim, 4, 4), (2, dim)):
        x = torch.randn(shape, generator=generator).to(like)
        yield (x,)
        yield (x, x)


def same(a: Tensor, b: Tensor) -> bool:
    """The same numbers, whatever the shape."""
    return a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())

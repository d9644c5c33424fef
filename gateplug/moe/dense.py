"""The dense feed-forwards of a model that can become mixtures, and equal experts made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gateplug.core.activations import ACTIVATIONS
from gateplug.core.edit import Edit, Replace
from gateplug.core.feed_forward import FeedForward, find, is_linear, replace_activation, sizes, widths
from gateplug.moe.between import Between, between
from gateplug.moe.experts import ExpertList, ExpertMLP, Experts
from gateplug.moe.mixture import MoE, MultiGateMoE
from gateplug.moe.probing import Formula, formula, is_affine, not_row_wise, weight_of


@dataclass
class Dense:
    """A feed-forward of a model."""

    name: str
    """Where the mixture goes."""
    dim: int
    what: str
    """`64→256→64 gelu`."""
    make: Callable[[int], Experts]
    """Equal experts, as many as asked for."""
    like: Tensor
    """A weight: device, dtype, and where the seed comes from."""
    parts: tuple[str, ...]
    """Names by which a person selects it from above."""
    frozen: bool = False
    auto: bool = True
    others: list[Edit] = field(default_factory=list)
    """What else has to change."""


class Passed(nn.Identity):
    """The identity in the slot of a layer that the experts have taken over.

    Some models read the type of the layer's weight (T5's `wo`): it has none, and says so.
    """

    weight: None = None
    bias: None = None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.in_features = self.out_features = widths(layer)[1]
        like = weight_of(layer)
        assert like is not None
        # follows the model to other devices and types, so that the layer can be put back there
        self.register_buffer("like", torch.empty(0, device=like.device, dtype=like.dtype), persistent=False)


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.function(x)


def find_dense(root: nn.Module) -> tuple[list[Dense], list[str]]:
    """All feed-forwards of `root` in the order of the model, and in words those that were looked at and left.

    Blocks first → activation → second, see :func:`gateplug.core.feed_forward.find`, and modules that are a feed-forward as a
    whole: all parameters in two or three linear layers of fitting widths, each row by itself, and not affine. What lies in a
    mixture already is left.
    """
    blocks, left = find(root)
    found: list[Dense] = []
    inside = {name: name for name, module in root.named_modules() if _is_mixture(module)}
    for block in blocks:
        if _below(block.first, inside):
            continue
        dense = plain(root, block)
        if isinstance(dense, Dense):
            found.append(dense)
        else:
            left.append(f"{block.first} → {block.attribute} → {block.second} ({dense})")
    taken = [name for block in blocks for name in (block.first, block.second, block.slot)]
    wholes: list[Dense] = []
    seen: set[nn.Module] = set()
    for name, module in reversed(list(root.named_modules())):  # from the inside out
        free = name and not any(f"{t}.".startswith(f"{name}.") for t in [*taken, *(w.name for w in wholes)])
        if free and module not in seen and not _below(name, inside) and isinstance(dense := whole(name, module), Dense):
            wholes.append(dense)
            seen.add(module)
    order = {name: i for i, (name, _) in enumerate(root.named_modules())}
    # what `find` could not take as a plain block may be part of a whole one
    left = [text for text in left if not _below(text.split(" ")[0], {w.name: "" for w in wholes})]
    return sorted(found + wholes, key=lambda d: order[d.name]), left


def plain(root: nn.Module, block: FeedForward) -> Dense | str:
    """A block first → activation → second, or why it cannot be taken."""
    first, second = root.get_submodule(block.first), root.get_submodule(block.second)
    a, b = weight_of(first), weight_of(second)
    assert a is not None
    assert b is not None
    if (a.dtype, a.device) != (b.dtype, b.device):
        return f"its layers differ, {a.dtype} on {a.device} and {b.dtype} on {b.device}: experts need one type and place"
    drops = between(root, block)
    if isinstance(drops, str):
        return drops
    others = [replace_activation(root, block, nn.Identity())]
    others += [
        Replace(name, nn.Identity(), f"{m} in the experts of {block.first}", everywhere=False) for name, m in drops.modules
    ]
    others.append(Replace(block.second, Passed(second), f"in the experts of {block.first}"))
    if block.activation in ACTIVATIONS and drops.rate is not None:
        make: Callable[[int], Experts] = partial(stacked, Formula(block.activation, (first,), second, False, dropout=drops.rate))
        what = f"{sizes(block)} {block.activation}"
    else:
        one = nn.Sequential(*_chain(root, block, drops))
        if (why := not_row_wise(one, block.dim, block.out)) is not None:
            return why
        make, what = partial(copies, one), f"{sizes(block)} {_spelled(root, block)}"
    frozen = not any(p.requires_grad for m in (first, second) for p in m.parameters())
    parts = (block.first, block.slot, block.second)
    return Dense(block.first, block.dim, what, make, a, parts, frozen, block.out == block.dim, others)


def _chain(root: nn.Module, block: FeedForward, drops: Between) -> Iterator[nn.Module]:
    activation = getattr(root.get_submodule(block.holder), block.attribute)
    yield root.get_submodule(block.first)
    yield activation if isinstance(activation, nn.Module) else Called(activation)
    yield from (module for _, module in drops.modules)
    yield root.get_submodule(block.second)


def _spelled(root: nn.Module, block: FeedForward) -> str:
    activation: Any = getattr(root.get_submodule(block.holder), block.attribute)
    return str(block.activation or getattr(activation, "__name__", type(activation).__name__))


def whole(name: str, module: nn.Module, named: bool = False) -> Dense | str:
    """A module that is a feed-forward as a whole, or why it is none.

    Args:
        name: its name in the model.
        module: it.
        named: a person says that it is one; then it need not have the structure of one.
    """
    linears = [m for m in module.modules() if is_linear(m)]
    layers = None if is_linear(module) else _layers(module, linears)
    if layers is None and not named:
        return "its parameters are not those of two or three linear layers d→h (d→h) h→d"
    if not linears:
        return "it has no linear layer"
    dims = [widths(layers[0][0])[0]] if layers is not None else list(dict.fromkeys(w for m in linears for w in widths(m)))
    reasons = {dim: not_row_wise(module, dim) for dim in dims}
    dim = next((dim for dim, why in reasons.items() if why is None), None)
    if dim is None:
        return str(next(iter(reasons.values())))
    if not named and is_affine(module, dim):
        return "it is affine"
    like = weight_of(module)
    assert like is not None
    frozen = not any(p.requires_grad for p in module.parameters())
    form = formula(module, *layers, dim) if layers is not None else None
    if form is not None and _stackable(form):
        hidden = widths(form.last)[0]
        what = f"{dim}→{'2·' if form.gated else ''}{hidden}→{dim} {form.activation}{' gated' if form.gated else ''}"
        return Dense(name, dim, what, partial(stacked, form), like, (name,), frozen)
    return Dense(name, dim, f"{type(module).__name__} {dim}→{dim}", partial(copies, module), like, (name,), frozen)


def _layers(module: nn.Module, linears: Sequence[nn.Module]) -> tuple[list[nn.Module], nn.Module] | None:
    """The first layers and the last one, by their widths."""
    own = {id(p) for m in linears for p in m.parameters()}
    if len(linears) not in (2, 3) or {id(p) for p in module.parameters()} != own:
        return None
    for last in reversed(linears):
        h, d = widths(last)
        firsts = [m for m in linears if m is not last]
        shapes = {widths(m) for m in firsts}
        if shapes == {(d, h)} or (len(firsts) == 1 and shapes == {(d, 2 * h)}):
            return firsts, last
    return None


def _stackable(form: Formula) -> bool:
    """One type and place, and both branches with a bias or neither."""
    layers = (*form.firsts, form.last)
    kinds = {(p.dtype, p.device) for m in layers for p in m.parameters()}
    return len(kinds) == 1 and len({m.bias is None for m in form.firsts}) == 1


def stacked(form: Formula, experts: int) -> ExpertMLP:
    """Equal experts with stacked weights."""

    def repeated(parts: list[Tensor]) -> nn.Parameter:
        one = torch.cat([p.detach() for p in parts])
        if form.swapped:
            one = torch.cat(one.chunk(2)[::-1])
        copied = one.expand(experts, *one.shape).clone(memory_format=torch.contiguous_format)
        return nn.Parameter(copied, any(p.requires_grad for p in parts))

    d, out = widths(form.firsts[0])[0], widths(form.last)[1]
    with torch.device("meta"):
        new = ExpertMLP(experts, d, widths(form.last)[0], form.activation, True, out, form.gated, form.dropout)
    b_in: list[Any] = [m.bias for m in form.firsts if m.bias is not None]
    new.w_in = repeated([_rows(m) for m in form.firsts])
    new.b_in = repeated(b_in) if b_in else None
    form = Formula(form.activation, form.firsts, form.last, form.gated)  # the last layer is not swapped
    new.w_out = repeated([_rows(form.last)])
    new.b_out = repeated([form.last.bias]) if isinstance(form.last.bias, Tensor) else None
    return new


def copies(module: nn.Module, experts: int) -> ExpertList:
    """Equal experts of any kind."""
    return ExpertList([copy.deepcopy(module) for _ in range(experts)])


def _rows(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.T


def _is_mixture(module: nn.Module) -> bool:
    routers = [m for m in module.children() if type(m).__name__.lower().endswith("router")]
    return isinstance(module, MoE | MultiGateMoE | ExpertList | ExpertMLP) or bool(routers)


def _below(name: str, above: dict[str, str]) -> bool:
    return any(f"{name}.".startswith(f"{a}.") for a in above if a)

"""What ReplaceFFN does to one block, as edits."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from gateplug.core.edit import Edit, Replace
from gateplug.core.errors import PlugError
from gateplug.core.feed_forward import FeedForward, replace_activation, sizes, widths
from gateplug.core.fresh import redraw, seeded, spread
from gateplug.core.record import Record
from gateplug.glu.functional import VARIANTS, nearest_start, warm_start
from gateplug.glu.layers import GatedProduct, PlainActivation, RecomputingDown


def gated(
    root: nn.Module,
    block: FeedForward,
    gate: str,
    hidden: int,
    warm: bool | Literal["nearest"] = False,
    bias: bool | None = None,
    recompute: bool = False,
) -> list[Edit]:
    """Edits that make a plain block a gated one.

    Args:
        root: the model.
        block: which block of it.
        gate: activation of the gate branch.
        hidden: width of the gated block; where it differs from the block's, the second layer is fresh as well.
        warm: start from the block's weights, see `ReplaceFFN`.
        bias: of both branches, None for as it is.
        recompute: keep less for backward.

    Raises:
        ValueError: a warm start that is not exact, or that needs a bias and must not have one.
    """
    first, second = root.get_submodule(block.first), root.get_submodule(block.second)
    weight, b_in = first.weight, first.bias
    assert isinstance(weight, Tensor)
    start, note = None, "fresh"
    if warm:
        start, note = _start(weight if isinstance(first, nn.Linear) else weight.T, b_in, block, gate, warm)  # type: ignore[arg-type]
        needs = any(bool(b.any()) for b in start[1::2])
        if bias is False and needs:
            raise ValueError(f"the warm start of {block.first} needs a bias in the gated branches: bias=False cannot have it")
        bias = needs or b_in is not None if bias is None else bias
    else:
        _not_frozen(block, first)
    bias = b_in is not None if bias is None else bias
    with seeded(block.first, weight):
        product = GatedProduct(block.dim, hidden, gate, bias, recompute, weight.device, weight.dtype)
        stds = spread(weight), spread(b_in)  # type: ignore[arg-type]
        for branch in (product.gate, product.up):
            redraw(branch.weight, stds[0])
            redraw(branch.bias, stds[1])
    product.requires_grad_(weight.requires_grad)
    if start is not None:
        with torch.no_grad():
            product.gate.weight.copy_(start[0])
            product.up.weight.copy_(start[2])
            if bias:
                product.gate.bias.copy_(start[1])
                product.up.bias.copy_(start[3])
    name = next((v for v, a in VARIANTS.items() if a == gate), f"gated {gate}")
    what = f"{sizes(block)} {block.activation or 'activation'} → {name} {block.dim}→2·{hidden}→{block.out}, {note}"
    edits: list[Edit] = [Replace(block.first, product, what), replace_activation(root, block, nn.Identity())]
    last = second if hidden == block.hidden else fresh_linear(root, block, block.second, hidden, block.out)
    last = RecomputingDown(last, gate) if recompute else last
    return edits if last is second else [*edits, Replace(block.second, last)]


def _start(
    weight: Tensor, bias: Tensor | None, block: FeedForward, gate: str, warm: bool | str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], str]:
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    try:
        if block.activation is None:
            raise ValueError(f"{block.slot} computes no known activation: its block has no exact warm start")
        return warm_start(weight, bias, block.activation, gate), "warm"
    except ValueError as error:
        if warm != "nearest" or block.activation is None:
            raise ValueError(f"{block.first}: {error}") from None
        if block.activation == "tanh":
            raise ValueError(f"{block.first}: no gated block comes near tanh") from None
        start, off = nearest_start(weight, bias, block.activation, gate)
        return start, f"nearest start, hidden units off by {100 * off:.2g} %"


def _not_frozen(block: FeedForward, first: nn.Module) -> None:
    if not any(p.requires_grad for p in first.parameters()):
        raise PlugError(
            f"{block.first} is frozen (requires_grad=False) and would get fresh weights that nobody trains: leave it out with "
            "`layers=` (a frozen copy of the network, say), unfreeze it before, or start warm (match='width', warm_start=True)"
        )


def plain(root: nn.Module, block: FeedForward, act: str | None) -> list[Edit]:
    """Edits that give a plain block fresh weights, and another activation if `act` names one.

    Raises:
        PlugError: the block is frozen.
    """
    _not_frozen(block, root.get_submodule(block.first))
    what = f"{sizes(block)} {block.activation or 'activation'} → {act or 'the same'}, fresh"
    edits: list[Edit] = [
        Replace(block.first, fresh_linear(root, block, block.first, block.dim, block.hidden), what),
        Replace(block.second, fresh_linear(root, block, block.second, block.hidden, block.out)),
    ]
    return edits if act is None else [*edits, replace_activation(root, block, PlainActivation(act))]


def fresh_linear(root: nn.Module, block: FeedForward, name: str, d_in: int, d_out: int) -> nn.Module:
    """A dense layer of the kind that stands at `name`, with other widths and fresh weights.

    Where both layers of the block are spread as 1/√fan-in (T5's, torch's own), a narrower one is spread wider in proportion.
    """
    old, first, second = (root.get_submodule(n) for n in (name, block.first, block.second))
    weight = old.weight
    assert isinstance(weight, Tensor)
    assert isinstance(first.weight, Tensor)
    assert isinstance(second.weight, Tensor)
    stds = {first: spread(first.weight), second: spread(second.weight)}
    by_fan_in = math.isclose(stds[first] * block.dim**0.5, stds[second] * block.hidden**0.5, rel_tol=0.1)
    with seeded(name, weight):
        new = nn.Linear(d_in, d_out, old.bias is not None) if isinstance(old, nn.Linear) else type(old)(d_out, d_in)
        new = new.to(weight.device, weight.dtype)
        assert isinstance(new.weight, Tensor)
        redraw(new.weight, stds[old] * (widths(old)[0] / d_in) ** 0.5 if by_fan_in else stds[old])
        redraw(new.bias, spread(old.bias))  # type: ignore[arg-type]
    return new


def cost_change(root: nn.Module, record: Record) -> dict[str, tuple[int, int]]:
    """What an attached record changed: parameters of the model and of the replaced layers, and MACs a token of the latter."""
    edits = (piece.edit for _, _, piece in record.pieces)
    pairs = [(e.original, e.new) for e in edits if isinstance(e, Replace) and e.original is not None]
    old = sum(p.numel() for o, _ in pairs for p in o.parameters())
    new = sum(p.numel() for _, n in pairs for p in n.parameters())
    total = sum(p.numel() for p in root.parameters())
    # a dense layer costs one multiply-accumulate per weight and token
    macs = [sum(p.numel() for m in side for p in m.parameters() if p.dim() == 2) for side in zip(*pairs, strict=True)]
    return {
        "parameters of the model": (total - new + old, total),
        "parameters of the replaced layers": (old, new),
        "MACs a token of the replaced layers": (macs[0], macs[1]),
    }

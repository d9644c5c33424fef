"""Attention by its structure: projections of queries, keys and values, and the output projection that takes all heads in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gateplug.core.feed_forward import is_linear, widths
from gateplug.core.record import join

_TRIPLES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
_OUT = ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class Attention:
    """One attention block, by the names of its layers."""

    out: str
    query: str
    key: str | None
    value: str | None
    """None where queries, keys and values come from one packed layer, `query`."""
    heads: int
    groups: int
    """Heads of keys and values, which several heads of queries may share."""
    width: int
    """Of a head."""

    @property
    def layers(self) -> list[str]:
        """Names of all its layers."""
        return [n for n in (self.query, self.key, self.value, self.out) if n is not None]

    def rows(self, availability: Tensor) -> dict[str, Tensor]:
        """Availability of the output rows of each projection; keys and values are as used as the most used of their heads.

        Args:
            availability: (heads,).
        """
        of_queries = availability.repeat_interleave(self.width)
        of_groups = availability.reshape(self.groups, -1).amin(1).repeat_interleave(self.width)
        if self.key is None or self.value is None:
            return {self.query: of_queries.repeat(3)}
        return {self.query: of_queries, self.key: of_groups, self.value: of_groups}


def find_attention(module: nn.Module) -> dict[str, Attention]:
    """All attention blocks whose heads can be gated, by the name of the output projection.

    Known are blocks with separate dense layers for queries, keys and values under one of the usual names, or GPT-2's packed
    `c_attn`, and an output projection beside them or in the block around them. `nn.MultiheadAttention` is not among them: it
    never calls its output projection.
    """
    found: dict[str, Attention] = {}
    for name, block in module.named_modules():
        if isinstance(block, nn.MultiheadAttention):
            continue
        one = _separate(module, name, block) or _packed(name, block)
        if one is not None:
            found[one.out] = one
    return found


def _heads(block: nn.Module) -> int | None:
    for holder in (block, getattr(block, "config", None)):
        for attribute in _HEADS:
            number = getattr(holder, attribute, None)
            if isinstance(number, int):
                return number
    return None


def _separate(module: nn.Module, name: str, block: nn.Module) -> Attention | None:
    children: dict[str, nn.Module] = dict(block.named_children())
    triple = next((t for t in _TRIPLES if all(n in children and is_linear(children[n]) for n in t)), None)
    heads = _heads(block)
    if triple is None or heads is None:
        return None
    rows = [widths(children[n])[1] for n in triple]
    width = rows[0] // heads
    if rows[0] % heads or rows[1] != rows[2] or rows[1] % width or heads % (rows[1] // width):
        return None
    out = _output(module, name, block, rows[0], triple)
    if out is None:
        return None
    query, key, value = (join(name, n) for n in triple)
    return Attention(out, query, key, value, heads, rows[1] // width, width)


def _packed(name: str, block: nn.Module) -> Attention | None:
    packed: Any = getattr(block, "c_attn", None)
    out: Any = getattr(block, "c_proj", None)
    heads = _heads(block)
    if packed is None or out is None or heads is None or not (is_linear(packed) and is_linear(out)):
        return None
    total, inner = widths(packed)[1], widths(out)[0]
    if total != 3 * inner or inner % heads:  # cross-attention takes its queries elsewhere
        return None
    return Attention(join(name, "c_proj"), join(name, "c_attn"), None, None, heads, heads, inner // heads)


def _output(module: nn.Module, name: str, block: nn.Module, inner: int, triple: tuple[str, ...]) -> str | None:
    """The dense layer that takes the heads in: in the block, or (BERT) in its sibling `output`."""
    for child in _OUT:
        layer = getattr(block, child, None)
        if child not in triple and isinstance(layer, nn.Module) and is_linear(layer) and widths(layer)[0] == inner:
            return join(name, child)
    around = name.rpartition(".")[0]
    sibling = getattr(module.get_submodule(around), "output", None) if name else None
    layer = getattr(sibling, "dense", None)
    if isinstance(layer, nn.Module) and is_linear(layer) and widths(layer)[0] == inner:
        return join(around, "output", "dense")
    return None

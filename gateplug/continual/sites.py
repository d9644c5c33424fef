"""Where the gates of GateON stand: hidden units of dense and convolutional layers, and attention heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from gateplug.continual.attention import Attention, find_attention
from gateplug.continual.traced import Trace, trace
from gateplug.core.answers import network
from gateplug.core.feed_forward import find, is_linear, widths
from gateplug.core.record import join

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Site:
    """A layer whose output units get a gate, and how their activations are read."""

    layer: str
    units: int
    reads: str | None
    """The module whose output is the activation; None where it is computed by a function that cannot be listened to."""
    activation: str = ""
    """What comes after the layer, for messages."""
    holder: str = ""
    attribute: str = ""
    """Where an activation is a function held in an attribute: it has to be stood in for to be listened to."""
    rows: tuple[str, ...] = ()
    """Further layers whose first dimension is that of the units: a norm behind the layer, the other branch of a gated product."""


@dataclass
class Sites:
    """What there is in a model."""

    units: dict[str, Site] = field(default_factory=dict)
    heads: dict[str, Attention] = field(default_factory=dict)
    """By the name of the output projection, before which the gate stands."""
    readouts: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    """Layers that get no gate by themselves, and why."""


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a kind that can be gated."""
    return is_linear(module) or isinstance(module, CONVOLUTIONS)


def is_product(module: nn.Module) -> bool:
    """Whether a module gives the hidden units of a gated feed-forward, act(gate(x)) · up(x): one that a plug has put in."""
    parts = {name: child for name, child in module.named_children() if is_linear(child)}
    return set(parts) == {"gate", "up"} and widths(parts["gate"]) == widths(parts["up"])


def units_of(layer: nn.Module) -> int:
    """Output units (channels) of a layer."""
    return layer.out_channels if isinstance(layer, CONVOLUTIONS) else widths(layer)[1]


def trailing_of(layer: nn.Module) -> int:
    """Dimensions behind the units in a layer's output."""
    if not isinstance(layer, CONVOLUTIONS):
        return 0
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dim() - 2


def find_sites(module: nn.Module) -> Sites:
    """All layers with an activation behind them, attention heads, and the read-out."""
    sites = Sites()
    net = network(module)
    root = next(name for name, m in module.named_modules() if m is net)
    for block in find(module)[0]:
        held = block.attribute in module.get_submodule(block.holder)._modules
        sites.units[block.first] = Site(
            block.first, block.hidden, block.slot, block.activation or "an activation",
            *(("", "") if held else (block.holder, block.attribute)),
        )  # fmt: skip
    for name, part in module.named_modules():
        if is_product(part):
            branches = tuple(join(name, branch) for branch in ("gate", "up"))
            width = units_of(part.get_submodule("gate"))
            sites.units[name] = Site(name, width, name, "a gated product", rows=branches)
    sites.heads = find_attention(module)
    whole = None
    for name, part in _regions(module, net, root):
        seen = trace(part)
        if seen is None:
            continue
        whole = seen if part is net else whole
        for site in _sites(seen, part, name, part is net):
            sites.units.setdefault(site.layer, site)
    inside = {n for attention in sites.heads.values() for n in attention.layers}
    inside |= {n for site in sites.units.values() for n in site.rows}
    rest = [n for n, m in module.named_modules() if is_layer(m) and n not in sites.units and n not in inside]
    sites.readouts = [join(root, n) for n in whole.last] if whole is not None else rest[-1:]
    for name in rest:
        if name not in sites.readouts:
            sites.left[name] = "no activation follows it"
    return sites


def _regions(module: nn.Module, net: nn.Module, root: str) -> Iterator[tuple[str, nn.Module]]:
    """The largest parts of a network that can be followed as a graph."""
    if hasattr(net, "config") and hasattr(net, "base_model_prefix"):  # Hugging Face's forwards have branches on values
        yield from _parts(net, root)
    elif trace(net) is not None:
        yield root, net
    else:
        yield from _parts(net, root)


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        full = join(name, child_name)
        if sum(is_layer(m) for m in child.modules()) == 0 or is_layer(child):
            continue
        if not isinstance(child, nn.ModuleList | nn.ModuleDict) and trace(child) is not None:
            yield full, child
        else:
            yield from _parts(child, full)


def _sites(seen: Trace, part: nn.Module, name: str, whole: bool) -> Iterator[Site]:
    for found in seen.followed:
        if whole and found.layer in seen.last:  # a read-out with an activation of its own (a sigmoid)
            continue
        layer = part.get_submodule(found.layer)
        if not is_layer(layer):  # a transposed convolution
            continue
        reads = None if found.reads is None else join(name, found.reads)
        rows = tuple(join(name, other) for other in found.rows)
        yield Site(join(name, found.layer), units_of(layer), reads, found.activation, rows=rows)

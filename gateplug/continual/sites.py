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
    for name, part, seen in _regions(net, root):
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


def _regions(part: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, Trace]]:
    """The largest parts of a network that can be followed as a graph; what cannot be followed in one is looked at by itself."""
    seen, closed = None, {}
    if not _branches(part):
        seen = trace(part)
        if seen is None:
            closed = {n: m for n, m in _called(part) if _branches(m) or trace(m) is None}
            seen = trace(part, closed.values())
    if seen is not None:
        yield name, part, seen
    for child_name, child in part.named_children() if seen is None else closed.items():
        if not is_layer(child) and any(is_layer(m) for m in child.modules()):
            yield from _regions(child, join(name, child_name))


def _branches(module: nn.Module) -> bool:
    """Lists have no forward, and those of Hugging Face's models have branches on values."""
    lists = isinstance(module, nn.ModuleList | nn.ModuleDict)
    return lists or (hasattr(module, "config") and hasattr(module, "base_model_prefix"))


def _called(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children, of lists their children."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((join(name, n), m) for n, m in _called(child))
        else:
            yield name, child


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

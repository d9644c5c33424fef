"""Which gate stands where, and which parameter belongs to whose units: what GateON changes in a model, as edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from gateplug.continual.attention import Attention
from gateplug.continual.guards import Guards
from gateplug.continual.layers import Availability, ContextGate, HeadGate, Heard
from gateplug.continual.sites import Site, Sites, is_layer, trailing_of, units_of
from gateplug.core.edit import AddGate, AddModule, Edit, SetAttribute
from gateplug.core.errors import PlugError, listed
from gateplug.core.fresh import seeded
from gateplug.core.record import all_records

UNITS = ("neuron", "activity")
"""Relevances that are estimated of units, and not of single weights."""


class Options(NamedTuple):
    """What GateON was asked for, as far as it decides what is attached."""

    relevance: str
    contexts: int
    open_share: float
    heads: str
    others: str
    auto: str
    """What others='auto' means for what was not loaded from a checkpoint."""


def chosen(layers: Mapping[str, nn.Module], sites: Sites) -> tuple[list[Site], list[Attention]]:
    """Sites in the layers that were named; a dense or convolutional layer without an activation is taken as it is.

    Raises:
        PlugError: a read-out was named, or a layer that has nothing to gate.
    """
    units: dict[str, Site] = {}
    heads: dict[str, Attention] = {}
    for name, layer in layers.items():
        inside = [n for n in (*sites.units, *sites.heads) if f"{n}.".startswith(f"{name}.")]
        if name in sites.readouts:
            raise PlugError(
                f"GateON: {name} is the read-out, which no gated layer follows: its outputs are answers, not hidden units"
            )
        if not inside and is_layer(layer):
            units[name] = Site(name, units_of(layer), name, "no activation")
        elif not inside:
            raise PlugError(
                f"GateON finds nothing to gate in {name} ({type(layer).__name__}). Layers with an activation behind them: "
                f"{listed(sites.units)}; output projections of attention: {listed(sites.heads)}"
            )
        units |= {n: sites.units[n] for n in inside if n in sites.units}
        heads |= {n: sites.heads[n] for n in inside if n in sites.heads}
    return list(units.values()), list(heads.values())


def edits(module: nn.Module, units: list[Site], heads: list[Attention], sites: Sites, options: Options) -> Iterator[Edit]:
    """Gates, and places for availability on layers without one.

    Raises:
        PlugError: the activation behind a layer cannot be listened to.
    """
    neuron = options.relevance in UNITS
    shared: dict[nn.Parameter, Availability] = {}
    owned: set[int] = set()
    taken = _taken(module)
    elements: dict[str, list[str]] = {}

    def own(gate: ContextGate, layer: str, part: str, rows: int) -> None:
        """The parameters of a layer are rows of a gate's units (n), or are held back weight by weight (p)."""
        for name, p in module.get_submodule(layer)._parameters.items():
            if p is None or id(p) in owned or not p.requires_grad:
                continue
            transposed = type(module.get_submodule(layer)).__name__ == "Conv1D" and p.dim() == 2
            if p.dim() == 0 or p.shape[1 if transposed else 0] != rows:
                continue
            if id(p) in taken:
                raise PlugError(
                    f"another GateON holds {layer}.{name} back already. Give one GateON all layers, or both layers of their own, "
                    "the first one with others='free'"
                )
            owned.add(id(p))
            if neuron:
                gate.rows_of.append((module.get_submodule(layer), name, part))
            elif options.relevance == "parameter":
                elements.setdefault(layer, []).append(name)

    for site in units:
        layer = module.get_submodule(site.layer)
        gate = _gate(module, site.layer, ContextGate, site.units, trailing_of(layer), 1, options)
        if neuron:
            yield from _listened(module, site, gate)
            # one weight in two gated layers: what it is needed for adds up, and its availability is one
            weight = layer._parameters.get("weight")  # none of its own where it is computed (weight_norm …)
            if weight is not None and gate.availability is not None:
                gate.availability = shared.setdefault(weight, gate.availability)
        for name in (site.layer, *site.rows):
            own(gate, name, "", site.units)
        yield AddGate(site.layer, gate, what=f"{site.units} units, {site.activation} behind them")
    for attention in heads:
        gate = _gate(module, attention.out, HeadGate, attention.heads, 0, attention.width, options)
        gate.attention = attention
        for name in dict.fromkeys(n for n in attention.layers if n != attention.out):
            wide = attention.width * (attention.heads if name == attention.query else attention.groups)
            own(gate, name, name, 3 * wide if attention.key is None else wide)
        yield AddGate(attention.out, gate, what=f"{attention.heads} heads of {attention.width}")
    yield from _others(module, sites, options, owned | taken, elements)


def _gate(
    module: nn.Module, name: str, kind: type[ContextGate], units: int, trailing: int, repeat: int, options: Options
) -> ContextGate:
    first = next(module.get_submodule(name).parameters())
    if first.is_meta:
        raise PlugError(f"{name} is on the meta device: attach GateON after its weights are made, e.g. in configure_model")
    with seeded(name, first):
        seed = int(torch.randint(2**62, ()))
    gate = kind(units, options.contexts, options.open_share, seed, trailing, repeat, options.relevance in UNITS)
    return gate.to(first.device)


def _listened(module: nn.Module, site: Site, gate: ContextGate) -> Iterator[Edit]:
    """Tell a gate whose output its units' activations are."""
    if site.reads is None:
        raise PlugError(
            f"GateON(relevance='neuron') cannot read what {site.activation} gives after {site.layer}: it is called as a function "
            "in a forward. Hold it as a module (nn.Tanh() …), or say relevance='parameter'"
        )
    if site.attribute:
        heard = Heard(getattr(module.get_submodule(site.holder), site.attribute))
        gate.reads = (heard,)
        yield SetAttribute(site.holder, site.attribute, heard, passing=True)
    elif site.reads != site.layer:
        gate.reads = (module.get_submodule(site.reads),)


def _others(module: nn.Module, sites: Sites, options: Options, owned: set[int], elements: dict[str, list[str]]) -> Iterator[Edit]:
    """Availability of what belongs to no gated unit, kept on the layers; what is frozen is noted there as well."""
    foreign = {id(p) for record in all_records(module) for _, p in record.parameters(module)}
    frozen: dict[str, list[str]] = {}
    for full, p in module.named_parameters():
        layer, _, name = full.rpartition(".")
        if id(p) in owned or id(p) in foreign or not p.requires_grad:
            continue
        read_out = any(f"{layer}.".startswith(f"{n}.") for n in sites.readouts)
        what = options.heads if read_out else options.others
        if what == "auto":
            what = "frozen" if is_pretrained(p) else options.auto
        if what in ("obstructed", "frozen"):
            (elements if what == "obstructed" else frozen).setdefault(layer, []).append(name)
    for layer in dict.fromkeys([*elements, *frozen]):
        held, still = elements.get(layer, []), frozen.get(layer, [])
        what = " and ".join(text for text, names in (("held back weight by weight", held), ("frozen", still)) if names)
        yield AddModule(layer, Guards(module.get_submodule(layer), held, still), "guards", what)


def _taken(module: nn.Module) -> set[int]:
    """Parameters that another GateON holds back or freezes."""
    rows = [(m, name) for g in module.modules() if isinstance(g, ContextGate) for m, name, _ in g.rows_of]
    weights = [(g.layer[0], name) for g in module.modules() if isinstance(g, Guards) for name in g.names]
    return {id(layer._parameters[name]) for layer, name in (*rows, *weights)}


def is_pretrained(parameter: nn.Parameter) -> bool:
    """Whether `from_pretrained` of Hugging Face has loaded it; new heads are made beside, and a config alone loads nothing."""
    return bool(getattr(parameter, "_is_hf_initialized", False))

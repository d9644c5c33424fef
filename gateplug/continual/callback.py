"""GateON: gates for each context and obstruction of what other contexts need, in the training that somebody already has."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from torch import nn

from gateplug.continual.norms import ContextStatistics, batch_norms
from gateplug.continual.plan import Options, chosen, edits
from gateplug.continual.sites import find_sites
from gateplug.continual.trained import TrainedContexts
from gateplug.core.edit import AddModule, Edit
from gateplug.core.errors import PlugError, listed, nearest, real_numbers, whole_numbers
from gateplug.core.optim import GroupOptions
from gateplug.core.select import Layers

RELEVANCES = ("neuron", "parameter", "activity", "none")
OBSTRUCT = ("update", "grad", "none")
OTHERS = ("auto", "obstructed", "frozen", "free")
BN = ("per_context", "shared", "refuse")


class GateON(TrainedContexts):
    """Train one network on one task after another without forgetting (GateON, arXiv 2306.01690).

    Every context (task) has gates of its own on the hidden units of dense and convolutional layers and on attention heads; what a
    context turns out to need is held back when other contexts train. The context is the task of a stream (gp.TaskStream), what
    gp.ContextDetector finds, the entry `task` of a batch, or what :meth:`switch` was told.

    Args:
        relevance: of what it is estimated: `neuron` (n-GateON), `parameter` (p-GateON: less forgetting, two numbers more to keep
            for each weight), `activity` (how active a unit is, without its gradient: what the official code does in
            convolutions), or `none`: gates alone.
        contexts: how many there may be, with gates from the start; None: as many as come, each with gates when it comes.
        obstruct: `update`: an update is let through in part, exact for every optimizer; `grad`: the gradient is made smaller and
            the optimizer's state of these parameters dropped at each switch, as in the official code; `none`: neither.
        eta: rate at which what is relevant is used up, > 0. Times the steps of a task it should be about 1.5.
        open_share: share of the units that a new context starts with open, in (0, 1); small for many tasks.
        reactivation: ε ≥ 0: what is less relevant than ε times the mean becomes available again.
        layers: which, see :func:`gateplug.core.select.select`; names select the layers in and below them. "auto": every dense or
            convolutional layer with an activation behind it, and attention heads.
        heads: the read-out is `free`, or `obstructed` like the rest, weight by weight.
        others: hidden parameters that belong to no gated unit (output projections, embeddings, norms): `obstructed` weight by
            weight, `frozen` or `free`; `auto`: frozen where `from_pretrained` has loaded them, else obstructed.
        bn: statistics of BatchNorm `per_context`, `shared` (with a warning), or `refuse` such a network.
        lr_scale: factor on the learning rate of the gates, ≥ 0.

    Raises:
        ValueError: a number out of its range, an unknown name.
        PlugError: no layer to gate, a read-out that was named, an activation that cannot be read.
    """

    room: ClassVar[str] = "continual"
    summary: ClassVar[str] = "learns one task after another without forgetting: gates for each, and what is needed is held back"
    paper: ClassVar[str] = "arXiv 2306.01690"
    refuses: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("EWC", "SynapticIntelligence", "MAS"),
            "both hold back what earlier tasks need, each in its way: take one",
        ),
        "Replay": "samples of earlier tasks would run through the gates of the context that is being trained",
    }

    def __init__(
        self,
        relevance: Literal["neuron", "parameter", "activity", "none"] = "neuron",
        contexts: int | None = None,
        obstruct: Literal["update", "grad", "none"] = "update",
        eta: float = 0.01,
        open_share: float = 0.5,
        reactivation: float = 0.0,
        layers: Layers = "auto",
        heads: Literal["free", "obstructed"] = "free",
        others: Literal["auto", "obstructed", "frozen", "free"] = "auto",
        bn: Literal["per_context", "shared", "refuse"] = "per_context",
        lr_scale: float = 1.0,
    ) -> None:
        named = (
            ("relevance", relevance, RELEVANCES),
            ("obstruct", obstruct, OBSTRUCT),
            ("others", others, OTHERS),
            ("bn", bn, BN),
        )
        for name, value, allowed in (*named, ("heads", heads, ("free", "obstructed"))):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}.{nearest(str(value), allowed)}")
        real_numbers(eta=eta, open_share=open_share, reactivation=reactivation)
        if contexts is not None:
            whole_numbers(contexts=contexts)
            if contexts < 1:
                raise ValueError(f"contexts={contexts} must be ≥ 1, or None for as many as come")
        if not 0 < eta < float("inf"):
            raise ValueError(f"eta={eta} must be a finite number > 0: the rate at which what is relevant is used up")
        if not 0 < open_share < 1:
            raise ValueError(
                f"open_share={open_share} must lie in (0, 1): the share of units that a new context starts with open"
            )
        if not 0 <= reactivation < float("inf"):
            raise ValueError(f"reactivation={reactivation} must be a finite number ≥ 0")
        if relevance == "none" and obstruct != "none":
            raise ValueError(f"relevance='none' leaves nothing to go by for obstruct={obstruct!r}: say obstruct='none' as well")
        if obstruct == "none" and relevance != "none":
            raise ValueError(f"obstruct='none' makes no use of relevance={relevance!r}: say relevance='none' as well")
        if obstruct == "none" and (heads == "obstructed" or others == "obstructed"):
            raise ValueError("obstruct='none' holds nothing back: leave heads and others free")
        self.relevance, self.contexts, self.obstruct, self.eta = relevance, contexts, obstruct, eta
        self.open_share, self.reactivation, self.layers = open_share, reactivation, layers
        self.heads, self.others, self.bn, self.lr_scale = heads, others, bn, lr_scale
        self.group = GroupOptions(lr_scale, weight_decay=0.0)  # decay would move gates of other contexts, and close this one's
        self._begin()

    # ------------------------------------------------------------------ what is attached

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        """Layers whose units or heads get gates."""
        sites = find_sites(module)
        return {name: m for name, m in module.named_modules() if name in sites.units or name in sites.heads}

    def nothing(self, module: nn.Module) -> str:
        """Say which layers were seen, and why none was taken."""
        sites = find_sites(module)
        seen = [f"{name} ({why})" for name, why in sites.left.items()] + [f"{name} (the read-out)" for name in sites.readouts]
        return (
            f"GateON with layers={self.layers!r} finds no hidden layer: a dense or convolutional one with an activation behind "
            f"it, or attention heads. Looked at: {listed(seen)}"
        )

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        """A gate on each layer, a place for availability on the others, and statistics for each context on BatchNorms."""
        sites = find_sites(module)
        units, heads = chosen(layers, sites)
        auto = "free" if self.obstruct == "none" else "obstructed"
        options = Options(self.relevance, self.contexts or 1, self.open_share, self.heads, self.others, auto)
        return [*edits(module, units, heads, sites, options), *self._statistics(module)]

    def _statistics(self, module: nn.Module) -> Iterable[Edit]:
        norms = batch_norms(module)
        if norms and self.bn == "refuse":
            raise PlugError(
                f"GateON(bn='refuse'): the model has running statistics in {listed(norms)}, which contexts would share. Say "
                "bn='per_context', or use a norm without them (GroupNorm, LayerNorm)"
            )
        if norms and self.bn == "shared":
            warnings.warn(
                f"GateON(bn='shared'): the running statistics of {listed(norms)} will be those of the last context, also where "
                "other contexts are evaluated: this forgets. bn='per_context' keeps them apart",
                stacklevel=2,
            )
        kept = norms if self.bn == "per_context" else {}
        return [
            AddModule(name, ContextStatistics(norm, self.contexts or 1), "contexts", "statistics for each context")
            for name, norm in kept.items()
            if not isinstance(getattr(norm, "contexts", None), ContextStatistics)  # another GateON's
        ]

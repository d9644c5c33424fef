"""Routers that others wrote: find them in a model, and read what they return.

One row of the table of families (transformers 5.24) is one function here; a user's own router is another, given as an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gateplug.core.cost import still
from gateplug.core.errors import PlugError, listed
from gateplug.moe.routing import ExpertGate, Routing

Adapter = Callable[[Any], Sequence[Tensor]]
"""From a router's output to (logits (…, experts), chosen experts (…, k)), or these and the weights (…, k) of the chosen."""


Adapters = Mapping[type[nn.Module] | str, Adapter]
"""By the router's class, or its name."""


class Seen(NamedTuple):
    """What a router did with T rows."""

    logits: Tensor | None
    """(T, experts), with a graph."""
    assigned: Tensor | None
    """(T, k) int64, before a capacity dropped any."""
    weights: Tensor | None
    """(T, k) of `assigned`, or (T, experts) if `by_expert`; with a graph. None: not known."""
    kept: Tensor | None = None
    """(T, k) bool: what a capacity left."""
    load: Tensor | None = None
    """(experts,) smooth load."""
    masked: bool = False
    """Padding is left out already."""
    q: Tensor | None = None
    """(T, experts) with a graph, of a gate without logits: what stands for p."""
    by_expert: bool = False
    """How `weights` are given; with k = experts their shape does not tell."""

    @property
    def rows(self) -> int:
        """T."""
        return len(self.scores)

    @property
    def scores(self) -> Tensor:
        """Logits, or q where there are none: (T, experts)."""
        scores = self.logits if self.logits is not None else self.q
        assert scores is not None
        return scores

    def probs(self) -> Tensor:
        """Softmax of the logits, or q: (T, experts), in float32 or more, without a graph."""
        scores = self.scores.detach()
        if self.logits is None:
            return scores
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return (scores - scores.logsumexp(-1, keepdim=True)).exp()  # on few experts four times as fast as softmax


Read = Callable[[Any, int | None], Seen]
"""From a router's output and its k, if that is known, to what it did."""


@dataclass(frozen=True)
class Router:
    """A router of a model."""

    name: str
    """Where to look on; of gateplug's gates their tap."""
    module: nn.Module
    read: Read
    experts: int
    k: int | None
    gate: ExpertGate | None = None

    @property
    def title(self) -> str:
        """The router's own name."""
        return self.name.removesuffix(".tap")

    @property
    def owner(self) -> nn.Module:
        """The router itself."""
        return self.module if self.gate is None else self.gate


def tapped(out: Routing, k: int | None = None) -> Seen:
    """Gates of gateplug."""
    slots = out.slots if out.kept is None else None
    weights = out.weights if slots is None else slots
    return Seen(out.logits, out.assigned, weights, out.kept, out.load, out.masked, out.q, slots is None)


def triple(out: Any, k: int | None = None) -> Seen:
    """Mixtral, Qwen2/3-MoE, OLMoE, Ernie 4.5, DeepSeek-V3, Glm4, GPT-OSS, Phimoe, Granite, Jamba: (logits, weights, indices)."""
    logits, weights, assigned = out
    logits = logits.reshape(-1, logits.shape[-1])
    return Seen(logits, assigned.reshape(len(logits), -1), weights.reshape(len(logits), -1))


def llama4(out: Any, k: int | None = None) -> Seen:
    """Llama 4: (scores (T, E), zero but for the chosen; logits (T, E))."""
    scores, logits = (t.reshape(-1, t.shape[-1]) for t in out)
    assigned = logits.detach().topk(k or int((scores != 0).sum(-1).max()), -1).indices
    return Seen(logits, assigned, scores.gather(-1, assigned))


def switch(out: Any, k: int | None = None) -> Seen:
    """Switch: (dispatch one-hot (B, S, E), zero where an expert was full; probability (B, S, 1); logits (B, S, E))."""
    dispatch, probability, logits = (t.reshape(-1, t.shape[-1]) for t in out)
    kept = dispatch.sum(-1, keepdim=True) > 0
    return Seen(logits, logits.detach().argmax(-1, keepdim=True), probability, kept)


class Adapted:
    """A user's router, read by their adapter."""

    def __init__(self, adapter: Adapter, router: str) -> None:
        self.adapter, self.router = adapter, router

    def __call__(self, out: Any, k: int | None = None) -> Seen:
        """Read it.

        Raises:
            PlugError: the adapter does not give what is asked of it.
        """
        found = self.adapter(out)
        if not isinstance(found, tuple | list) or not 2 <= len(found) <= 3 or not all(isinstance(t, Tensor) for t in found):
            raise PlugError(
                f"the adapter of {self.router} must return (logits (…, experts), chosen experts (…, k)), or these and "
                f"their weights; it returned {type(found).__name__}"
            )
        logits, assigned = found[0].reshape(-1, found[0].shape[-1]), found[1].reshape(-1, found[1].shape[-1])
        if assigned.is_floating_point() or len(assigned) != len(logits) or assigned.shape[-1] > logits.shape[-1]:
            raise PlugError(
                f"the adapter of {self.router} gave logits {tuple(found[0].shape)} and chosen experts "
                f"{tuple(found[1].shape)} of {found[1].dtype}; they must be (…, experts) and (…, k) whole numbers for the same "
                "rows"
            )
        weights = found[2].reshape(len(logits), -1) if len(found) == 3 else None
        return Seen(logits, assigned, weights)


def find_routers(module: nn.Module, adapters: Adapters | None = None) -> tuple[dict[str, Router], list[str]]:
    """All routers of `module` by name, in order; and in words what looked like one and was left.

    gateplug's gates; modules of the classes in `adapters`; modules whose class name ends in Router and that return, on a small
    random input, what one of the known families returns.
    """
    found: dict[str, Router] = {}
    left: list[str] = []
    for name, m in module.named_modules():
        if isinstance(m, ExpertGate):
            place = f"{name}.tap" if name else "tap"
            found[place] = Router(place, m.tap, tapped, m.experts, m.k if m.k < m.experts else None, m)
        adapter = next((a for cls, a in (adapters or {}).items() if _is_a(m, cls)), None)
        if adapter is not None or re.search("router$", type(m).__name__, re.IGNORECASE):
            reads = [Adapted(adapter, type(m).__name__)] if adapter is not None else [triple, switch, llama4]
            seen = _confirmed(m, reads)
            if isinstance(seen, tuple):
                found[name] = Router(name, m, *seen)
            else:
                left.append(f"{name} ({type(m).__name__}: {seen})")
    return found, left


def _is_a(module: nn.Module, cls: type[nn.Module] | str) -> bool:
    names = {name for c in type(module).__mro__ for name in (c.__name__, f"{c.__module__}.{c.__qualname__}")}
    return cls in names if isinstance(cls, str) else isinstance(module, cls)


def _confirmed(router: nn.Module, reads: Sequence[Read]) -> tuple[Read, int, int] | str:
    """How to read a router, its number of experts and k, by running it; or why it is none."""
    weight = next((p for p in router.parameters() if p.dim() == 2), None)
    if weight is None:
        return "it has no weight matrix"
    if weight.is_meta:
        return "its weights are on the meta device and cannot be run"
    ran = False
    with still(router), torch.random.fork_rng(devices=[]):
        for out in _runs(router, weight):
            ran = True
            for read in reads:
                try:
                    seen = read(out, None)
                except PlugError:
                    raise
                except Exception:  # the output of another family
                    continue
                if _fits(seen):
                    assert seen.assigned is not None
                    return read, seen.scores.shape[-1], seen.assigned.shape[-1]
    return "what it returns is none of the known forms; give adapters={…}" if ran else "it could not be run on its own"


def _runs(router: nn.Module, weight: Tensor) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    for dim in dict.fromkeys(reversed(weight.shape)):  # (experts, dim), but there are those who transpose
        for shape in ((6, dim), (2, 3, dim)):
            try:
                yield router(torch.randn(shape, generator=generator).to(weight))
            except Exception:  # whatever a module makes of an input that is not of its kind
                continue


def _fits(seen: Seen) -> bool:
    assigned = seen.assigned
    if assigned is None or seen.scores.dim() != 2:
        return False
    rows, experts = seen.scores.shape
    if assigned.is_floating_point() or rows != 6 or assigned.dim() != 2 or len(assigned) != rows:
        return False
    inside = bool(((assigned >= 0) & (assigned < experts)).all())
    return inside and assigned.shape[-1] <= experts and (seen.weights is None or len(seen.weights) == rows)


def no_router(module: nn.Module, left: Sequence[str]) -> str:
    """The message for a model without a router."""
    around = [
        f"{name} ({type(m).__name__} {tuple(m.weight.shape)})"
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and m.out_features <= 256 and re.search(r"moe|expert|gate|rout", name, re.IGNORECASE)
    ]
    return (
        "finds no router in this model: none of gateplug's gates, no module whose class name ends in Router and returns what a "
        f"known family returns. Looked at: {listed(left)}. Linear layers that may be one: {listed(around)}. For a router of your "
        "own give adapters={MyRouter: lambda out: (logits, chosen_experts)}"
    )

"""What routers of known families return, read into one form; a user's own router is another, given as an adapter.

One row of the table of families (transformers 5.24) is one function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from gateplug.core.errors import PlugError
from gateplug.moe.routing import Routing
from gateplug.moe.rows import at_least_float32

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
    """(T, experts), with a graph: the chance of each choice; its sum over the rows is the smooth load."""
    masked: bool = False
    """Padding is left out already."""
    q: Tensor | None = None
    """(T, experts) with a graph, of a gate without logits: what stands for p."""
    by_expert: bool = False
    """How `weights` are given; with k = experts their shape does not tell."""
    selectors: Tensor | None = None
    """(T, k, experts) of DSelect-k, with a graph."""

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
        scores = at_least_float32(scores)
        return (scores - scores.logsumexp(-1, keepdim=True)).exp()  # on few experts four times as fast as softmax


Read = Callable[[Any, int | None], Seen]
"""From a router's output and its k, if that is known, to what it did."""


def tapped(out: Routing, k: int | None = None) -> Seen:
    """Gates of gateplug."""
    slots = out.slots if out.kept is None else None
    weights = out.weights if slots is None else slots
    return Seen(out.logits, out.assigned, weights, out.kept, out.load, out.masked, out.q, slots is None, out.selectors)


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
        if weights is not None and weights.shape != assigned.shape:
            raise PlugError(
                f"the adapter of {self.router} gave weights {tuple(found[2].shape)} for chosen experts {tuple(found[1].shape)}; "
                "they must be the weights of the chosen, in one shape with them"
            )
        return Seen(logits, assigned, weights)

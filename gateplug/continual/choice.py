"""Which context a batch is of, at test, when nobody says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gateplug.continual.own_steps import run_step
from gateplug.core.answers import Answers, muted
from gateplug.core.batches import labels_of
from gateplug.core.processes import world_size

if TYPE_CHECKING:
    from gateplug.continual.callback import GateON

Score = Callable[[Tensor], Tensor]
"""Of a batch's logits (B, C); the smallest is taken."""
STEPS = {"val": "validation_step", "test": "test_step", "predict": "predict_step"}


def choose(
    module: nn.Module, gateon: GateON, step: str, arguments: tuple[Any, int], score: Literal["entropy"] | Score, labelled: int
) -> int:
    """Run a batch in every context that was trained, and leave the network in the one that scores best.

    Args:
        module: the LightningModule.
        gateon: whose contexts.
        step: the method that runs a batch.
        arguments: batch and its number.
        score: of the logits.
        labelled: samples whose labels may be looked at; the context is then the one with the smallest loss on them.

    Returns:
        The context.
    """
    scores = []
    for context in range(gateon.known):
        gateon.show(module, context)
        with muted(module), torch.no_grad(), Answers(module) as answers:
            run_step(module, *arguments, step)
        scores.append(_scored(answers.last.logits, arguments[0], score, labelled))
    found = torch.stack(scores)
    if world_size() > 1:  # all processes choose alike
        dist.all_reduce(found)
    best = int(found.argmin())
    gateon.show(module, best)
    return best


def _scored(logits: Tensor, batch: Any, score: Literal["entropy"] | Score, labelled: int) -> Tensor:
    if labelled:
        return nn.functional.cross_entropy(logits[:labelled].float(), labels_of(batch)[:labelled])
    values = entropy(logits) if score == "entropy" else score(logits)
    return values.detach().float().mean()


def shared(loss: Tensor) -> float:
    """A loss as all processes see it together."""
    value = loss.detach().float().clone()
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return float(value)


def entropy(logits: Tensor) -> Tensor:
    """Predictive entropy of each row of logits (B, C), in nats: (B,)."""
    with torch.no_grad():
        log_p = logits.float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

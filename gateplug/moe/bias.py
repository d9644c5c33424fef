"""Balance without a loss (arXiv 2408.15664): a bias, by which experts are chosen and not weighted, moved after each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gateplug.core.processes import world_size
from gateplug.moe.functional import bias_step
from gateplug.moe.gates import SigmoidGate
from gateplug.moe.regulate import Regulator


def bias_of(router: nn.Module) -> Tensor | None:
    """The balancing bias of a router, if it has one: a buffer (E,), or a frozen parameter (1, E) in Ernie 4.5."""
    if isinstance(router, SigmoidGate):
        return router.bias
    for holder in (router, getattr(router, "moe_statics", None)):
        bias = getattr(holder, "e_score_correction_bias", None)
        if isinstance(bias, Tensor):
            return bias
    return None


@dataclass
class Balanced:
    """A router whose bias is moved."""

    name: str
    regulator: Regulator
    bias: Tensor
    exact: Tensor | None = None
    """The bias in float32, where the model holds it in half precision: many steps are smaller than what that can tell apart."""


def move(routers: list[Balanced], rate: float) -> None:
    """Move each bias by `rate` towards balance, by the counts of the whole step on all processes, which are then forgotten.

    A layer that saw no rows on any process stays as it is.
    """
    loads = [
        r.regulator.load if r.regulator.load is not None else r.bias.new_zeros(r.bias.numel(), dtype=torch.float32)
        for r in routers
    ]
    for r in routers:
        r.regulator.load = None
    if not loads:
        return
    flat = torch.cat(loads)
    if world_size() > 1:
        dist.all_reduce(flat)
    with torch.no_grad():
        for r, load in zip(routers, torch.split(flat, [len(load) for load in loads]), strict=True):
            before = r.bias if r.exact is None else r.exact.to(r.bias.device)
            after = bias_step(before.flatten().to(load.dtype), load, rate).view_as(r.bias)
            if r.bias.dtype.itemsize < load.dtype.itemsize:
                r.exact = after
            r.bias.copy_(after)

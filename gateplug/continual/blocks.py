"""A step of availability of single weights, block by block: a pass over the memory of a large layer is what it costs."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 15
"""Numbers of a block: weight, gradient, availability and what is computed of them fit into a core's cache."""


@torch.no_grad()
def step_in_blocks(draft: Tensor, weight: Tensor, grad: Tensor, eta: float, reactivation: float) -> bool:
    """What `functional.availability_step` makes of `functional.parameter_relevance`, in place, on the CPU.

    Args:
        draft: availability, contiguous float32; changed.
        weight: contiguous, of the same shape.
        grad: the same.
        eta: rate.
        reactivation: ε.

    Returns:
        Whether the relevance was finite; where it was not, or 0 everywhere, nothing is changed.
    """
    parts = [torch.split(t.detach().flatten(), BLOCK) for t in (draft, weight, grad)]
    total = torch.zeros(())
    for _, w, g in zip(*parts, strict=True):
        product = w.float() * g.float()
        total += torch.dot(product, product)
    mean = total / draft.numel()
    if not bool(mean.isfinite()) or not bool(mean > 0):
        return bool(mean.isfinite())
    factor = eta / mean
    for a, w, g in zip(*parts, strict=True):
        product = w.float() * g.float()
        share = product.mul_(product).mul_(factor).sub_(eta * reactivation)
        a.addcmul_(a, share, value=-1).clamp_(0, 1)
    return True

"""Parameters that a step did not use, kept in its graph: distributed training waits for a gradient of each."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from gateplug.core.processes import world_size


def keep(out: Tensor, unused: Iterable[nn.Parameter]) -> Tensor:
    """Return `out`, with a gradient of zero for parameters that had no part in it, where there are several processes.

    On one process their gradient stays None: an optimizer with weight decay or momentum then leaves them alone. With several,
    one process may have used what another has not, and the reduction of the gradients would wait for ever.
    """
    if world_size() == 1:
        return out
    for p in unused:
        if p.requires_grad:
            out = out + p.flatten()[:0].sum().to(out.dtype)  # not 0 · Σ p, which is NaN for an infinite p
    return out

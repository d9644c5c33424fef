"""BatchNorm in several contexts: statistics that are shared would be those of the last context for all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gateplug.core.gate import Reshaped
from gateplug.core.processes import world_size


class ContextStatistics(Reshaped):
    """Running statistics of a BatchNorm for each context. Those of the active one are in the layer itself.

    Args:
        layer: with running statistics.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # no sub-module: it is this module's parent
        for name, value in self._fresh().items():
            self.register_buffer(name, value)

    def _fresh(self) -> dict[str, Tensor]:
        like = self._layer[0].running_mean
        assert isinstance(like, Tensor)
        zeros = torch.zeros_like(like)[None]
        return {"mean": zeros, "var": zeros + 1, "batches": torch.zeros(1, dtype=torch.int64, device=like.device)}

    def _held(self) -> dict[str, Tensor]:
        layer: nn.Module = self._layer[0]
        found = {"mean": layer.running_mean, "var": layer.running_var, "batches": layer.num_batches_tracked}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def grow(self, contexts: int) -> None:
        """Have statistics for so many contexts: fresh ones for those that are new."""
        while len(self.mean) < contexts:
            for name, value in self._fresh().items():
                setattr(self, name, torch.cat([getattr(self, name), value]))

    def before_load(self, state: dict[str, Tensor], name: str) -> None:
        """Have as many contexts as the checkpoint."""
        stored = state.get(f"{name}.mean")
        if stored is not None:
            self.grow(len(stored))
            for part in ("mean", "var", "batches"):
                setattr(self, part, getattr(self, part)[: len(stored)])

    @torch.no_grad()
    def swap(self, old: int, new: int) -> None:
        """Put the layer's statistics away for context `old`, and give it those of `new`."""
        for name, value in self._held().items():
            kept = getattr(self, name)
            if world_size() > 1:  # each process has seen another part of the last batch
                dist.broadcast(value, 0)
            kept[old] = value
            value.copy_(kept[new])


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """BatchNorms with running statistics, by name."""
    norms = {n: m for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {name: m for name, m in norms.items() if m.running_mean is not None}

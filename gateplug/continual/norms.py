"""BatchNorm in several contexts: statistics that are shared would be those of the last context for all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gateplug.core.gate import Reshaped
from gateplug.core.processes import world_size


class ContextStatistics(Reshaped):
    """Running statistics of a BatchNorm for each context. Those of the active one are in the layer itself.

    A new context begins with those that the layer had when it was attached: of a pretrained network they are worth something.

    Args:
        layer: with running statistics.
        contexts: to begin with, ≥ 1.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor

    def __init__(self, layer: nn.Module, contexts: int) -> None:
        super().__init__()
        self._layer = (layer,)  # no sub-module: it is this module's parent
        for name, value in self._held().items():
            self.register_buffer(name, value.detach().clone()[None])  # the first row is the beginning of all
        self.grow(contexts)

    @property
    def contexts(self) -> int:
        """How many there are."""
        return len(self.mean) - 1

    def _held(self) -> dict[str, Tensor]:
        layer: nn.Module = self._layer[0]
        found = {"mean": layer.running_mean, "var": layer.running_var, "batches": layer.num_batches_tracked}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def grow(self, contexts: int) -> None:
        """Have statistics for so many contexts: fresh ones for those that are new."""
        for name in self._buffers if contexts > self.contexts else ():
            kept = getattr(self, name)
            setattr(self, name, torch.cat([kept, kept[:1].expand(1 + contexts - len(kept), *kept.shape[1:])]))

    def before_load(self, state: dict[str, Tensor], name: str) -> None:
        """Have as many contexts as the checkpoint."""
        stored = state.get(f"{name}.mean")
        if stored is not None:
            self.grow(len(stored) - 1)
            for part in self._buffers:
                setattr(self, part, getattr(self, part)[: len(stored)])

    @torch.no_grad()
    def swap(self, old: int, new: int) -> None:
        """Put the layer's statistics away for context `old`, and give it those of `new`."""
        for name, value in self._held().items():
            kept = getattr(self, name)
            kept[1 + old] = value
            value.copy_(kept[1 + new])
            kept[1 + new] = kept[0]  # what is in the layer is nowhere else: the state does not tell what was shown in between

    @torch.no_grad()
    def agree(self) -> None:
        """Each process has seen another part of the last batch: the first one's statistics count, as they do in DDP."""
        if world_size() > 1:
            for value in self._held().values():
                dist.broadcast(value, 0)


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """BatchNorms (and InstanceNorms) with running statistics, by name."""
    norms = {n: m for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    return {name: m for name, m in norms.items() if m.running_mean is not None}

"""What is run when a sample leaves at an exit, in multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gateplug.core.cost import counted_macs
from gateplug.early_exit.branch import ExitBranch


def exit_costs(net: nn.Module, branches: Sequence[ExitBranch], call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Costs of leaving at each exit, as shares of running everything: (L,) float64, increasing, the last 1.

    Up to an exit: what comes before it, its head and all heads before it, and 9 C + 6 for each gate.

    Args:
        net: the network, with its exits.
        branches: in order.
        call: arguments for one sample.
    """
    at: list[int] = []
    handles: list[RemovableHandle] = []
    listening = [branch.listening for branch in branches]
    gates = 0
    with counted_macs(net) as so_far:

        def passed(branch: nn.Module, args: Any, out: Any) -> None:
            nonlocal gates
            assert isinstance(branch, ExitBranch)
            logits = branch.logits  # runs the head
            assert logits is not None
            gates += 9 * logits.shape[-1] + 6
            at.append(so_far() + gates)

        try:
            for branch in branches:
                branch.listening = True
                handles.append(branch.register_forward_hook(passed))
            net(*call[0], **call[1])
            total = so_far() + gates
        finally:
            for handle in handles:
                handle.remove()
            for branch, was in zip(branches, listening, strict=True):
                branch.listening = was
                branch.forget()
    return torch.tensor([*at, total], dtype=torch.float64) / max(total, 1)

"""Unused parameters under several processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gateplug.core.graph import keep


def test_unused_parameters_get_a_zero_gradient_where_there_are_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    used, unused, frozen = (nn.Parameter(torch.tensor([2.0, float("inf")])) for _ in range(3))
    frozen.requires_grad_(False)
    out = keep(used.detach()[:1] * used[:1], [unused, frozen])
    out.sum().backward()
    assert unused.grad is None, "on one process an unused parameter has no gradient"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    out = keep(used.detach()[:1] * used[:1], [unused, frozen])
    out.sum().backward()
    assert unused.grad is not None
    assert unused.grad.tolist() == [0.0, 0.0], "a gradient of zero, also where the parameter is infinite"
    assert float(out) == 4.0

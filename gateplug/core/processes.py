"""How many processes train together."""

from __future__ import annotations

import torch.distributed as dist


def world_size() -> int:
    """Number of processes of this training; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

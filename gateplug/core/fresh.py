"""Fresh weights for layers that a plug brings in, as spread out as those they replace, and nobody's random stream disturbed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def seeded(name: str, like: Tensor) -> Iterator[None]:
    """Draw random numbers as a function of torch's initial seed, a name and a weight; the running stream stays where it was.

    The weight is in it so that two models whose layers have equal names do not get equal layers.
    """
    salt = float(like.detach().double().sum()) if not like.is_meta else 0.0
    digest = hashlib.blake2b(f"{torch.initial_seed()} {name} {salt!r}".encode(), digest_size=7).digest()
    seed = int.from_bytes(digest, "big")
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the streams of all GPUs
        if like.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def spread(weight: Tensor) -> float:
    """Standard deviation of a weight or bias, 0 for a constant one."""
    return float(weight.detach().double().std(correction=0)) if weight.numel() else 0.0


@torch.no_grad()
def redraw(new: Tensor | None, old: Tensor | None, factor: float = 1.0) -> None:
    """Draw `new` from N(0, (factor · spread of `old`)²); zeros where the old one is constant or missing.

    Models initialise by rules of their own (T5 by the block, GPT-2 by a parameter's name, others by the layer's class). What
    they have in common is seen in the weights themselves.
    """
    if new is not None:
        std = 0.0 if old is None else factor * spread(old)
        new.copy_(torch.randn(new.shape, dtype=torch.float32, device=new.device) * std)

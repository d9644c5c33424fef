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

    The weight is in it so that two models whose layers have equal names do not get equal layers: by its first numbers, as a
    sum over it would differ in its last digits, and so in everything, between numbers of threads.
    """
    salt = [] if like.is_meta else like.detach().flatten()[:64].tolist()
    digest = hashlib.blake2b(f"{torch.initial_seed()} {name} {salt}".encode(), digest_size=7).digest()
    seed = int.from_bytes(digest, "big")
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the streams of all GPUs
        if like.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def spread(weight: Tensor | None) -> float:
    """Standard deviation of a weight or bias; 0 for a constant or missing one.

    Models initialise by rules of their own (T5 by the block, GPT-2 by a parameter's name, others by the layer's class). What
    they have in common is seen in the weights themselves.
    """
    return float(weight.detach().float().std(correction=0)) if weight is not None and weight.numel() else 0.0


@torch.no_grad()
def redraw(new: Tensor | None, std: float) -> None:
    """Draw a weight or bias, if there is one, from N(0, std²)."""
    if new is not None:
        new.copy_(torch.randn(new.shape, dtype=torch.float32, device=new.device) * std)

"""Fresh weights for layers that a plug brings in: the model's own initialiser, and nobody's random stream disturbed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(name: str, device: torch.device | None = None) -> Iterator[None]:
    """Draw random numbers as a function of (torch's initial seed, name), and leave the running stream where it was."""
    digest = hashlib.blake2b(f"{torch.initial_seed()} {name}".encode(), digest_size=7).digest()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest, "big"))
        yield


def initialise(root: nn.Module, name: str, fresh: nn.Module) -> None:
    """Initialise a module that will stand at `name` in `root` as the model around it initialises its own layers.

    Hugging Face models have `_init_weights`; without one, each layer has torch's default already.
    """
    owner = initialiser(root, name)
    if owner is not None:
        with torch.no_grad():
            for module in fresh.modules():
                owner._init_weights(module)  # type: ignore[operator]


def initialiser(root: nn.Module, name: str) -> nn.Module | None:
    """The innermost module around `name` that knows how to initialise weights."""
    parts = name.split(".")
    around = [root.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return next((m for m in reversed(around) if callable(getattr(m, "_init_weights", None))), None)

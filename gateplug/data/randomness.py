"""Random numbers as a function of (seed, epoch, index): counter-based, vectorised over the batch.

A ``torch.Generator`` per sample would be as exact, but is drawn from one sample at a time, and how much is drawn for one
purpose changes what the next one gets. Here each sample has a 63-bit key, and draw number *k* is a hash of (key, stream,
k). So a sample's numbers depend neither on the other samples of its batch nor on the worker, the process or the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gateplug.core.resume import step_seed


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN, _M1, _M2 = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MASK63 = (1 << 63) - 1


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> keeps the sign; a hash needs zeros from the left


def mix(x: Tensor) -> Tensor:
    """One round of splitmix64 on int64 tensors of any shape; the products wrap around modulo 2^64."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


def sample_keys(seed: int, epochs: Sequence[int], indices: Sequence[int]) -> Tensor:
    """Keys of the samples of a batch, ``step_seed(seed, epoch, index)`` for each.

    Args:
        seed: Any integer.
        epochs: One epoch per sample.
        indices: One index per sample, its number in the data set.

    Returns:
        int64 ``(batch,)`` in [0, 2^63).
    """
    state = mix(torch.tensor([_signed(seed & ((1 << 64) - 1))], dtype=torch.int64))
    for numbers in (epochs, indices):
        state = mix(state + torch.tensor([int(n) for n in numbers], dtype=torch.int64))
    return state & _MASK63


def uniform(keys: Tensor, draws: int, stream: int = 0) -> Tensor:
    """Uniform random numbers of each sample.

    Args:
        keys: int64 ``(batch,)``, from :func:`sample_keys`.
        draws: How many numbers per sample. More draws do not change the first ones.
        stream: Which of a sample's independent streams; each user of random numbers takes its own.

    Returns:
        float32 ``(batch, draws)`` in [0, 1), multiples of 2^-24.
    """
    counter = mix(keys + stream)[:, None] + torch.arange(draws, dtype=torch.int64, device=keys.device)
    return _shift(mix(counter), 40).to(torch.float32) / (1 << 24)


def permutation(n: int, *key: int) -> Tensor:
    """A permutation of 0 … n-1 as a function of the key's integers: int64 ``(n,)``."""
    seed, *numbers = key
    return torch.randperm(n, generator=torch.Generator().manual_seed(step_seed(seed, *numbers)))

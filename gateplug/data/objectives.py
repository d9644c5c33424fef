"""The language-modelling objectives: from token ids and the samples' keys to inputs and labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gateplug.data.randomness import uniform
from gateplug.data.tokens import Ids

IGNORE = -100  # a label that torch's cross entropy and Hugging Face's losses leave out
Draws = NDArray[np.float32]


def hide(ids: Tensor, keys: Tensor, mask: int, special: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Masked language modelling: hide some tokens, ask for them.

    Each token that is not special is chosen with ``probability``; of the chosen, 80 % become the mask token, 10 % a
    random token, 10 % stay. At least one token of a text is chosen where there is one to choose, because a batch without
    any would have the loss 0/0.

    Args:
        ids: int64 ``(batch, tokens)``; padding counts as special. More padding changes nothing.
        keys: int64 ``(batch,)``, the samples' keys.
        mask: Id of the mask token.
        special: bool ``(vocabulary,)``, the ids that are never hidden nor drawn.
        probability: In (0, 1).

    Returns:
        (inputs, labels), int64 ``(batch, tokens)`` each; labels are -100 where nothing is asked.

    Source: Devlin et al. 2019, BERT, arXiv 1810.04805, section 3.1, task 1.
    """
    chance, fate, which = (uniform(keys, ids.shape[1], stream) for stream in (1, 2, 3))
    free = ~special[ids]
    chosen = free & (chance < probability)
    none = (free.any(1) & ~chosen.any(1)).nonzero()[:, 0]
    chosen[none, torch.where(free, chance, 2.0)[none].argmin(1)] = True
    ordinary = (~special).nonzero()[:, 0]
    random = ordinary[(which.double() * len(ordinary)).long()]
    hidden = torch.where(fate < 0.8, torch.full_like(ids, mask), torch.where(fate < 0.9, random, ids))
    return torch.where(chosen, hidden, ids), torch.where(chosen, ids, IGNORE)


def noise_spans(length: int, draws: Draws, density: float, mean_span: float) -> NDArray[np.bool_]:
    """Which tokens of a text are noise, in spans of random length: bool ``(length,)``, beginning with what is kept.

    Of n tokens, round(n·density) are noise, in round(noise / mean_span) spans, each at least one token long and with at
    least one kept token before it; noise and kept tokens are each cut at places drawn without replacement.

    Args:
        length: n, ≥ 2.
        draws: Uniform random numbers of the sample, ``(2, ≥ n)``.
        density: Share of noise, in (0, 1).
        mean_span: Mean length of a span in tokens, ≥ 1.

    Source: Raffel et al. 2020, T5, arXiv 1910.10683, section 3.1.4 (``random_spans_noise_mask``).
    """
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    lengths = np.empty(2 * spans, dtype=np.int64)
    lengths[0::2], lengths[1::2] = _pieces(length - noise, spans, draws[0]), _pieces(noise, spans, draws[1])
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _pieces(n: int, count: int, draws: Draws) -> NDArray[np.int64]:
    """Cut n into ``count`` positive lengths, every cut equally likely: int64 ``(count,)``."""
    edges = np.zeros(count + 1, dtype=np.int64)
    edges[1:-1] = np.sort(np.argsort(draws[: n - 1], kind="stable")[: count - 1]) + 1
    edges[-1] = n
    return np.diff(edges)


def corrupt(ids: Ids, draws: Draws, sentinels: list[int], end: int, density: float, mean_span: float) -> tuple[Ids, Ids]:
    """Span corruption: each noise span becomes one sentinel, and the labels spell out what it stands for.

    ``a b c d e`` with noise ``b c`` and ``e`` gives the input ``a <0> d <1> end`` and labels ``<0> b c <1> e end``.

    Args:
        ids: int ``(n,)`` without an end token, n ≥ 1; of a single token nothing is kept.
        draws: Uniform random numbers of the sample, ``(2, ≥ n)``.
        sentinels: Ids in the order of use.
        end: Id that closes inputs and labels.
        density: Share of noise, in (0, 1).
        mean_span: Mean length of a span in tokens, ≥ 1.

    Returns:
        (inputs, labels), of different lengths.

    Raises:
        ValueError: If the text has more spans than there are sentinels.
    """
    noise = noise_spans(len(ids), draws, density, mean_span) if len(ids) > 1 else np.ones(1, dtype=np.bool_)
    starts = noise.copy()
    starts[1:] &= ~noise[:-1]
    count = int(starts.sum())
    if count > len(sentinels):
        raise ValueError(
            f"A text of {len(ids)} tokens has {count} noise spans, and the tokenizer has {len(sentinels)} sentinel tokens "
            "(<extra_id_0> …): use a smaller max_length, a larger mean_span, or a tokenizer of the T5 family."
        )
    marks = np.asarray(sentinels[:count], dtype=ids.dtype)
    inputs = ids.copy()
    inputs[starts] = marks
    place = np.flatnonzero(starts[noise])  # where each span begins among the noise tokens
    labels = np.insert(ids[noise], place, marks)
    return np.append(inputs[starts | ~noise], end).astype(ids.dtype), np.append(labels, end).astype(ids.dtype)

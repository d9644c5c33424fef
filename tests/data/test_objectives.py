"""Hidden tokens and spans: what was hidden can be put back from inputs and labels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateplug.data import sample_keys, uniform
from gateplug.data.objectives import corrupt, hide, noise_spans

SPECIAL = torch.zeros(50, dtype=torch.bool)
SPECIAL[:4] = True  # 0 padding, 1 start, 2 end, 3 mask


def keys(n, epoch=0):
    return sample_keys(0, [epoch] * n, range(n))


def draws(n, sample=0):
    return torch.stack([uniform(keys(sample + 1)[sample:], n, s)[0] for s in (1, 2)]).numpy()


def restore(inputs, labels, sentinels, end):
    """The original, by putting each span where its sentinel stands."""
    assert inputs[-1] == end == labels[-1]
    spans, current = {}, None
    for token in labels[:-1]:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in inputs[:-1] for t in (spans[token] if token in sentinels else [token])]


@given(st.integers(1, 300), st.floats(0.05, 0.6), st.floats(1, 6), st.integers(0, 20))
def test_span_corruption_loses_nothing(length, density, mean_span, sample):
    ids = np.arange(1000, 1000 + length, dtype=np.int32)
    sentinels = list(range(500, 300, -1))
    inputs, labels = corrupt(ids, draws(length, sample), sentinels, 1, density, mean_span)
    assert restore(inputs.tolist(), labels.tolist(), set(sentinels), 1) == ids.tolist()
    used = [t for t in inputs.tolist() if t in sentinels]
    assert used == sentinels[: len(used)] == [t for t in labels.tolist() if t in sentinels]


@given(st.integers(2, 500), st.floats(0.05, 0.6), st.floats(1, 6), st.integers(0, 20))
def test_noise_has_the_share_and_the_mean_length_asked_for(length, density, mean_span, sample):
    noise = noise_spans(length, draws(length, sample), density, mean_span)
    count = int(noise.sum())
    spans = int((np.diff(noise.astype(int)) == 1).sum())
    assert not noise[0]
    assert noise[-1]
    assert count == min(max(round(length * density), 1), length - 1)
    assert spans == min(max(round(count / mean_span), 1), count, length - count)


def test_the_example_of_the_docstring():
    noise = np.array([False, True, True, False, True])
    ids = np.array([10, 11, 12, 13, 14], dtype=np.int32)
    found = next(d for d in (draws(5, s) for s in range(200)) if (noise_spans(5, d, 0.6, 1.5) == noise).all())
    inputs, labels = corrupt(ids, found, [90, 91], 1, 0.6, 1.5)
    assert inputs.tolist() == [10, 90, 13, 91, 1]
    assert labels.tolist() == [90, 11, 12, 91, 14, 1]


def test_more_spans_than_sentinels_are_refused():
    with pytest.raises(ValueError, match=r"A text of 100 tokens has 50 noise spans, and the tokenizer has 3 sentinel"):
        corrupt(np.arange(100, dtype=np.int32), draws(100), [200, 201, 202], 1, 0.5, 1.0)


def test_masking_hides_the_share_of_bert():
    ids = torch.randint(4, 50, (400, 100), generator=torch.Generator().manual_seed(0))
    inputs, labels = hide(ids, keys(400), 3, SPECIAL, 0.15)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    # 5 standard errors over 40,000 tokens, and over some 6,000 chosen ones
    assert abs(chosen.float().mean() - 0.15) < 5 * (0.15 * 0.85 / 40_000) ** 0.5
    now, before = inputs[chosen], ids[chosen]
    masked, same = (now == 3).float().mean(), (now == before).float().mean()
    assert abs(masked - 0.8) < 5 * (0.8 * 0.2 / 6000) ** 0.5
    assert abs(same - (0.1 + 0.1 / 46)) < 5 * (0.1 * 0.9 / 6000) ** 0.5
    assert not SPECIAL[now[now != 3]].any()


@given(st.lists(st.integers(0, 49), min_size=1, max_size=12), st.integers(0, 5))
def test_special_tokens_are_never_hidden_and_one_ordinary_token_always_is(ids, pad):
    row = torch.tensor([ids + [0] * pad])
    inputs, labels = hide(row, keys(1), 3, SPECIAL, 0.01)
    assert not (labels[SPECIAL[row]] != -100).any()
    assert torch.equal(inputs[SPECIAL[row]], row[SPECIAL[row]])
    assert (labels != -100).any() == (~SPECIAL[row]).any()
    short = hide(torch.tensor([ids]), keys(1), 3, SPECIAL, 0.01)
    assert torch.equal(inputs[:, : len(ids)], short[0])  # padding changes nothing


def test_masking_does_not_depend_on_the_batch():
    ids = torch.randint(4, 50, (8, 30), generator=torch.Generator().manual_seed(1))
    whole = hide(ids, keys(8), 3, SPECIAL, 0.15)[0]
    alone = torch.cat([hide(ids[i : i + 1], keys(8)[i : i + 1], 3, SPECIAL, 0.15)[0] for i in range(8)])
    assert torch.equal(whole, alone)

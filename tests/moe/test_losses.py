"""Regularisers and statistics, row by row, and what must hold for any input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateplug.moe import functional as M

FAST = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 10**6)
sizes = {
    "tokens": st.integers(1, 8),
    "experts": st.integers(2, 6),
    "k": st.integers(1, 2),
    "masked": st.booleans(),
    "seed": seeds,
}


def draw(tokens: int, experts: int, k: int, masked: bool, seed: int) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    """Logits, choices, a mask or None, and the rows that count."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=g, dtype=torch.float64)
    mask = torch.rand(tokens, generator=g) > 0.5 if masked else None
    rows = [t for t in range(tokens) if mask is None or mask[t]]
    return logits, logits.topk(k).indices, mask, rows


@FAST
@given(**sizes)
def test_load_balance_is_the_formula(tokens: int, experts: int, k: int, masked: bool, seed: int) -> None:
    logits, assigned, mask, rows = draw(tokens, experts, k, masked, seed)
    p = logits.softmax(-1)
    want = 0.0
    for e in range(experts):
        f = sum(assigned[t].tolist().count(e) for t in rows) / max(len(rows) * k, 1)
        want += experts * f * sum(float(p[t, e]) for t in rows) / max(len(rows), 1)
    assert float(M.load_balance(p, assigned, mask)) == pytest.approx(want, abs=1e-12)
    assert torch.autograd.gradcheck(lambda h: M.load_balance(h.softmax(-1), assigned, mask), logits.requires_grad_())


@FAST
@given(**sizes)
def test_z_loss_importance_and_entropy_are_the_formulas(tokens: int, experts: int, k: int, masked: bool, seed: int) -> None:
    logits, _, mask, rows = draw(tokens, experts, k, masked, seed)
    n = max(len(rows), 1)
    z = sum(math.log(sum(map(math.exp, logits[t].tolist()))) ** 2 for t in rows) / n
    assert float(M.z_loss(logits, mask)) == pytest.approx(z, abs=1e-12)
    p = logits.softmax(-1)
    h = sum(-v * math.log(v) for t in rows for v in p[t].tolist()) / n
    assert float(M.router_entropy(logits, mask)) == pytest.approx(h, abs=1e-12)
    received = [sum(float(p[t, e]) for t in rows) for e in range(experts)]
    mean = sum(received) / experts
    variance = sum((v - mean) ** 2 for v in received) / experts
    assert float(M.importance(p, mask)) == pytest.approx(variance / (mean**2 + 1e-10), abs=1e-11)
    for loss in (M.z_loss, M.router_entropy, M.importance):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, mask), logits.abs().add(0.1).requires_grad_(), atol=1e-4)


@FAST
@given(experts=st.integers(2, 16), rounds=st.integers(1, 4))
def test_load_balance_is_1_at_balance_and_the_number_of_experts_at_collapse(experts: int, rounds: int) -> None:
    even = torch.full((experts * rounds, experts), 1 / experts, dtype=torch.float64)
    in_turn = torch.arange(experts * rounds)[:, None] % experts
    assert float(M.load_balance(even, in_turn)) == pytest.approx(1.0, abs=1e-12)
    assert float(M.load_balance(torch.eye(experts)[[1] * rounds], torch.ones(rounds, 1, dtype=torch.int64))) == pytest.approx(
        experts
    )
    pairs = torch.stack([in_turn[:, 0], (in_turn[:, 0] + 1) % experts], 1)
    assert float(M.load_balance(even, pairs)) == pytest.approx(1.0, abs=1e-12), "1 at balance for k = 2 as well"


def test_load_balance_has_a_gradient_through_the_probabilities_alone_and_pushes_towards_balance() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 4, requires_grad=True)
    M.load_balance(logits.softmax(-1), logits.topk(1).indices).backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, 0] > 0).all())
    assert bool((logits.grad[:, 1:] < 0).all())


@pytest.mark.parametrize("loss", [lambda x, m: M.load_balance(x, x.topk(1).indices, m), M.z_loss, M.importance, M.router_entropy])
@pytest.mark.parametrize("tokens", [0, 3])
def test_no_token_that_counts_gives_0_and_gradients_of_0(loss: Callable[[Tensor, Tensor], Tensor], tokens: int) -> None:
    x = torch.rand(tokens, 4, requires_grad=True)
    value = loss(x, torch.zeros(tokens, dtype=torch.bool))
    value.backward()
    assert float(value.detach()) == 0.0
    assert x.grad is not None
    assert not bool(x.grad.any())


@FAST
@given(**{**sizes, "masked": st.just(True)})
def test_masked_tokens_change_nothing(tokens: int, experts: int, k: int, masked: bool, seed: int) -> None:
    logits, assigned, mask, rows = draw(tokens, experts, k, masked, seed)
    assert mask is not None
    weights = logits.softmax(-1)  # what importance is of; logits may have a mean near 0, and anything divided by it
    for loss, x in ((M.z_loss, logits), (M.router_entropy, logits), (M.importance, weights)):
        assert float(loss(x, mask)) == pytest.approx(float(loss(x[rows])), abs=1e-9)
    if rows:
        p = logits.softmax(-1)
        assert float(M.load_balance(p, assigned, mask)) == pytest.approx(
            float(M.load_balance(p[rows], assigned[rows])), abs=1e-12
        )


@FAST
@given(load=st.lists(st.integers(0, 50), min_size=2, max_size=9), rate=st.floats(0, 1))
def test_bias_moves_by_the_rate_towards_balance(load: list[int], rate: float) -> None:
    bias = torch.linspace(-1, 1, len(load), dtype=torch.float64)
    mean = sum(load) / len(load)
    got = M.bias_step(bias, torch.tensor(load), rate).tolist()
    # an integer load: a mean within rounding of a load is that load
    want = [
        b + rate * (0 if math.isclose(v, mean) else math.copysign(1, mean - v)) for b, v in zip(bias.tolist(), load, strict=True)
    ]
    assert got == pytest.approx(want, abs=1e-12)


@FAST
@given(load=st.lists(st.integers(0, 9), min_size=2, max_size=9), scale=st.floats(0.1, 1e4))
def test_load_statistics_are_the_formulas_at_any_scale(load: list[int], scale: float) -> None:
    got = {name: float(v) for name, v in M.load_statistics(torch.tensor(load, dtype=torch.float64) * scale).items()}
    mean, n = sum(load) / len(load), len(load)
    if not any(load):
        assert got == {"cv": 0.0, "max_violation": 0.0, "entropy": 0.0, "dead": n}
        return
    assert got["cv"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in load) / n) / mean, abs=1e-12)
    assert got["max_violation"] == pytest.approx((max(load) - mean) / mean, abs=1e-12)
    assert got["entropy"] == pytest.approx(
        -sum(v / sum(load) * math.log(v / sum(load)) for v in load if v) / math.log(n), abs=1e-12
    )
    assert got["dead"] == load.count(0)


def test_statistics_of_counts_and_of_a_perfect_and_a_collapsed_load() -> None:
    level = M.load_statistics(torch.tensor([7, 7, 7, 7]))
    assert [float(v) for v in level.values()] == pytest.approx([0.0, 0.0, 1.0, 0.0], abs=1e-6)
    gone = M.load_statistics(torch.tensor([0, 0, 12, 0]))
    assert [float(v) for v in gone.values()] == pytest.approx([math.sqrt(3), 3.0, 0.0, 3.0], abs=1e-6)
    assert gone["dead"].dtype == torch.int64


@FAST
@given(n=st.integers(0, 7), seed=seeds)
def test_selection_overlap_is_the_mean_jaccard_over_pairs(n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    selected, groups = torch.rand(n, 4, generator=g) > 0.6, torch.randint(0, 3, (n,), generator=g)
    sets = [{e for e in range(4) if row[e]} for row in selected]
    found: dict[bool, list[float]] = {True: [], False: []}
    for i in range(n):
        for j in range(i + 1, n):
            union = sets[i] | sets[j]
            found[bool(groups[i] == groups[j])].append(len(sets[i] & sets[j]) / len(union) if union else 0.0)
    for got, want in zip(M.selection_overlap(selected, groups), (found[True], found[False]), strict=True):
        assert float(got) == pytest.approx(sum(want) / len(want) if want else math.nan, abs=1e-12, nan_ok=True)

"""The formulas of the gates, literally, and what must hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gateplug.moe import functional as M

FAST = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 10**6)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def step(t: float, gamma: float) -> float:
    """S as the paper writes it, in three cases."""
    if t <= -gamma / 2:
        return 0.0
    if t >= gamma / 2:
        return 1.0
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


def code(z: list[float], expert: int, gamma: float) -> float:
    """r_i: the product over the bits of i, most significant first."""
    product = 1.0
    for j, z_j in enumerate(z):
        bit = expert >> (len(z) - 1 - j) & 1
        product *= step(z_j, gamma) if bit else 1 - step(z_j, gamma)
    return product


@FAST
@given(t=st.floats(-3, 3), gamma=st.floats(0.05, 4))
def test_smooth_step_is_the_formula_and_its_slope(t: float, gamma: float) -> None:
    x = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    s = M.smooth_step(x, gamma)
    (slope,) = torch.autograd.grad(s, x)
    inside = abs(t) < gamma / 2
    assert float(s.detach()) == pytest.approx(step(t, gamma), abs=1e-13)
    assert float(slope) == pytest.approx(-6 * t**2 / gamma**3 + 3 / (2 * gamma) if inside else 0.0, abs=1e-10 / gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.1, 0.3, 1.0, 3.0, 7.7])
def test_beyond_its_ends_the_step_is_exactly_0_or_1_without_gradient(gamma: float, dtype: torch.dtype) -> None:
    t = torch.tensor([-5.0, -0.51, -0.5, 0.5, 0.51, 5.0]).mul(gamma).to(dtype).requires_grad_()
    s = M.smooth_step(t, gamma)
    s.sum().backward()
    assert s[[0, 1, 4, 5]].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert t.grad is not None
    assert t.grad[[0, 1, 4, 5]].tolist() == [0.0] * 4
    assert bool(((s >= 0) & (s <= 1)).all())


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_a_width_that_is_none_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma=.* must be a finite number > 0"):
        M.smooth_step(torch.zeros(1), gamma)


@FAST
@given(experts=st.integers(2, 19), k=st.integers(1, 3), rows=st.integers(0, 3), gamma=st.floats(0.3, 3), seed=seeds)
def test_codes_are_the_products_over_bits(experts: int, k: int, rows: int, gamma: float, seed: int) -> None:
    bits = math.ceil(math.log2(experts))
    z = normal(rows, k, bits, seed=seed, scale=gamma / 2)
    r = M.selector_codes(z, experts, gamma)
    assert r.shape == (rows, k, experts)
    for i in range(rows):
        for s in range(k):
            want = [code(z[i, s].tolist(), e, gamma) for e in range(experts)]
            assert r[i, s].tolist() == pytest.approx(want, abs=1e-13)


@FAST
@given(bits=st.integers(1, 6), gamma=st.floats(0.3, 3), seed=seeds)
def test_codes_of_a_power_of_two_sum_to_one_and_others_to_less(bits: int, gamma: float, seed: int) -> None:
    z = normal(4, 2, bits, seed=seed, scale=gamma)
    full = M.selector_codes(z, 2**bits, gamma)
    assert torch.allclose(full.sum(-1), torch.ones(4, 2, dtype=torch.float64), atol=1e-12)
    if bits > 1:
        part = M.selector_codes(z, 2**bits - 1, gamma)
        assert torch.equal(part, full[..., :-1]), "codes without an expert are left out, the others stay"


def test_codes_pass_gradcheck() -> None:
    z = normal(3, 2, 3, scale=0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: M.selector_codes(t, 6), z)
    assert torch.autograd.gradcheck(lambda t, w: M.dselect_k(t, w, 6), (z, normal(3, 2, seed=1).requires_grad_()))


@FAST
@given(experts=st.integers(2, 17), k=st.integers(1, 2), seed=seeds)
def test_dselect_k_is_the_weighted_sum_of_its_selectors(experts: int, k: int, seed: int) -> None:
    bits = math.ceil(math.log2(experts))
    z, w = normal(3, k, bits, seed=seed, scale=0.4), normal(3, k, seed=seed + 1)
    q, r = M.dselect_k(z, w, experts)
    for i in range(3):
        total = sum(math.exp(v) for v in w[i].tolist())
        for e in range(experts):
            want = sum(math.exp(w[i, s]) / total * code(z[i, s].tolist(), e, 1.0) for s in range(k))
            assert float(q[i, e]) == pytest.approx(want, abs=1e-13)
    assert r.shape == (3, k, experts)


@FAST
@given(experts=st.integers(2, 40), k=st.integers(1, 4), gamma=st.floats(0.1, 2), seed=seeds)
def test_binary_codes_leave_at_most_k_experts_found_by_rounding(experts: int, k: int, gamma: float, seed: int) -> None:
    k = min(k, experts)
    bits = math.ceil(math.log2(experts))
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, experts, (k,), generator=draw)
    signs = torch.tensor([[2 * (int(e) >> (bits - 1 - j) & 1) - 1 for j in range(bits)] for e in chosen])
    z = signs * gamma * (0.5 + torch.rand(k, bits, generator=draw))
    q, _ = M.dselect_k(z, torch.zeros(k), experts, gamma)
    assert set(q.nonzero().flatten().tolist()) == set(chosen.tolist())
    assert torch.equal(M.hard_selection(z, experts, gamma), chosen)


def test_hard_selection_names_what_is_undecided_or_no_expert() -> None:
    z = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.2, -1.0]])
    with pytest.raises(ValueError, match=r"not binary, and how far off: 1: 0.216"):
        M.hard_selection(z, 8)
    with pytest.raises(ValueError, match=r"codes \[7, 0\], and there are only 6 experts \(0 … 5\)"):
        M.hard_selection(torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]), 6)


@pytest.mark.parametrize(
    ("z", "w", "experts", "message"),
    [
        ((1, 1), (1,), 1, "experts=1 must be at least 2"),
        ((2, 2), (2,), 8, r"z of shape \(2, 2\) must be \(…, k, 3\): 8 experts have codes of 3 bits"),
        ((5, 2), (5,), 4, "k=5 selectors; k must lie in 1 … 4"),
        ((0, 2), (0,), 4, "k=0 selectors"),
        ((2,), (), 4, "k=0 selectors"),
        ((3, 2, 2), (2,), 4, r"w of shape \(2,\) does not go with z of shape \(3, 2, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(z: tuple[int, ...], w: tuple[int, ...], experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M.dselect_k(torch.zeros(z), torch.zeros(w), experts)


def test_entropy_and_reachability_are_the_formulas() -> None:
    r = normal(3, 2, 5).abs() / 5
    for row, h, c in zip(r.reshape(-1, 5).tolist(), M.selector_entropy(r).flatten(), M.reachability(r).flatten(), strict=True):
        assert float(h) == pytest.approx(-sum(v * math.log(v + 1e-6) for v in row), abs=1e-13)
        assert float(c) == pytest.approx(1 / sum(row), rel=1e-13)
    one_hot = torch.eye(4, dtype=torch.float64)
    assert M.selector_entropy(one_hot).tolist() == pytest.approx([0.0] * 4, abs=1.1e-6)
    assert M.reachability(one_hot).tolist() == [1.0] * 4
    assert M.reachability(torch.zeros(3), eps=0.5) == 2.0


@FAST
@given(experts=st.integers(1, 9), data=st.data(), seed=seeds)
def test_top_k_weights_of_the_selected_and_of_all(experts: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, experts))
    h = normal(4, experts, seed=seed)
    for normalize in ("selected", "all"):
        q, chosen = M.top_k_weights(h, k, normalize)
        for row, logits, picks in zip(q.tolist(), h.tolist(), chosen.tolist(), strict=True):
            order = sorted(range(experts), key=lambda e: -logits[e])[:k]
            total = sum(math.exp(logits[e]) for e in (order if normalize == "selected" else range(experts)))
            want = [math.exp(logits[e]) / total if e in order else 0.0 for e in range(experts)]
            assert picks == order
            assert row == pytest.approx(want, abs=1e-13)
    assert torch.autograd.gradcheck(lambda t: M.top_k_weights(t, k)[0], h.requires_grad_())


@pytest.mark.parametrize(
    ("k", "normalize", "message"), [(0, "all", "k=0 must lie in 1 … 4"), (5, "all", "k=5"), (1, "some", "'some'")]
)
def test_top_k_refuses(k: int, normalize: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M.top_k_weights(torch.zeros(2, 4), k, normalize)


@FAST
@given(experts=st.integers(2, 6), data=st.data(), seed=seeds)
def test_noisy_logits_and_smooth_load_are_the_formulas(experts: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, experts - 1))
    x, wg, wn, e = (
        normal(5, 3, seed=seed),
        normal(3, experts, seed=seed + 1),
        normal(3, experts, seed=seed + 2),
        normal(5, experts, seed=seed + 3),
    )
    noisy, clean = M.noisy_logits(x, wg, wn, e), x @ wg
    load = [0.0] * experts
    scale = torch.zeros(5, experts, dtype=torch.float64)
    for t in range(5):
        for i in range(experts):
            scale[t, i] = math.log1p(math.exp(sum(float(x[t, j] * wn[j, i]) for j in range(3))))
            assert float(noisy[t, i]) == pytest.approx(float(clean[t, i] + e[t, i] * scale[t, i]), abs=1e-12)
        ranked = sorted(range(experts), key=lambda i: -float(noisy[t, i]))
        for i in range(experts):
            others = sorted((float(noisy[t, j]) for j in range(experts) if j != i), reverse=True)
            # ψ is the k-th largest of the *other* experts: what i must beat to be chosen
            psi = others[k - 1]
            assert psi == float(noisy[t, ranked[k] if i in ranked[:k] else ranked[k - 1]])
            load[i] += 0.5 * (1 + math.erf((float(clean[t, i]) - psi) / float(scale[t, i]) / math.sqrt(2)))
    assert M.noisy_load(clean, noisy, scale, k).tolist() == pytest.approx(load, abs=1e-12)
    c, s = clean.clone().requires_grad_(), scale.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, s: M.noisy_load(c, noisy, s, k), (c, s))


@pytest.mark.parametrize("k", [0, 3])
def test_smooth_load_needs_somebody_who_is_not_chosen(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} must lie in 1 … 2"):
        M.noisy_load(*[torch.ones(2, 3)] * 3, k=k)


@FAST
@given(tokens=st.integers(1, 7), experts=st.integers(2, 5), capacity=st.integers(1, 9), seed=seeds)
def test_expert_choice_takes_each_experts_best_tokens(tokens: int, experts: int, capacity: int, seed: int) -> None:
    h = normal(tokens, experts, seed=seed)
    taken, weights = M.expert_choice(h, capacity)
    s = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in h.tolist()]
    for e in range(experts):
        best = sorted(range(tokens), key=lambda t: -s[t][e])[: min(capacity, tokens)]
        assert taken[e].tolist() == best
        assert weights[e].tolist() == pytest.approx([s[t][e] for t in best], abs=1e-13)


def test_expert_choice_refuses_no_capacity() -> None:
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        M.expert_choice(torch.zeros(3, 2), 0)

"""Capacities, and the products of many experts: sparse equals dense, grouped equals the loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gateplug.core.activations import ACTIVATIONS
from gateplug.moe import dispatch
from gateplug.moe import functional as M

FAST = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 10**6)
ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Sums of up to 40 numbers of size 1 to 10, in another order."""


def serve(assigned: list[list[int]], order: list[tuple[int, int]], capacity: int) -> list[list[bool]]:
    """One choice after the other; an expert that is full sends away."""
    taken: dict[int, int] = {}
    keep = [[False] * len(row) for row in assigned]
    for t, s in order:
        e = assigned[t][s]
        keep[t][s] = taken.get(e, 0) < capacity
        taken[e] = taken.get(e, 0) + 1
    return keep


@settings(deadline=None, max_examples=100)
@given(
    tokens=st.integers(0, 9), experts=st.integers(1, 5), data=st.data(), capacity=st.integers(1, 5), levels=st.integers(1, 4), seed=seeds
)  # fmt: skip
def test_capacity_serves_first_choices_first_or_the_largest_scores(
    tokens: int, experts: int, data: st.DataObject, capacity: int, levels: int, seed: int
) -> None:
    k = data.draw(st.integers(1, experts))
    g = torch.Generator().manual_seed(seed)
    assigned = torch.rand(tokens, experts, generator=g).topk(k).indices
    scores = torch.randint(0, levels, (tokens, k), generator=g).double()  # with ties
    everybody = [(t, s) for t in range(tokens) for s in range(k)]
    slot_major = sorted(everybody, key=lambda p: (p[1], p[0]))
    by_score = sorted(everybody, key=lambda p: (-float(scores[p]), p[0], p[1]))
    for policy, order in (("position", slot_major), ("score", by_score)):
        keep = M.apply_capacity(assigned, scores, experts, capacity, policy)
        assert keep.shape == (tokens, k)
        assert keep.dtype == torch.bool
        assert keep.tolist() == serve(assigned.tolist(), order, capacity)
        for e in range(experts):
            wanted = int((assigned == e).sum())
            assert int((assigned[keep] == e).sum()) == min(capacity, wanted), "full, and never more"


@FAST
@given(tokens=st.integers(0, 999), experts=st.integers(1, 64), k=st.integers(1, 8), percent=st.integers(1, 400))
@example(tokens=100, experts=10, k=1, percent=110)
@example(tokens=50, experts=7, k=7, percent=114)
def test_capacity_is_the_ceiling_of_the_exact_quotient(tokens: int, experts: int, k: int, percent: int) -> None:
    assert M.expert_capacity(tokens, experts, k, percent / 100) == max(1, -(-percent * tokens * k // (100 * experts)))


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_capacity_factor_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="capacity factor of .* must be a finite number > 0"):
        M.expert_capacity(10, 2, 1, factor)


@pytest.mark.parametrize(
    ("capacity", "policy", "message"), [(0, "score", "capacity=0 must be at least 1"), (1, "first", "'first' must be")]
)
def test_capacity_refuses(capacity: int, policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M.apply_capacity(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), 2, capacity, policy)


def test_pairs_are_those_with_a_weight_sorted_by_expert_then_token() -> None:
    q = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, -0.2], [0.0, 0.0, 0.0]], requires_grad=True)
    token, expert, weight = M.sorted_pairs(q)
    assert list(zip(expert.tolist(), token.tolist(), strict=True)) == [(0, 1), (1, 0), (2, 0), (2, 1)]
    assert torch.equal(weight, torch.tensor([1.0, 0.5, 0.5, -0.2]))
    weight.sum().backward()
    assert torch.equal(q.grad, (q != 0).float())


def parts(
    tokens: int, experts: int, k: int, d: int, h: int, o: int, bias: bool, pick: str, seed: int, dtype: torch.dtype
) -> list[Tensor | None]:
    """x, weights with k experts a token (or none, or one and the same), w_in, w_out, b_in, b_out."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, d), (tokens, experts), (experts, h, d), (experts, o, h)]
    x, q, w_in, w_out = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    keep = torch.zeros_like(q)
    if pick == "some":
        keep = keep.scatter(-1, q.topk(k).indices, 1.0) * (torch.rand(tokens, 1, generator=g) > 0.2)
    elif pick == "one":
        keep[:, experts // 2] = 1.0
    biases = [torch.randn(experts, n, generator=g, dtype=torch.float64) for n in (h, o)] if bias else [None, None]
    every: list[Tensor | None] = [x, q * keep, w_in, w_out, *biases]
    return [None if t is None else t.to(dtype).requires_grad_() for t in every]


def dense(
    x: Tensor, q: Tensor, w_in: Tensor, w_out: Tensor, activation: str, b_in: Tensor | None, b_out: Tensor | None
) -> Tensor:
    """All experts on all tokens."""
    hidden = torch.einsum("td,ehd->teh", x, w_in)
    hidden = ACTIVATIONS[activation](hidden if b_in is None else hidden + b_in)
    out = torch.einsum("teh,eoh->teo", hidden, w_out)
    return torch.einsum("te,teo->to", q, out if b_out is None else out + b_out)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 12), experts=st.integers(1, 6), data=st.data(), d=st.sampled_from([4, 5, 8]), h=st.sampled_from([3, 8]),
    o=st.sampled_from([2, 8]), bias=st.booleans(), pick=st.sampled_from(["some", "none", "one"]), name=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seed=seeds,
)  # fmt: skip
def test_expert_mlp_is_the_dense_sum_with_its_gradients(
    tokens: int,
    experts: int,
    data: st.DataObject,
    d: int,
    h: int,
    o: int,
    bias: bool,
    pick: str,
    name: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    k = data.draw(st.integers(1, experts))
    sparse = parts(tokens, experts, k, d, h, o, bias, pick, seed, dtype)
    # the reference in float64, from the same rounded numbers
    full = [None if t is None else t.detach().double().requires_grad_() for t in sparse]
    y = M.expert_mlp(*sparse[:4], name, *sparse[4:])  # type: ignore[arg-type]
    want = dense(*full[:4], name, *full[4:])  # type: ignore[arg-type]
    assert y.dtype == dtype
    tolerance = ROUNDING[dtype]
    assert torch.allclose(y.detach().double(), want, rtol=tolerance, atol=tolerance)
    y.double().sin().sum().backward()
    want.sin().sum().backward()
    for i, (a, b) in enumerate(zip(sparse, full, strict=True)):
        if a is not None and b is not None:
            assert a.grad is not None
            assert b.grad is not None
            # a weight that is zero has no gradient: that expert did not run
            expected = b.grad * (full[1] != 0) if i == 1 else b.grad
            if dtype != torch.bfloat16:
                assert torch.allclose(a.grad.double(), expected, rtol=5 * tolerance, atol=5 * tolerance), i


@pytest.mark.parametrize("bias", [True, False])
def test_expert_mlp_passes_gradcheck(bias: bool) -> None:
    x, q, w_in, w_out, b_in, b_out = parts(4, 3, 2, 3, 4, 2, bias, "some", 0, torch.float64)
    used = (q != 0).double()

    def run(*t: Tensor) -> Tensor:
        return M.expert_mlp(t[0], t[1] * used, t[2], t[3], "silu", *t[4:])

    leaves = [t for t in (x, q, w_in, w_out, b_in, b_out) if t is not None]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_expert_mlp_names_the_activations_that_it_knows() -> None:
    with pytest.raises(ValueError, match="'selu' is not known; allowed are .*silu"):
        M.expert_mlp(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), "selu")


def loop(rows: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One expert after the other."""
    ends = counts.cumsum(0).tolist()
    each = zip([0, *ends[:-1]], ends, range(len(ends)), strict=True)
    return torch.cat([F.linear(rows[a:b], weight[e], None if bias is None else bias[e]) for a, b, e in each])


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COUNTS = [[3, 0, 4, 2], [0, 0, 0, 9], [0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(8, 16), (6, 8), (8, 6), (7, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear_is_the_loop(dtype: torch.dtype, size: tuple[int, int], bias: bool, counts: list[int]) -> None:
    d, n = size
    g = torch.Generator().manual_seed(0)
    shapes = [(sum(counts), d), (4, n, d), *([(4, n)] if bias else [])]
    ours = [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]
    peer = [t.detach().double().requires_grad_() for t in ours]
    c = torch.tensor(counts)
    y, want = M.grouped_linear(ours[0], c, *ours[1:]), loop(peer[0], c, *peer[1:])
    assert y.dtype == dtype
    y.sum().backward()  # its gradient is expanded
    want.sum().backward()
    tolerance = ROUNDING[dtype]
    assert torch.allclose(y.detach().double(), want, rtol=tolerance, atol=tolerance)
    for a, b in zip(ours, peer, strict=True):
        assert a.grad is not None
        assert torch.allclose(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance)


def layouts() -> dict[str, tuple[Tensor, Tensor]]:
    """Rows (6, 8) and weights (3, 8, 8) that lie in memory as they like."""
    x, w = torch.randn(6, 8), torch.randn(3, 8, 8)
    return {
        "transposed rows": (torch.randn(8, 6).T, w),
        "rows of a wider tensor": (torch.randn(6, 20)[:, 3:11], w),
        "rows that begin between": (torch.randn(49)[1:].view(6, 8), w),
        "expanded rows": (torch.randn(1, 8).expand(6, 8), w),
        "transposed weights": (x, torch.randn(3, 8, 8).transpose(1, 2)),
        "weights with experts last": (x, torch.randn(8, 8, 3).permute(2, 0, 1)),
        "weights that begin between": (x, torch.randn(193)[1:].view(3, 8, 8)),
    }


@pytest.mark.parametrize("layout", list(layouts()))
@pytest.mark.parametrize("wanted", ["both", "rows", "weights"])
def test_grouped_linear_takes_any_layout_and_any_part_that_learns(layout: str, wanted: str) -> None:
    torch.manual_seed(0)
    x, w = (t.detach() for t in layouts()[layout])
    x.requires_grad_(wanted != "weights")
    w.requires_grad_(wanted != "rows")
    leaves, counts = [t for t in (x, w) if t.requires_grad], torch.tensor([2, 0, 4])
    y, want = M.grouped_linear(x, counts, w), loop(x, counts, w)
    assert torch.allclose(y, want, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_grouped_linear_has_second_gradients() -> None:
    torch.manual_seed(0)
    x, w, counts = torch.randn(6, 8, requires_grad=True), torch.randn(3, 8, 8, requires_grad=True), torch.tensor([2, 0, 4])
    found = []
    for form in (M.grouped_linear, loop):
        (first,) = torch.autograd.grad(form(x, counts, w).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, w]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)  # numbers up to 1e4 in float32


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear_follows_autocast_as_linear_does(bias: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(s, requires_grad=True) for s in [(6, 8), (3, 8, 8), *([(3, 8)] if bias else [])]]
    counts = torch.tensor([2, 0, 4])
    with torch.autocast("cpu", torch.bfloat16):
        ours, peer = (form(leaves[0], counts, *leaves[1:]) for form in (M.grouped_linear, loop))
        assert M.grouped_linear(leaves[0].double(), counts, leaves[1].double()).dtype == torch.float64
    assert ours.dtype == peer.dtype == torch.bfloat16
    assert torch.allclose(ours.float(), peer.float(), atol=0.1)
    grads = torch.autograd.grad(ours.float().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads), "parameters stay float32"


def test_a_torch_without_a_grouped_product_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, w, b, counts = torch.randn(6, 8), torch.randn(3, 16, 8), torch.randn(3, 16), torch.tensor([2, 0, 4])
    calls = []
    if hasattr(F, "grouped_mm"):
        inner = F.grouped_mm
        monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or inner(*a, **k))
    grouped = M.grouped_linear(x, counts, w, b)
    assert len(calls) == hasattr(F, "grouped_mm"), "the fast path is taken where there is one"
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    assert not dispatch._grouped(x, w)
    assert torch.allclose(M.grouped_linear(x, counts, w, b), grouped, atol=1e-5)

"""Mixtures: sparse equals dense, only what is chosen runs, and what leaves the training equals what was in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gateplug as gp
from gateplug.moe.routing import ExpertGate
from tests.moe.test_dispatch import serve

D, OUT = 4, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*has terms of its own")
CHOOSING: dict[str, Callable[[int, int], ExpertGate]] = {
    "top-k": lambda e, k: gp.TopKGate(e, k, D),
    "top-k of all": lambda e, k: gp.TopKGate(e, k, D, normalize="all"),
    "sigmoid": lambda e, k: gp.SigmoidGate(e, k, D),
}
GATES: dict[str, Callable[[int, int], ExpertGate]] = CHOOSING | {
    "dselect": lambda e, k: gp.DSelectK(e, k, D, gamma=0.02),
    "softmax": lambda e, k: gp.SoftmaxGate(e, D),
    "expert choice": lambda e, k: gp.ExpertChoiceGate(e, D, 1.0),
}


class Two(nn.Module):
    """A two-layer expert of somebody's own that counts its calls."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.a, self.g, self.b = nn.Linear(D, 8), nn.Linear(D, 8) if gated else None, nn.Linear(8, OUT)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        hidden = nn.functional.silu(self.a(x)) if self.g is None else nn.functional.silu(self.g(x)) * self.a(x)
        return self.b(hidden)


def stacked(experts: list[Two]) -> gp.ExpertMLP:
    """The same experts with stacked weights."""
    gated = experts[0].g is not None
    mlp = gp.ExpertMLP(len(experts), D, 8, activation="silu", out_dim=OUT, gated=gated)
    with torch.no_grad():
        for i, e in enumerate(experts):
            first = [e.a] if e.g is None else [e.g, e.a]
            mlp.w_in[i], mlp.b_in[i] = torch.cat([m.weight for m in first]), torch.cat([m.bias for m in first])
            mlp.w_out[i], mlp.b_out[i] = e.b.weight, e.b.bias
    return mlp


def dense(layer: gp.MoE, x: Tensor, mask: Tensor, each: Callable[[Tensor], Tensor]) -> Tensor:
    """All experts `each(rows)` (E, R, OUT) on all rows, weighted."""
    rows = x[mask]
    q = layer.gate(rows)
    if layer.capacity_factor is not None:
        picked = q.topk(layer.gate.k).indices
        slots = q.gather(-1, picked)
        everybody = [(t, s) for t in range(len(rows)) for s in range(layer.gate.k)]
        key = (lambda p: (p[1], p[0])) if layer.drop == "position" else (lambda p: (-float(slots[p].detach()), p[0], p[1]))
        capacity = max(1, math.ceil(layer.capacity_factor * len(rows) * layer.gate.k / layer.gate.experts - 1e-9))
        keep = torch.tensor(serve(picked.tolist(), sorted(everybody, key=key), capacity)).view_as(slots)
        q = torch.zeros_like(q).scatter(-1, picked, slots * keep)
    y = torch.einsum("re,ero->ro", q, each(rows))
    return torch.zeros(*mask.shape, OUT, dtype=y.dtype).index_put((mask,), y if layer.shared is None else y + layer.shared(rows))


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(list(GATES)), experts=st.integers(2, 6), data=st.data(), rows=st.integers(0, 7), form=st.sampled_from(["list", "mlp", "gated"]),
    factor=st.sampled_from([None, 0.4, 1.0]), drop=st.sampled_from(["position", "score"]), shared=st.booleans(), masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_sparse_is_the_dense_sum_with_its_gradients(
    name: str, experts: int, data: st.DataObject, rows: int, form: str, factor: float | None, drop: Any, shared: bool, masked: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, experts))
    every: Any = (
        [Two() for _ in range(experts)] if form == "list" else gp.ExpertMLP(experts, D, 8, out_dim=OUT, gated=form == "gated")
    )
    layer = gp.MoE(every, GATES[name](experts, k), Two() if shared else None, factor if name in CHOOSING else None, drop).to(
        dtype
    )
    layer.gate.requires_grad_()
    for p in layer.gate.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, rows, D, dtype=dtype, requires_grad=True)
    mask = torch.rand(2, rows) > 0.3 if masked else torch.ones(2, rows, dtype=torch.bool)
    leaves = [x, *layer.parameters()]

    y = layer(x, mask if masked else None)
    want = dense(layer, x, mask, layer.experts.every)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11  # sums of a few numbers, in another order
    assert y.shape == (2, rows, OUT)
    assert y.dtype == dtype
    assert torch.allclose(y, want, atol=tolerance)
    ours = torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)
    peer = torch.autograd.grad(want.sin().sum(), leaves, allow_unused=True)
    for leaf, a, b in zip(leaves, ours, peer, strict=True):
        zero = torch.zeros_like(leaf)
        assert torch.allclose(zero if a is None else a, zero if b is None else b, atol=10 * tolerance)


@pytest.mark.parametrize("gate", [gp.TopKGate(5, 2, D), gp.DSelectK(5, 2), gp.SoftmaxGate(5)])
@pytest.mark.parametrize("gated", [True, False])
def test_a_list_and_stacked_weights_agree(gated: bool, gate: ExpertGate) -> None:
    torch.manual_seed(0)
    experts = [Two(gated) for _ in range(5)]
    one, other = gp.MoE(experts, gate), gp.MoE(stacked(experts), gate)
    x = torch.randn(3, 9, D)
    assert torch.allclose(one(x), other(x), atol=1e-6)
    assert torch.allclose(one.experts.every(x[0]), other.experts.every(x[0]), atol=1e-6)


def steer(gate: gp.TopKGate, *order: int) -> gp.TopKGate:
    """Make a gate of 4 experts prefer them in this order for every row of positive numbers."""
    with torch.no_grad():
        gate.logits.weight.zero_()
        for place, e in enumerate(order):
            gate.logits.weight[e] = 4.0 - place
    return gate


def test_only_experts_with_a_weight_run_and_the_others_have_no_gradient() -> None:
    experts = [Two() for _ in range(4)]
    layer = gp.MoE(experts, steer(gp.TopKGate(4, 2, D), 3, 1, 0, 2))
    for e in experts:
        e.calls.clear()  # the dry run of the constructor
    layer(torch.rand(6, D) + 0.1).sum().backward()
    assert [e.calls for e in experts] == [[], [6], [], [6]]
    assert [all(p.grad is None for p in e.parameters()) for e in experts] == [True, False, True, False]


def test_a_static_gate_runs_the_selected_experts_once_on_all_rows() -> None:
    experts = [Two() for _ in range(8)]
    gate = decided(gp.DSelectK(8, 2), [6, 1])
    layer = gp.MoE(experts, gate)
    x = torch.randn(2, 5, D)
    for e in experts:
        e.calls.clear()
    y = layer(x)
    assert [i for i, e in enumerate(experts) if e.calls] == [1, 6]
    a = gate.w.softmax(0)
    assert torch.allclose(y, a[0] * experts[6](x) + a[1] * experts[1](x), atol=1e-6)
    mask = torch.rand(2, 5) > 0.5
    assert torch.equal(layer(x, mask), y * mask[..., None])


def decided(gate: gp.DSelectK, codes: list[Any]) -> gp.DSelectK:
    """Set the selectors of a static gate to these experts."""
    numbers = torch.tensor(codes)
    shifts = torch.arange(gate.bits - 1, -1, -1)
    with torch.no_grad():
        gate.z.copy_(((numbers[..., None] >> shifts & 1) * 2.0 - 1.0) * gate.gamma)
    return gate


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("form", ["list", "mlp"])
@pytest.mark.parametrize("dim", [None, D])
def test_every_task_has_its_own_sum_over_shared_experts(dim: int | None, form: str, single: bool) -> None:
    torch.manual_seed(0)
    experts = [Two() for _ in range(6)]
    gates: Any = (
        gp.TopKGate(6, 2, dim, tasks=3)
        if single
        else [gp.TopKGate(6, 2, dim), gp.DSelectK(6, 2, dim, 0.02), gp.TopKGate(6, 1, dim)]
    )
    layer = gp.MultiGateMoE(experts if form == "list" else stacked(experts), gates, shared=Two())
    for p in layer.gates.parameters():
        nn.init.normal_(p)
    for e in experts:
        e.calls.clear()
    x, mask = torch.randn(7, D, requires_grad=True), torch.tensor([True] * 5 + [False] * 2)
    y = layer(x)
    assert y.shape == (7, 3, OUT)
    if form == "list":
        assert max(len(e.calls) for e in experts) == 1, "an expert runs once for all tasks"
    q = torch.cat([g(x).reshape(7, -1, 6) for g in layer.gates], 1)
    if form == "list":
        needed = (q != 0).any(1)
        assert [sum(e.calls) for e in experts] == ([7 * bool(n) for n in needed[0]] if dim is None else needed.sum(0).tolist())
    want = torch.einsum("rte,ero->rto", q, layer.experts.every(x)) + layer.shared(x)[:, None]
    assert torch.allclose(y, want, atol=1e-5)
    leaves = [x, *(p for p in layer.parameters())]
    ours, peer = (torch.autograd.grad(t.sin().sum(), leaves, allow_unused=True) for t in (y, want))
    for leaf, a, b in zip(leaves, ours, peer, strict=True):
        zero = torch.zeros_like(leaf)
        assert torch.allclose(zero if a is None else a, zero if b is None else b, atol=1e-4)
    assert torch.allclose(layer(x, mask), want * mask[:, None, None], atol=1e-5)
    assert layer(x[:0]).shape == (0, 3, OUT)


class Tuple(Two):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: gp.MoE(gp.ExpertMLP(4, D, 8), gp.TopKGate(4, 2, 6)), ValueError, "experts take rows of width 4, and the gate rows of width 6"),
    (lambda: gp.MoE([Two(), Two()], gp.TopKGate(2, 1, 6)), ValueError, r"expert 0 \(Two\) does not take rows of width 6"),
    (lambda: gp.MoE([Two(), nn.Linear(D, 5)], gp.TopKGate(2, 1, D)), ValueError, r"outputs of one shape, and have 0: \(3,\), 1: \(5,\)"),
    (lambda: gp.MoE([Two(), Tuple()], gp.TopKGate(2, 1, D)), TypeError, r"expert 1 \(Tuple\) returns a tuple; an expert returns one tensor"),
    (lambda: gp.MoE([Two(), nn.Flatten(0)], gp.TopKGate(2, 1, D)), ValueError, r"expert 1 maps 2 rows to shape \(8,\); it must keep"),
    (lambda: gp.MoE([Two()] * 3, gp.TopKGate(2, 1, D)), ValueError, "is made for 2 experts, and there are 3"),
    (lambda: gp.MoE([Two(), 3], gp.TopKGate(2, 1, D)), TypeError, "experts must be a list of modules .* and are .*int"),
    (lambda: gp.MoE([Two()] * 2, nn.Linear(D, 2)), TypeError, "gate must be one of gateplug's gates .* got a Linear"),
    (lambda: gp.MoE([Two()] * 2, gp.TopKGate(2, 1, D, tasks=2)), ValueError, r"2 tasks: use gp.MultiGateMoE\(experts, gate\)"),
    (lambda: gp.MoE([Two()] * 2, gp.TopKGate(2, 1, D), capacity_factor=0.0), ValueError, "capacity_factor=0.0 must be > 0, or None"),
    (lambda: gp.MoE([Two()] * 2, gp.DSelectK(2, 1, D), capacity_factor=1.0), ValueError, "DSelectK.* takes no capacity_factor=1.0"),
    (lambda: gp.MoE([Two()] * 2, gp.TopKGate(2, 1, D), drop="last"), ValueError, "drop='last' must be 'position' or 'score'"),
    (lambda: gp.MultiGateMoE([Two()] * 2, []), TypeError, r"gates must be .* got \[\]"),
    (lambda: gp.MultiGateMoE([Two()] * 2, [gp.TopKGate(2, 1, D), gp.TopKGate(2, 1, 5)]), ValueError, r"widths \['4', '5'\]"),
    (lambda: gp.MultiGateMoE([Two()] * 2, [gp.TopKGate(3, 1, D)]), ValueError, "is made for 3 experts, and there are 2"),
    (lambda: gp.ExpertMLP(2, D, 0), ValueError, "hidden=0"),
    (lambda: gp.ExpertMLP(2, D, 4, activation="selu"), ValueError, "'selu' is not known; allowed are"),
    (lambda: gp.ExpertMLP(2, D, 4, dropout=1.5), ValueError, r"dropout=1.5 must lie in \[0, 1\]"),
    (lambda: gp.MoE([Two()] * 2, gp.TopKGate(2, 1, D))(torch.zeros(3, D), torch.ones(4).bool()), ValueError, r"mask of shape \(4,\) .* \(3,\)"),
    (lambda: gp.MultiGateMoE([Two()] * 2, [gp.TopKGate(2, 1, D)])(torch.zeros(3, D), torch.ones(2).bool()), ValueError, r"\(2,\) .* \(3,\)"),
    (lambda: gp.MoE([Two()] * 2, gp.TopKGate(2, 1, D))(torch.full((3, D), math.nan)), ValueError, "TopKGate.* not finite"),
    (lambda: gp.MoE([Two()] * 2, gp.TopKGate(2, 1, D))(torch.zeros(3, 9)), ValueError, r"takes rows of width 4, and got \(3, 9\)"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_what_does_not_go_together_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()

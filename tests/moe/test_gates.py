"""Gates: what they promise of their weights, how they start, what they refuse, how DSelect-k hardens."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.moe import functional as M
from gateplug.moe.routing import ExpertGate
from tests.moe.test_functional import code

D = 4
ROWWISE: dict[str, tuple[Callable[[], ExpertGate], int]] = {
    "dselect": (lambda: gp.DSelectK(8, 2, D), 8),
    "dselect, 5 experts": (lambda: gp.DSelectK(5, 2, D), 5),
    "dselect, renormalized": (lambda: gp.DSelectK(5, 2, D, renormalize=True), 5),
    "top-k": (lambda: gp.TopKGate(6, 2, D), 2),
    "top-k of all": (lambda: gp.TopKGate(6, 2, D, normalize="all"), 2),
    "noisy": (lambda: gp.TopKGate(6, 2, D, noisy=True), 2),
    "sigmoid": (lambda: gp.SigmoidGate(6, 2, D), 2),
    "sigmoid, scaled": (lambda: gp.SigmoidGate(6, 2, D, normalize=False, scale=2.5), 2),
    "softmax": (lambda: gp.SoftmaxGate(6, D), 6),
    "expert choice": (lambda: gp.ExpertChoiceGate(6, D), 6),
}
STATIC: dict[str, Callable[..., ExpertGate]] = {
    "dselect": lambda **k: gp.DSelectK(5, 2, **k),
    "top-k": lambda **k: gp.TopKGate(6, 2, **k),
    "softmax": lambda **k: gp.SoftmaxGate(6, **k),
}
TASKS: dict[str, Callable[..., ExpertGate]] = {
    "dselect": lambda dim, tasks: gp.DSelectK(5, 2, dim, tasks=tasks),
    "top-k": lambda dim, tasks: gp.TopKGate(6, 2, dim, tasks=tasks),
    "softmax": lambda dim, tasks: gp.SoftmaxGate(6, dim, tasks=tasks),
}
# terms that enter no loss are the subject of one test and of no other
pytestmark = pytest.mark.filterwarnings("ignore:.*has terms of its own")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ROWWISE)
def test_rows_get_weights_for_at_most_k_experts(name: str) -> None:
    make, most = ROWWISE[name]
    gate = make()
    q = gate(torch.randn(3, 5, D))
    assert q.shape == (3, 5, gate.experts)
    assert int((q != 0).sum(-1).max()) <= most
    assert bool((q >= 0).all())
    if most == 2:
        assert int((q != 0).sum(-1).min()) == 2
    total = q.sum(-1)
    if name in ("dselect", "dselect, renormalized", "top-k", "noisy", "sigmoid", "softmax"):
        assert torch.allclose(total, torch.ones(3, 5), atol=1e-6)
    elif name not in ("expert choice", "sigmoid, scaled"):
        assert bool((total < 1).all())
    q.square().sum().backward()
    assert all(bool(p.grad.any()) for n, p in gate.named_parameters())


@pytest.mark.parametrize("name", ROWWISE)
def test_a_gate_routes_in_float32_under_autocast_and_for_bf16_rows(name: str) -> None:
    gate = ROWWISE[name][0]().eval()
    x = torch.randn(32, D)
    with torch.autocast("cpu", torch.bfloat16):
        under = gate(x)
    assert under.dtype == torch.float32
    assert torch.equal(under, gate(x)), "not one rounding differs"
    assert gate(x.bfloat16()).dtype == torch.float32
    assert copy.deepcopy(gate).double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(gate).bfloat16()(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ROWWISE)
def test_masked_rows_have_no_weight_and_no_influence(name: str) -> None:
    gate = ROWWISE[name][0]().eval()
    x, mask = torch.randn(2, 6, D), torch.tensor([[True] * 6, [True, True, False, False, True, False]])
    q = gate(x, mask)
    assert not bool(q[~mask].any())
    assert torch.allclose(q[mask], gate(x[mask]), atol=1e-6)
    assert torch.equal(gate(x.masked_fill(~mask[..., None], 1e9), mask), q)
    assert gate(x, torch.zeros_like(mask)).eq(0).all()
    assert gate(x[:0]).shape == (0, 6, gate.experts)


@pytest.mark.parametrize("name", STATIC)
def test_a_static_gate_gives_every_row_the_same(name: str) -> None:
    gate = STATIC[name]()
    q = gate(torch.randn(3, 7, 11))
    assert q.shape == (3, 7, gate.experts)
    assert torch.equal(q, gate.weights().expand_as(q))
    assert not gate.weights().requires_grad
    mask = torch.rand(3, 7) > 0.5
    assert torch.equal(gate(torch.randn(3, 7, 2), mask), q * mask[..., None])


@pytest.mark.parametrize("dim", [None, D])
@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_gates_side_by_side(name: str, dim: int | None) -> None:
    gate, x = TASKS[name](dim, 3), torch.randn(5, D)
    q = gate(x)
    assert q.shape == (5, 3, gate.experts)
    one = TASKS[name](dim, None)
    for task in range(3):
        state = {}
        for key, p in one.state_dict().items():
            whole = gate.state_dict()[key]
            state[key] = whole[task] if dim is None else whole.reshape(3, *p.shape)[task]
        one.load_state_dict(state)
        assert torch.allclose(one(x), q[:, task], atol=1e-6)


def literal(gate: gp.DSelectK, x: Tensor) -> Tensor:
    """Row by row, selector by selector: row s·m + j of z.weight is bit j of selector s."""
    m = math.ceil(math.log2(gate.experts))
    q = torch.zeros(len(x), gate.experts, dtype=torch.float64)
    gate = copy.deepcopy(gate).double().requires_grad_(False)
    for t, row in enumerate(x.double()):
        w = [math.exp(gate.w.weight[s] @ row + gate.w.bias[s]) for s in range(gate.k)]
        for s in range(gate.k):
            z = [float(gate.z.weight[s * m + j] @ row + gate.z.bias[s * m + j]) for j in range(m)]
            for e in range(gate.experts):
                q[t, e] += w[s] / sum(w) * code(z, e, gate.gamma)
    return q


@pytest.mark.parametrize(("experts", "k", "gamma"), [(4, 1, 1.0), (5, 2, 0.7), (8, 3, 2.0)])
def test_dselect_per_example_is_the_formula(experts: int, k: int, gamma: float) -> None:
    gate = gp.DSelectK(experts, k, D, gamma)
    nn.init.normal_(gate.z.weight, std=0.3)
    x = torch.randn(6, D)
    assert torch.allclose(gate(x).double(), literal(gate, x), atol=1e-6)
    summed = literal(gate, x).sum(-1, keepdim=True)
    gate.renormalize = True
    assert torch.allclose(gate(x).double(), literal(gate, x) / summed, atol=1e-5)


def test_sigmoid_gate_chooses_with_the_bias_and_weighs_without() -> None:
    gate = gp.SigmoidGate(4, 2, D, normalize=False, scale=3.0)
    gate.bias += torch.tensor([0.0, 5.0, 0.0, 9.0])
    x = torch.randn(8, D)
    s = torch.sigmoid(x @ gate.logits.weight.T)
    want = torch.zeros(8, 4)
    want[:, [1, 3]] = 3.0 * s[:, [1, 3]]
    assert torch.allclose(gate(x), want, atol=1e-6)
    gate.normalize = True
    assert torch.allclose(gate(x).sum(-1), torch.full((8,), 3.0), atol=1e-5)
    assert "bias" in gate.state_dict()


def test_noise_is_drawn_in_training_only_and_from_torchs_stream() -> None:
    gate, x = gp.TopKGate(6, 2, D, noisy=True), torch.randn(64, D)
    torch.manual_seed(1)
    first = gate.route(x)
    torch.manual_seed(1)
    noise = torch.randn(64, 6)
    assert torch.allclose(first.logits, M.noisy_logits(x, gate.logits.weight.T, gate.noise.weight.T, noise), atol=1e-6)
    assert not torch.equal(gate(x), first.weights)
    scale = nn.functional.softplus(x @ gate.noise.weight.T)
    assert torch.allclose(first.load.sum(0), M.noisy_load(x @ gate.logits.weight.T, first.logits, scale, 2), rtol=1e-4)
    gate.eval()
    assert torch.equal(gate(x), gate(x))
    assert gate.route(x).load is None


def test_expert_choice_gives_every_expert_its_share_of_rows() -> None:
    gate = gp.ExpertChoiceGate(4, D, capacity_factor=1.5)
    q = gate(torch.randn(10, D))
    assert (q != 0).sum(0).tolist() == [4] * 4, "⌈1.5 · 10 / 4⌉"
    assert (gp.ExpertChoiceGate(4, D, 100.0)(torch.randn(10, D)) != 0).all(), "at most all rows"


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("dim", [None, D])
def test_parameters_have_the_published_names_shapes_and_start(dim: int | None, tasks: int | None) -> None:
    gate = gp.DSelectK(400, 200, dim, gamma=2.0, tasks=tasks)
    n, m = tasks or 1, 9
    lead = () if tasks is None else (tasks,)
    want = {"z": (*lead, 200, m), "w": (*lead, 200)} if dim is None else {
        "z.weight": (n * 200 * m, D), "z.bias": (n * 200 * m,), "w.weight": (n * 200, D), "w.bias": (n * 200,),
    }  # fmt: skip
    assert {name: tuple(p.shape) for name, p in gate.state_dict().items()} == want
    for name, p in gate.named_parameters():
        bound = 2.0 / 100 if name[0] == "z" else 0.05
        # uniform: within the bound, near to it, and with its standard deviation
        assert 0.95 * bound < float(p.detach().abs().max()) <= bound
        assert float(p.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_the_names_of_the_other_gates() -> None:
    assert {n: tuple(p.shape) for n, p in gp.TopKGate(6, 2, D, noisy=True).state_dict().items()} == {
        "logits.weight": (6, D),
        "noise.weight": (6, D),
    }
    assert list(gp.TopKGate(6, 2).state_dict()) == list(gp.SoftmaxGate(6).state_dict()) == ["logits"]
    assert list(gp.SigmoidGate(6, 2, D).state_dict()) == ["bias", "logits.weight"]
    assert list(gp.ExpertChoiceGate(6, D).state_dict()) == ["logits.weight"]


def test_a_ramp_is_linear_counts_the_first_step_as_one_and_stays() -> None:
    ramp = gp.Ramp(0.2, 1.0, 4)
    assert [float(ramp.at(torch.tensor(float(s)))) for s in range(6)] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0, 1.0])
    assert gp.DSelectK(4, 1, entropy={"start": 0.2, "end": 1.0, "steps": 4}).entropy == ramp


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("experts", [4, 5])
def test_the_terms_are_the_formula(experts: int, tasks: int | None) -> None:
    gate = gp.DSelectK(experts, 2, D, entropy=gp.Ramp(0.0, 0.8, 4), reachability=0.3, tasks=tasks)
    nn.init.normal_(gate.z.weight, std=0.2)
    gate.steps.fill_(1.0)  # the second step: λ = 0.4
    x = torch.randn(6, D)
    z, _ = gate.codes(x)
    total = 0.0
    for selector in z.reshape(6, -1, gate.bits).tolist():
        for bits in selector:
            r = [code(bits, e, 1.0) for e in range(experts)]
            total += 0.4 * -sum(v * math.log(v + 1e-6) for v in r) + (0.3 / sum(r) if experts == 5 else 0.0)
    terms = gate.terms(M.selector_codes(z, experts))
    assert float(terms.detach()) == pytest.approx(total / 6, rel=1e-5)


def test_terms_enter_the_loss_in_training_alone_and_somebody_says_if_they_do_not() -> None:
    net = nn.Sequential(gp.MoE(gp.ExpertMLP(5, D, 8), gp.DSelectK(5, 2, D, entropy=0.5)))
    x = torch.randn(6, D)
    with pytest.warns(UserWarning, match=r"DSelectK\(experts=5, k=2, dim=4, gamma=1.0\) has terms of its own .* enter no loss"):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)  # said once
        copy.deepcopy(net).eval()(x)
        plug = gp.RegulateRouters()
        plug.attach(net)
        plug.total_loss(net, net(x).sum()).backward()
        gp.MoE(gp.ExpertMLP(4, D, 8), gp.DSelectK(4, 2, D))(x)  # a power of two, no entropy: no terms
    gate = net[0].gate
    got = gate.z.weight.grad.clone()
    plug.detach(net)
    net.zero_grad()
    z, _ = gate.codes(x)
    (net(x).sum() + gate.terms(M.selector_codes(z, 5))).backward()
    assert torch.allclose(got, gate.z.weight.grad, atol=1e-6)


def binary(*codes: int, bits: int = 3) -> Tensor:
    """Logits outside of the step whose codes are these."""
    return torch.tensor([[3.0 if c >> (bits - 1 - j) & 1 else -0.6 for j in range(bits)] for c in codes])


def test_harden_fixes_the_experts_and_lets_their_weights_learn() -> None:
    gate = gp.DSelectK(6, 2)
    with torch.no_grad():
        gate.z.copy_(binary(4, 1))
    before = gate.weights()
    assert gate.harden() == [4, 1]
    assert torch.equal(gate.weights(), before)
    assert gate.z.detach().tolist() == [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
    assert (gate.z.requires_grad, gate.w.requires_grad) == (False, True)
    assert gate.frozen().tolist() == [1.0, 1.0]
    (gate(torch.ones(2, 3)) * torch.arange(6)).sum().backward()
    assert bool(gate.w.grad.all())


def test_harden_of_tasks_lists_each_and_rounds_when_forced() -> None:
    gate = gp.DSelectK(6, 2, tasks=2)
    with torch.no_grad():
        gate.z.copy_(torch.stack([binary(4, 1), binary(0, 5)]))
        gate.z[1, 0, 2] = -0.1
        gate.z[0, 1, 0] = 0.3
    assert gate.frozen().flatten().tolist() == pytest.approx([1.0, 2 / 3, 2 / 3, 1.0]), "share of binary bits"
    with pytest.raises(
        ValueError, match=r"2 selectors are not binary, off by \(0, 1\): 0.104, \(1, 0\): 0.352.*harden\(force=True\)"
    ):
        gate.harden()
    assert gate.z.requires_grad, "nothing happened"
    assert gate.harden(force=True) == [[4, 5], [0, 5]]


def test_harden_says_what_cannot_be() -> None:
    gate = gp.DSelectK(6, 2)
    with torch.no_grad():
        gate.z.copy_(binary(3, 3))
    with pytest.warns(UserWarning, match="two selectors chose the same expert, 1 are used"):
        assert gate.harden() == [3, 3]
    with torch.no_grad():
        gate.z.copy_(binary(3, 7))
    with pytest.raises(ValueError, match=r"codes \[3, 7\], and there are only 6 experts"):
        gate.harden()
    with pytest.raises(ValueError, match="chooses per example"):
        gp.DSelectK(6, 2, D).harden()


@pytest.mark.parametrize("name", ROWWISE)
def test_rows_that_are_not_finite_name_the_gate(name: str) -> None:
    gate = ROWWISE[name][0]()
    gate.label = "layers.3.gate"
    x = torch.randn(4, D)
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match=rf"layers.3.gate \({type(gate).__name__}.* not finite"):
        gate(x)
    with pytest.raises(ValueError, match=rf"takes rows of width {D}, and got \(4, 7\)"):
        gate(torch.zeros(4, 7))
    with pytest.raises(ValueError, match="chooses row by row"):
        gate.weights()


BAD: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (gp.DSelectK, {"experts": 1, "k": 1}, "experts=1 must be at least 2"),
    (gp.TopKGate, {"experts": 4, "k": 5}, "k=5 must lie in 1 … 4"),
    (gp.SigmoidGate, {"experts": 4, "k": 0}, "k=0 must lie in 1 … 4"),
    (gp.SoftmaxGate, {"experts": 4, "dim": 0}, "dim=0 must be at least 1, or None"),
    (gp.DSelectK, {"experts": 4, "k": 1, "tasks": 0}, "tasks=0 must be at least 1"),
    (gp.DSelectK, {"experts": 4, "k": 1, "gamma": 0.0}, "gamma=0.0 must be > 0"),
    (gp.DSelectK, {"experts": 4, "k": 1, "gamma": math.inf}, "gamma=inf must be"),
    (gp.DSelectK, {"experts": 4, "k": 1, "entropy": -0.1}, "entropy=-0.1 must be a finite number ≥ 0 or a Ramp"),
    (gp.DSelectK, {"experts": 4, "k": 1, "reachability": -1.0}, "reachability=-1.0 must be"),
    (gp.DSelectK, {"experts": 4, "k": 1, "entropy": {"start": 0.0, "end": -1.0, "steps": 3}}, "end=-1.0 of a Ramp"),
    (gp.Ramp, {"start": 0.0, "end": 1.0, "steps": 0}, "steps=0 of a Ramp must be ≥ 1"),
    (gp.TopKGate, {"experts": 4, "k": 2, "normalize": "some"}, "normalize='some' must be 'selected' .* or 'all'"),
    (gp.TopKGate, {"experts": 4, "k": 2, "noisy": True}, "noisy=True needs an input width.*dim=None"),
    (gp.TopKGate, {"experts": 4, "k": 4, "dim": 3, "noisy": True}, "k < experts.*k=4, experts=4"),
    (gp.TopKGate, {"experts": 4, "k": 2, "dim": 3, "noisy": True, "tasks": 2}, "no tasks"),
    (gp.SigmoidGate, {"experts": 4, "k": 2, "scale": 0.0}, "scale=0.0 must be a finite number > 0"),
    (gp.ExpertChoiceGate, {"experts": 4, "dim": 3, "capacity_factor": 0.0}, "capacity_factor=0.0 must be"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "arguments", "message"), BAD)
def test_arguments_out_of_range_are_refused(make: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("name", ROWWISE)
def test_gates_are_copied_and_pickled(name: str) -> None:
    gate, x = ROWWISE[name][0]().eval(), torch.randn(4, D)
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert torch.equal(twin(x), gate(x))
        assert str(twin) == str(gate)

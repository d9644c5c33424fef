"""Mixtures in a user's module: folded, exported, compiled, on images, under autocast, on two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gateplug as gp
from gateplug.moe.mixture import Mixture
from gateplug.moe.routing import ExpertGate
from tests.ddp import two_processes
from tests.modules import UserModule, trainer
from tests.moe.test_mixture import D, Two, decided, stacked, steer

pytestmark = pytest.mark.filterwarnings("ignore:.*has terms of its own")


class Net(nn.Module):
    """A user's network around a mixture."""

    def __init__(self, mixture: nn.Module, out: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(8, D)
        self.mixture = mixture
        self.head = nn.Linear(out, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixture(self.embed(x)))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def hardened(form: str, tasks: bool) -> Net:
    """A network with a hardened mixture of 8 experts, of which 2 (for two tasks: 3) are selected."""
    torch.manual_seed(0)
    experts: Any = [Two() for _ in range(8)]
    experts = experts if form == "list" else stacked(experts)
    if tasks:
        gates = [decided(gp.DSelectK(8, 2), [6, 1]), decided(gp.DSelectK(8, 2), [1, 4])]
        net = Net(gp.MultiGateMoE(experts, gates, shared=Two()))
    else:
        net = Net(gp.MoE(experts, decided(gp.DSelectK(8, 2), [6, 1]), shared=Two()))
        gates = [net.mixture.gate]
    for gate in gates:
        gate.harden()
    return net.eval()


@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("form", ["list", "mlp"])
def test_folded_it_computes_the_same_with_the_selected_experts_alone_and_is_exported(form: str, tasks: bool) -> None:
    net, x = hardened(form, tasks), torch.randn(5, 8)
    folded = gp.fold(net)
    assert isinstance(net.mixture, gp.MultiGateMoE if tasks else gp.MoE), "the original stays"
    assert isinstance(folded.mixture, Mixture)
    assert not any(isinstance(m, ExpertGate) for m in folded.modules())
    assert size(folded.mixture.experts) == size(Two()) * (3 if tasks else 2)
    assert torch.allclose(folded(x), net(x), atol=1e-6)
    mask, inner = torch.tensor([True, False, True, True, False]), torch.randn(5, D)
    assert torch.allclose(folded.mixture(inner, mask), net.mixture(inner, mask), atol=1e-6)
    for module in (folded, net):
        program = torch.export.export(module, (x,))
        assert torch.allclose(program.module()(x), net(x), atol=1e-6)


@pytest.mark.parametrize("gate", [gp.TopKGate(8, 2, D), gp.DSelectK(8, 2, D), gp.SigmoidGate(8, 2, D)])
def test_a_mixture_that_chooses_row_by_row_stays_one_and_is_exported(gate: ExpertGate) -> None:
    experts = [nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(8)]
    net, x = Net(gp.MoE(experts, gate)).eval(), torch.randn(5, 8)
    folded = gp.fold(net)
    assert isinstance(folded.mixture, gp.MoE)
    program = torch.export.export(folded, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    other = torch.randn(11, 8)
    assert torch.allclose(program.module()(other), net(other), atol=1e-6)


def test_a_mixture_that_is_the_whole_network_folds() -> None:
    layer = hardened("mlp", False).mixture
    x = torch.randn(4, D)
    assert torch.allclose(gp.fold(layer)(x), layer(x), atol=1e-6)


def test_a_top_k_mixture_is_traced_by_the_compiler() -> None:
    torch.manual_seed(0)
    plain = gp.MoE(gp.ExpertMLP(4, D, 8), gp.TopKGate(4, 2, D))
    fast = copy.deepcopy(plain)
    fast.compile(backend="aot_eager")  # what comes after is torch's, and takes half a minute
    x = torch.randn(12, D)
    for layer in (plain, fast):
        y = layer(x)
        y.sin().sum().backward()
    assert torch.allclose(y, plain(x), atol=1e-5)
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)


@pytest.mark.parametrize("form", ["list", "mlp"])
def test_deterministic_algorithms_are_enough(form: str) -> None:
    torch.manual_seed(0)
    experts = [Two() for _ in range(4)]
    layer = gp.MoE(experts if form == "list" else stacked(experts), gp.TopKGate(4, 2, D), capacity_factor=1.0)
    x = torch.randn(9, D)
    want = layer(x)
    torch.use_deterministic_algorithms(True)
    try:
        y = layer(x)
        y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(y, want)


@pytest.mark.parametrize("tasks", [False, True])
def test_experts_on_images_and_a_gate_that_looks_at_something_else(tasks: bool) -> None:
    torch.manual_seed(0)
    experts = [nn.Conv2d(1, 2, 3) for _ in range(4)]
    gate = gp.TopKGate(4, 2, D)
    layer: nn.Module = gp.MultiGateMoE(experts, [gate, gp.TopKGate(4, 1, D)]) if tasks else gp.MoE(experts, gate)
    x, route = torch.randn(6, 1, 8, 8), torch.randn(6, D)
    y = layer(x, route=route)
    want = torch.einsum("re,rechw->rchw", gate(route), torch.stack([e(x) for e in experts], 1))
    assert torch.allclose(y[:, 0] if tasks else y, want, atol=1e-6)
    assert y.shape == ((6, 2, 2, 6, 6) if tasks else (6, 2, 6, 6))
    mask = torch.tensor([True, False] * 3)
    masked = layer(x, mask, route=route)
    assert torch.allclose(masked[mask], y[mask], atol=1e-6)
    assert not bool(masked[~mask].any())
    if not tasks:  # leading dimensions: two frames of three clips
        clips = layer(x.view(3, 2, 1, 8, 8), route=route.view(3, 2, D))
        assert torch.allclose(clips.flatten(0, 1), y, atol=1e-6)


def test_images_through_a_static_gate() -> None:
    experts = [nn.Conv2d(1, 2, 3) for _ in range(4)]
    layer, x = gp.MoE(experts, decided(gp.DSelectK(4, 1), [2])), torch.randn(6, 1, 8, 8)
    assert torch.allclose(layer(x), experts[2](x), atol=1e-6)
    assert torch.allclose(gp.fold(layer)(x), experts[2](x), atol=1e-6)


@pytest.mark.parametrize("form", ["list", "mlp"])
@pytest.mark.parametrize("gate", [gp.TopKGate(4, 2, D), gp.DSelectK(4, 2), gp.ExpertChoiceGate(4, D)])
def test_under_autocast_the_result_has_the_experts_precision(gate: ExpertGate, form: str) -> None:
    torch.manual_seed(0)
    experts = [Two() for _ in range(4)]
    layer, x = gp.MoE(experts if form == "list" else stacked(experts), gate), torch.randn(9, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), atol=0.03)  # eight bits of numbers below 2
    y.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["list", "mlp"])
def test_no_rows_at_all_give_no_rows_and_gradients_of_zero(form: str) -> None:
    experts = [Two() for _ in range(4)]
    for gate in (gp.TopKGate(4, 2, D), gp.ExpertChoiceGate(4, D), gp.SigmoidGate(4, 2, D), gp.DSelectK(4, 1)):
        layer = gp.MoE(experts if form == "list" else stacked(experts), gate)
        y = layer(torch.zeros(0, 7, D))
        assert y.shape == (0, 7, 3)
        y.sum().backward()
        none = layer(torch.ones(2, 3, D), torch.zeros(2, 3, dtype=torch.bool))
        assert not bool(none.any())


class TwoKinds(UserModule):
    """Rows that alternate between two kinds: each of two processes gets one kind."""

    def train_dataloader(self) -> Any:
        x = torch.rand(32, D, generator=torch.Generator().manual_seed(0)) + 0.5
        x[1::2] *= -1
        rank, world = self.global_rank, self.trainer.world_size
        return DataLoader(TensorDataset(x[rank::world], (torch.arange(32) % 3)[rank::world]), 8 // world)


def _rows_of_two_kinds(tmp: Path, devices: int) -> None:
    """Experts 0 and 1 for one kind of row, 2 and 3 for the other."""
    torch.manual_seed(0)
    experts = [Two() for _ in range(4)]
    gate = steer(gp.TopKGate(4, 2, D), 0, 1)
    with torch.no_grad():
        gate.logits.weight[2:] = -gate.logits.weight[:2]
    module = TwoKinds(nn.Sequential(gp.MoE(experts, gate)), lr=0.02)
    for e in experts:
        e.calls.clear()
    strategy = "ddp" if devices > 1 else "auto"
    t = trainer(tmp, max_epochs=1, devices=devices, strategy=strategy, use_distributed_sampler=False)
    t.fit(module)
    if t.is_global_zero:
        torch.save({"calls": [len(e.calls) for e in experts], **module.state_dict()}, tmp / f"{devices}.pt")


def test_an_expert_that_gets_rows_on_one_process_only_holds_up_nobody(tmp_path: Path) -> None:
    two_processes(_rows_of_two_kinds, tmp_path)
    _rows_of_two_kinds(tmp_path, 1)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert one.pop("calls") == [4, 4, 4, 4]
    assert two.pop("calls") == [4, 4, 0, 0]
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-6), name

"""Multiply-accumulates against arithmetic, and counting that leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tr
from torch import nn

import gateplug as gp
from tests.modules import Net, digits

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def test_a_dense_net_costs_its_weights_a_token() -> None:
    net = Net()
    dense = sum(m.weight.numel() for n, m in net.named_modules() if isinstance(m, nn.Linear) and n != "head")
    cost = gp.cost(net, digits(3)[:][0])
    assert cost.macs == 3 * 8 * dense + 3 * net.head.weight.numel()
    assert cost.parameters == sum(p.numel() for p in net.parameters())
    assert cost.bytes == 4 * cost.parameters


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_fused_and_eager_attention_cost_the_same_and_what_arithmetic_says(kind: str) -> None:
    if kind == "vit":
        config: Any = tr.ViTConfig(**SIZES, image_size=8, patch_size=2, num_channels=1)
        model, example, tokens = tr.ViTModel, {"pixel_values": torch.randn(3, 1, 8, 8)}, 17
        other = 16 * 4 * 32 + 32 * 32  # patches; pooler
    else:
        config = tr.BertConfig(**SIZES, vocab_size=50)
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[0, 5:] = 0
        model, example, tokens = tr.BertModel, {"input_ids": torch.randint(0, 50, (3, 9)), "attention_mask": mask}, 9
        other = 32 * 32
    costs = [gp.cost(model._from_config(config, attn_implementation=a), example) for a in ("sdpa", "eager")]
    layer = tokens * (4 * 32 * 32 + 2 * 32 * 64) + 2 * tokens**2 * 32
    assert costs[0] == costs[1]
    assert costs[0].macs == 3 * (2 * layer + other)


def test_torchs_fused_encoder_layer_is_counted() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    expected = 5 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 25 * 32
    assert gp.cost(layer, torch.randn(1, 5, 32)).macs == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_leaves_the_module_as_it_was() -> None:
    net = Net(dropout=0.5)
    net.blocks[0].eval()
    gp.ReplaceFFN().attach(net)
    modes = [m.training for m in net.modules()]
    stream = torch.get_rng_state()
    gp.cost(net, digits(2)[:][0])
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError):
        gp.cost(net, torch.zeros(2, 3))
    assert [m.training for m in net.modules()] == modes


def test_a_plugged_net_costs_what_its_fold_costs() -> None:
    net = Net()
    gp.ReplaceFFN("swiglu").attach(net)
    x = digits(2)[:][0]
    assert gp.cost(net, x) == gp.cost(gp.fold(net), x)


def test_latency_times_in_turn_and_refuses_nonsense() -> None:
    small, large = nn.Linear(8, 8), nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    times = gp.compare_latency({"small": (small, torch.randn(1, 8)), "large": (large, torch.randn(64, 512))}, runs=15)
    assert times["large"].p50 > times["small"].p50
    assert times["small"].p50 <= times["small"].p95
    assert gp.latency(small, (torch.randn(1, 8),), runs=3).runs == 3
    for bad in ({"runs": 0}, {"warm_up": -1}):
        with pytest.raises(ValueError, match="≥"):
            gp.latency(small, torch.randn(1, 8), **bad)


def test_a_layer_that_is_handed_a_parameter_is_counted_and_still_trains() -> None:
    class Handed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.layer = nn.Parameter(torch.ones(2, 3)), nn.Linear(3, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer(self.rows).sum()

    net = Handed()
    assert gp.cost(net, torch.ones(1)).macs == 24
    assert all(p.requires_grad for p in net.parameters())


def test_a_sparse_mixture_costs_what_it_runs() -> None:
    gate = gp.TopKGate(8, 2, 16)
    moe = gp.MoE(gp.ExpertMLP(8, 16, 32), gate)
    rows = 10
    # the router, and two experts of two layers a row
    assert gp.cost(moe, torch.randn(rows, 16)).macs == rows * (16 * 8 + 2 * 2 * 16 * 32)
    listed = gp.MoE([nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(8)], gate)
    assert gp.cost(listed, torch.randn(rows, 16)).macs == rows * (16 * 8 + 2 * 2 * 16 * 32)

"""Upcycle: a dense model becomes a mixture that computes the same, wherever its feed-forwards are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.activations import activation_name
from gateplug.moe.routing import ExpertGate, Routing
from tests.modules import UserModule, digits, loader, trainer

_BERT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
_OPT = {"ffn_dim": 32, "max_position_embeddings": 32, "word_embed_proj_dim": 16}
_IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}
IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


def torch_encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], int]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**_BERT)), {"input_ids": IDS}, 2),
    "distilbert": (
        lambda: hf.DistilBertModel(hf.DistilBertConfig(vocab_size=64, dim=16, hidden_dim=32, n_layers=2, n_heads=2)), {"input_ids": IDS}, 2,
    ),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**_IMAGE)), {"pixel_values": IMAGES}, 2),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_IMAGE)), {"pixel_values": IMAGES}, 2),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)), {"input_ids": IDS}, 2),
    "opt": (lambda: hf.OPTForCausalLM(hf.OPTConfig(**{**_BERT, **_OPT})), {"input_ids": IDS}, 2),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)), {"input_ids": IDS, "labels": IDS}, 4),
    "t5 gated": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5, feed_forward_proj="gated-gelu")), {"input_ids": IDS, "labels": IDS}, 4,
    ),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_BERT, num_key_value_heads=2)), {"input_ids": IDS}, 2),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_BERT, num_key_value_heads=2)), {"input_ids": IDS}, 2),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_BERT, num_key_value_heads=2, pad_token_id=0)), {"input_ids": IDS}, 2),
    "torch": (lambda: torch_encoder(False), {"src": ROWS}, 2),
    "torch, norm first": (lambda: torch_encoder(True), {"src": ROWS}, 2),
    "glu": (lambda: gp.GLU(16, 24, "silu"), {"x": ROWS}, 0),
}  # fmt: skip


def result(net: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = net(**inputs)
    return out if isinstance(out, Tensor) else out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("name", [name for name, (_, _, count) in MODELS.items() if count])
@pytest.mark.parametrize("gate", ["top_k", "dselect_k"])
def test_the_start_is_exact_and_everything_trains(name: str, gate: str) -> None:
    torch.manual_seed(0)
    make, inputs, count = MODELS[name]
    net = make().eval()
    names = set(net.state_dict())
    with torch.no_grad():
        before = result(net, inputs)
    plug = gp.Upcycle(experts=4, gate=gate)
    plug.attach(net)
    mixtures = [m for m in net.modules() if isinstance(m, gp.MoE)]
    assert len(mixtures) == count
    assert all(isinstance(m.experts, gp.ExpertMLP) for m in mixtures), "the fast form was not found"
    with torch.no_grad():
        # float32: the same numbers summed in another order
        assert torch.allclose(result(net, inputs), before, atol=2e-6, rtol=1e-5)
        assert torch.allclose(result(gp.fold(net), inputs), before, atol=2e-6, rtol=1e-5)
    result(net.train(), inputs).square().mean().backward()
    assert all(p.grad is not None for p in plug.parameters(net).values())
    plug.detach(net)
    assert set(net.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(result(net.eval(), inputs), before)


def test_dropout_between_the_layers_goes_into_the_experts() -> None:
    torch.manual_seed(0)
    net = torch_encoder(False)
    gp.Upcycle(experts=4).attach(net)
    mixture = net.get_submodule("layers.0.linear1")
    assert mixture.experts.dropout == 0.1
    assert isinstance(net.get_submodule("layers.0.dropout"), nn.Identity)
    assert isinstance(net.get_submodule("layers.0.dropout2"), nn.Dropout), "another one was taken"


def test_an_activation_without_a_name_makes_experts_of_any_kind() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 12), nn.Mish(), nn.Linear(12, 8))
    net = nn.Sequential(nn.LayerNorm(8), block)
    x = torch.randn(5, 8)
    before = net(x)
    gp.Upcycle(experts=4).attach(net)
    (mixture,) = (m for m in net.modules() if isinstance(m, gp.MoE))
    assert not isinstance(mixture.experts, gp.ExpertMLP)
    assert torch.allclose(net(x), before, atol=1e-6)


def test_copies_have_gradients_that_differ_by_their_weights_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    gp.Upcycle(experts=4, gate="softmax").attach(net)
    (mixture,) = (m for m in net.modules() if isinstance(m, gp.MoE))
    x = torch.randn(20, 8)
    net(x).square().sum().backward()
    assert torch.equal(mixture.experts.w_in[0], mixture.experts.w_in[3])
    assert not torch.equal(mixture.experts.w_in.grad[0], mixture.experts.w_in.grad[3])
    whole = mixture.experts.w_in.grad.sum(0)
    plain = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    with torch.no_grad():
        for layer, weight, bias in ((plain[0], "w_in", "b_in"), (plain[2], "w_out", "b_out")):
            layer.weight.copy_(getattr(mixture.experts, weight)[0])
            layer.bias.copy_(getattr(mixture.experts, bias)[0])
    plain(x).square().sum().backward()
    assert torch.allclose(whole, plain[0].weight.grad, rtol=1e-4, atol=1e-4)


def test_noise_tells_the_copies_apart_and_says_so() -> None:
    torch.manual_seed(0)
    net = torch_encoder(False)
    plug = gp.Upcycle(experts=4, noise=0.1)
    plug.attach(net)
    experts = net.get_submodule("layers.0.linear1").experts
    spread = (experts.w_in - experts.w_in.mean(0)).std() / experts.w_in.std()
    assert 0.05 < float(spread) < 0.15
    assert "not exact: noise 0.1" in plug.describe(net)["layers.0.linear1"]


def test_routers_are_drawn_without_disturbing_anybody_and_differ_from_layer_to_layer() -> None:
    torch.manual_seed(0)
    net = torch_encoder(False)
    twin = copy.deepcopy(net)
    stream = torch.get_rng_state()
    gp.Upcycle(experts=4).attach(net)
    assert torch.equal(torch.get_rng_state(), stream)
    torch.randn(5)
    gp.Upcycle(experts=4).attach(twin)
    routers = [n.get_submodule(f"layers.{i}.linear1.gate.logits").weight for n in (net, twin) for i in (0, 1)]
    assert torch.equal(routers[0], routers[2])
    assert not torch.equal(routers[0], routers[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_keeps_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).to(dtype)
    x = torch.randn(6, 8, dtype=dtype)
    before = net(x)
    gp.Upcycle(experts=4).attach(net)
    assert net(x).dtype == dtype
    assert torch.allclose(net(x).double(), before.double(), atol=1e-12 if dtype == torch.float64 else 0.02)
    (mixture,) = (m for m in net.modules() if isinstance(m, gp.MoE))
    assert mixture.gate.logits.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_frozen_layers_stay_frozen_and_the_router_trains(tmp_path: Path) -> None:
    module = UserModule()
    for block in module.net.blocks:
        block.requires_grad_(False)
    plug = gp.Upcycle(experts=4)
    trainer(tmp_path, callbacks=[plug], max_epochs=1).fit(module, loader())
    mixture = module.net.blocks[0].fc1
    assert not mixture.experts.w_in.requires_grad
    assert mixture.gate.logits.weight.requires_grad
    assert "the router alone trains" in plug.describe(module)["net.blocks.0.fc1"]


def test_layers_and_gates_of_ones_own_choice(tmp_path: Path) -> None:
    module = UserModule()
    plugs = [
        gp.Upcycle(experts=4, gate=lambda experts, dim: gp.TopKGate(experts, 1, dim), layers="net.blocks.0"),
        gp.ReplaceFFN("swiglu", layers="net.blocks.1"),
    ]
    trainer(tmp_path, callbacks=plugs, max_epochs=1).fit(module, loader())
    assert module.net.blocks[0].fc1.gate.k == 1
    assert not isinstance(module.net.blocks[1].fc1, gp.MoE)
    x = digits(4)[:][0]
    with torch.no_grad():
        assert torch.allclose(gp.fold(module)(x), module.eval()(x), atol=1e-6)
    for wrong in (lambda experts, dim: gp.TopKGate(experts + 1, 1, dim), lambda experts, dim: nn.Linear(dim, experts)):
        with pytest.raises(ValueError, match="must give one of gateplug's gates"):
            gp.Upcycle(experts=4, gate=wrong)
    with pytest.raises(gp.PlugError, match="no feed-forward in net.head"):
        gp.Upcycle(layers="net.head").attach(UserModule())


def test_a_mixture_is_not_upcycled_again() -> None:
    net = UserModule(mixture=True)
    plug = gp.Upcycle(experts=4)
    plug.attach(net)
    assert {name.split(".")[1] for name in plug.describe(net)} == {"blocks"}
    bare = nn.Sequential(gp.MoE(gp.ExpertMLP(4, 8, 16), gp.TopKGate(4, 2, 8)))
    with pytest.raises(gp.PlugError, match="finds no feed-forward"):
        gp.Upcycle().attach(bare)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"gate": "sigmoid", "gate_args": {"normalize": False}}, "normalize=True"),
        ({"gate": "dselect_k", "experts": 6}, "use 8 experts or renormalize=True"),
        ({"gate": "expert_choice"}, "some rows several times"),
    ],
)
def test_gates_that_are_not_exact_are_refused_with_the_way_out(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        gp.Upcycle(**arguments)
    gp.Upcycle(gate="dselect_k", experts=6, gate_args={"renormalize": True})


class Halves(ExpertGate):
    """A gate of somebody's own; its weights sum to 1/2."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__(experts, experts, width)
        self.layer = nn.Linear(width, experts)

    def decide(self, rows: Tensor) -> Routing:
        return Routing(self.layer(rows).softmax(-1) / 2, None, None)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))


def test_a_gate_of_ones_own_whose_weights_do_not_sum_to_1_is_refused_and_nothing_is_changed() -> None:
    net = small()
    before = repr(net)
    with pytest.raises(ValueError, match=r"sum to 0\.5 … 0\.5"):
        gp.Upcycle(experts=4, gate=Halves).attach(net)
    assert repr(net) == before


@pytest.mark.parametrize("gate", [gp.TopKGate, gp.SigmoidGate, gp.SoftmaxGate, gp.DSelectK])
def test_a_class_of_gates_chooses_row_by_row_with_k(gate: type[ExpertGate], tmp_path: Path) -> None:
    net = small()
    x = torch.randn(20, 8)
    before = net(x)
    # as many experts as the rows are wide: an argument in the wrong place would pass unseen
    gp.Upcycle(experts=8, gate=gate, k=3).attach(net)
    (mixture,) = (m for m in net.modules() if isinstance(m, gp.MoE))
    assert not mixture.gate.static
    assert mixture.gate.k == (8 if gate is gp.SoftmaxGate else 3)
    assert torch.allclose(net(x), before, atol=1e-6)
    module = UserModule()
    t = trainer(tmp_path, callbacks=[gp.Upcycle(experts=4, gate=gate)], max_epochs=1)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "class.ckpt")
    loaded = gp.load(tmp_path / "class.ckpt", UserModule())
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_a_limit_is_exact_only_while_nothing_is_dropped_and_says_so() -> None:
    x = torch.randn(50, 8)
    for factor, exact in ((4.0, True), (0.5, False)):
        net = small()
        before = net(x)
        plug = gp.Upcycle(experts=4, capacity_factor=factor)
        plug.attach(net)
        assert torch.allclose(net(x), before, atol=1e-6) == exact
        assert "exact while nothing is dropped" in plug.describe(net)["1.0"]


def test_one_expert_a_row_gives_the_router_no_gradient_and_is_warned_of() -> None:
    net = small()
    with pytest.warns(UserWarning, match="gives the router no gradient"):
        gp.Upcycle(experts=4, k=1).attach(net)
    (mixture,) = (m for m in net.modules() if isinstance(m, gp.MoE))
    net(torch.randn(20, 8)).square().sum().backward()
    assert not mixture.gate.logits.weight.grad.any()


def test_a_named_block_of_another_width_that_mixes_rows_is_refused() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(0)

    class Block(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 12), act, nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    with pytest.raises(gp.PlugError, match="something else with rows"):
        gp.Upcycle(experts=4, layers="0").attach(nn.Sequential(Block(Mixing())))
    net, x = nn.Sequential(Block(nn.Mish())), torch.randn(5, 8)
    before = net(x)
    gp.Upcycle(experts=4, layers="0").attach(net)
    assert torch.allclose(net(x), before, atol=1e-6)


def test_chosen_experts_keep_a_missing_bias_missing() -> None:
    block = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8, bias=False))
    net, x = nn.Sequential(block), torch.randn(5, 8)
    before = net(x)
    gp.Upcycle(experts=4, gate=lambda experts, dim: gp.DSelectK(experts, 2)).attach(net)
    assert torch.allclose(net(x), before, atol=1e-6)
    assert torch.allclose(gp.fold(net)(x), before, atol=1e-6)


def test_gates_of_a_function_disturb_nobodys_random_stream_in_a_causal_model() -> None:
    net = MODELS["gpt2"][0]()
    stream = torch.get_rng_state()
    gp.Upcycle(experts=4, gate=lambda experts, dim: gp.TopKGate(experts, 2, dim)).attach(net)
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_function_that_centres_its_input_is_not_taken_for_the_one_inside() -> None:
    assert activation_name(torch.relu) == "relu"
    assert activation_name(lambda x: torch.relu(x - x.mean(0))) is None

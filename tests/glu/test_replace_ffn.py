"""ReplaceFFN on the families that people use: found, exact at the start, widths matched, undone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.feed_forward import find
from gateplug.glu.layers import GatedProduct, RecomputingDown
from tests.modules import Net

TEXT = {"input_ids": torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))}
IMAGE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
BOTH = {**TEXT, "decoder_input_ids": TEXT["input_ids"]}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50,
}  # fmt: skip
PICTURE: dict[str, Any] = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50}

FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], list[str], str]] = {
    "bert": (
        lambda: tr.BertModel(tr.BertConfig(**SIZES)), TEXT,
        [f"encoder.layer.{i}.intermediate.dense" for i in range(2)], "gelu",
    ),
    "roberta": (
        lambda: tr.RobertaModel(tr.RobertaConfig(**SIZES)), TEXT,
        [f"encoder.layer.{i}.intermediate.dense" for i in range(2)], "gelu",
    ),
    "electra": (
        lambda: tr.ElectraModel(tr.ElectraConfig(**SIZES)), TEXT,
        [f"encoder.layer.{i}.intermediate.dense" for i in range(2)], "gelu",
    ),
    "distilbert": (
        lambda: tr.DistilBertModel(tr.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=50)), TEXT,
        [f"transformer.layer.{i}.ffn.lin1" for i in range(2)], "gelu",
    ),
    "vit": (lambda: tr.ViTModel(tr.ViTConfig(**PICTURE)), IMAGE, [f"layers.{i}.mlp.fc1" for i in range(2)], "gelu"),
    "deit": (lambda: tr.DeiTModel(tr.DeiTConfig(**PICTURE)), IMAGE, [f"layers.{i}.mlp.fc1" for i in range(2)], "gelu"),
    "dinov2": (
        lambda: tr.Dinov2Model(tr.Dinov2Config(**{**PICTURE, "mlp_ratio": 2})), IMAGE,
        [f"encoder.layer.{i}.mlp.fc1" for i in range(2)], "gelu",
    ),
    "clip": (
        lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(**PICTURE)), IMAGE,
        [f"encoder.layers.{i}.mlp.fc1" for i in range(2)], "quick_gelu",
    ),
    "siglip": (
        lambda: tr.SiglipVisionModel(tr.SiglipVisionConfig(**PICTURE)), IMAGE,
        [f"encoder.layers.{i}.mlp.fc1" for i in range(2)] + ["head.mlp.fc1"], "gelu_tanh",
    ),
    "gpt2": (
        lambda: tr.GPT2Model(tr.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_inner=64, vocab_size=50, bos_token_id=1, eos_token_id=2)),
        TEXT, [f"h.{i}.mlp.c_fc" for i in range(2)], "gelu_tanh",
    ),
    "opt": (
        lambda: tr.OPTModel(
            tr.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, vocab_size=50, word_embed_proj_dim=32)
        ),
        TEXT, [f"decoder.layers.{i}.fc1" for i in range(2)], "relu",
    ),
    "t5": (
        lambda: tr.T5Model(tr.T5Config(**T5)), BOTH,
        [f"{side}.block.{i}.layer.{n}.DenseReluDense.wi" for side, n in (("encoder", 1), ("decoder", 2)) for i in range(2)], "relu",
    ),
    "convnext": (
        lambda: tr.ConvNextModel(tr.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)), IMAGE,
        [f"encoder.stages.{i}.layers.0.pwconv1" for i in range(2)], "gelu",
    ),
    "albert": (
        lambda: tr.AlbertModel(tr.AlbertConfig(**SIZES, embedding_size=16)), TEXT,
        ["encoder.albert_layer_groups.0.albert_layers.0.ffn"], "gelu_tanh",
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: Any) -> tuple[nn.Module, dict[str, Tensor], list[str], str]:
    make, example, names, act = FAMILIES[request.param]
    torch.manual_seed(0)
    return make().eval(), example, names, act


def run(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**example)[0]


def test_exactly_the_feed_forwards_are_found(family: Any) -> None:
    model, _, names, act = family
    found, _ = find(model)
    assert [b.first for b in found] == names
    assert {b.activation for b in found} == {act}


def test_warm_start_is_exact_and_detach_gives_the_model_back(family: Any) -> None:
    model, example, names, _ = family
    before, keys = run(model, example), list(model.state_dict())
    plug = gp.ReplaceFFN("auto", match="width", warm_start=True)
    plug.attach(model)
    assert list(plug.describe(model)) == names
    # equal to float rounding: where the second factor is the constant 1, only a transposed product sums otherwise
    assert torch.allclose(run(model, example), before, atol=1e-6)
    plug.detach(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, example), before)


@pytest.mark.parametrize("recompute", [False, True])
def test_fresh_blocks_at_equal_parameters_train_and_fold(family: Any, recompute: bool) -> None:
    model, example, names, _ = family
    count = sum(p.numel() for p in model.parameters())
    plug = gp.ReplaceFFN("swiglu", multiple_of=1, recompute=recompute)
    plug.attach(model)
    after = sum(p.numel() for p in model.parameters())
    # rounding 2/3 of the width to whole units, and a bias of that width more per block
    assert abs(after - count) <= len(names) * 64 * 2
    out = run(model, example)
    assert torch.isfinite(out).all()
    # a head beside the main path (SigLIP's) is reached through the other outputs
    sum(t.square().mean() for t in model(**example).values() if isinstance(t, Tensor)).backward()
    for name, parameter in plug.parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    folded = gp.fold(model)
    assert torch.allclose(run(folded, example), out, atol=1e-6)


def test_recompute_gives_the_same_gradients(family: Any) -> None:
    model, example, *_ = family
    grads = []
    for recompute in (False, True):
        plug = gp.ReplaceFFN("geglu", match="width", recompute=recompute)
        plug.attach(model)
        model.zero_grad()
        model(**example)[0].square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        plug.detach(model)
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(g, grads[1][n], atol=1e-6) for n, g in grads[0].items())


def test_recompute_replaces_the_second_layer_with_the_same_parameters() -> None:
    net = Net()
    weight = net.blocks[0].fc2.weight
    gp.ReplaceFFN("swiglu", match="width", recompute=True).attach(net)
    assert isinstance(net.blocks[0].fc2, RecomputingDown)
    assert net.blocks[0].fc2.weight is weight


@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder_norm_first", "lone"])
def test_torchs_transformer_layers_never_skip_the_new_layer(kind: str) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(3, 5, 32), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    args: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
    if kind == "decoder":
        model: nn.Module = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 2, 64, activation="gelu", **args), 2)
        call = lambda: model(x, x)  # noqa: E731
    elif kind == "lone":
        model = nn.TransformerEncoderLayer(32, 2, 64, **args)
        call = lambda: model(x, src_key_padding_mask=mask)  # noqa: E731
    else:
        layer = nn.TransformerEncoderLayer(32, 2, 64, norm_first=kind == "encoder_norm_first", **args)
        model = nn.TransformerEncoder(layer, 2)
        call = lambda: model(x, src_key_padding_mask=mask)  # noqa: E731
    model.eval()
    with torch.no_grad():
        fused = call()
    plug = gp.ReplaceFFN("swiglu")
    plug.attach(model)
    outs = []
    for training in (True, False):
        for grad in (True, False):
            model.train(training)
            with torch.set_grad_enabled(grad):
                outs.append(call()[~mask].detach())
    assert all(torch.allclose(o, outs[0], atol=1e-6) for o in outs)
    assert not torch.allclose(outs[0], fused[~mask], atol=1e-3), "the replaced layer has no effect"
    plug.detach(model)
    with torch.no_grad():
        assert torch.equal(call(), fused)


def test_blocks_that_are_gated_already_are_left_and_named() -> None:
    llama = tr.LlamaModel(tr.LlamaConfig(**SIZES, num_key_value_heads=2))
    with pytest.raises(gp.PlugError, match="gated already"):
        gp.ReplaceFFN("swiglu").attach(llama)
    t5 = tr.T5Model(tr.T5Config(**T5, feed_forward_proj="gated-gelu"))
    with pytest.raises(gp.PlugError, match="wi_0"):
        gp.ReplaceFFN("swiglu").attach(t5)


def test_an_activation_out_of_reach_is_no_block() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x)))

    model = nn.Sequential(Functional())
    with pytest.raises(gp.PlugError, match="not called on the first layer's output"):
        gp.ReplaceFFN("swiglu").attach(model)


def test_a_named_block_may_change_its_width_and_names_select_from_above() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 3)))
    with pytest.raises(gp.PlugError, match="name it to take it"):
        gp.ReplaceFFN("geglu").attach(model)
    gp.ReplaceFFN("geglu", layers="0").attach(model)
    assert isinstance(model[0][0], GatedProduct)
    assert model(torch.randn(2, 8)).shape == (2, 3)
    bert = FAMILIES["bert"][0]()
    plug = gp.ReplaceFFN("swiglu", layers="encoder.layer.1")
    plug.attach(bert)
    assert list(plug.describe(bert)) == ["encoder.layer.1.intermediate.dense"]
    with pytest.raises(gp.PlugError, match="no feed-forward in encoder.layer.0.attention"):
        gp.ReplaceFFN("swiglu", layers="encoder.layer.0.attention").attach(FAMILIES["bert"][0]())


def test_a_block_in_a_longer_sequence_is_found() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32), nn.Linear(32, 3))
    found, rejected = find(net)
    assert [(b.first, b.second) for b in found] == [("1", "3")]
    assert not rejected
    gp.ReplaceFFN("geglu").attach(net)
    assert net(torch.randn(2, 8)).shape == (2, 3)


@pytest.mark.parametrize("made", ["t5", "gpt2", "clip", "bert", "torch"])
def test_fresh_weights_are_spread_as_the_model_spreads_its_own(made: str) -> None:
    torch.manual_seed(0)
    T = {**T5, "d_model": 64, "d_ff": 192}
    big = {**PICTURE, "hidden_size": 64, "intermediate_size": 192}
    models: dict[str, Callable[[], nn.Module]] = {
        "t5": lambda: tr.T5Model(tr.T5Config(**T)),
        "gpt2": lambda: tr.GPT2Model(
            tr.GPT2Config(n_embd=64, n_layer=2, n_head=2, n_inner=192, vocab_size=50, bos_token_id=1, eos_token_id=2)
        ),
        "clip": lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(**big)),
        "bert": lambda: tr.BertModel(tr.BertConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 192})),
        "torch": lambda: nn.TransformerEncoderLayer(64, 2, 192),
    }
    model = models[made]()
    block = find(model)[0][0]
    first, second = (model.get_submodule(n).weight.std().item() for n in (block.first, block.second))
    gp.ReplaceFFN("swiglu").attach(model)
    product = model.get_submodule(block.first)
    for branch in (product.gate, product.up):
        assert branch.weight.std().item() == pytest.approx(first, rel=0.05)
    # a fan-in rule: the narrower second layer of 128 instead of 192 is spread wider
    expected = second * (192 / 128) ** 0.5 if made in ("t5", "torch") else second
    assert model.get_submodule(block.second).weight.std().item() == pytest.approx(expected, rel=0.05)
    if made == "t5":  # the same as T5's own gated blocks
        native = (
            tr.T5Model(tr.T5Config(**{**T, "d_ff": 128}, feed_forward_proj="gated-silu")).encoder.block[0].layer[1].DenseReluDense
        )
        stds = [w.weight.std().item() for w in (product.gate, product.up, model.get_submodule(block.second))]
        assert stds == pytest.approx([w.weight.std().item() for w in (native.wi_0, native.wi_1, native.wo)], rel=0.05)


def test_two_models_with_equal_names_get_different_weights() -> None:
    torch.manual_seed(0)
    nets = [Net(), Net()]
    for net in nets:
        gp.ReplaceFFN("swiglu").attach(net)
    assert not torch.equal(nets[0].blocks[0].fc1.gate.weight, nets[1].blocks[0].fc1.gate.weight)


def test_a_frozen_block_stays_frozen_or_is_refused() -> None:
    net = Net()
    net.blocks[0].requires_grad_(False)
    with pytest.raises(gp.PlugError, match=r"blocks\.0\.fc1 is frozen"):
        gp.ReplaceFFN("swiglu").attach(net)
    gp.ReplaceFFN("reglu", match="width", warm_start=True).attach(net)
    assert [net.blocks[i].fc1.gate.weight.requires_grad for i in range(2)] == [False, True]


@pytest.mark.parametrize("inplace", [False, True])
def test_recompute_sees_what_a_dropout_between_did(inplace: bool) -> None:
    def block(recompute: bool) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Dropout(0.5, inplace=inplace), nn.Linear(24, 8))
        gp.ReplaceFFN("swiglu", layers="0", recompute=recompute).attach(net)
        return net

    x = torch.randn(5, 8)
    outs = []
    for recompute in (False, True):
        net = block(recompute)
        torch.manual_seed(1)
        outs.append(net(x))
    assert torch.allclose(*outs, atol=1e-6)


def test_pairs_that_are_left_are_listed(capsys: Any, tmp_path: Any) -> None:
    from tests.modules import UserModule, loader, trainer

    class Special(nn.Linear):
        pass

    module = UserModule()
    module.net.blocks[1].fc1 = Special(16, 32)
    trainer(tmp_path, callbacks=[gp.ReplaceFFN("swiglu")], max_steps=1).fit(module, loader())
    text = capsys.readouterr().out
    assert "Left as they are" in text
    assert "Special" in text


def test_a_block_with_tanh_has_no_gated_form() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    with pytest.raises(gp.PlugError, match="1 computes tanh"):
        gp.ReplaceFFN("auto", layers="0").attach(net)
    with pytest.raises(ValueError, match="0: no gated block comes near tanh"):
        gp.ReplaceFFN("swiglu", layers="0", match="width", warm_start="nearest").attach(net)


def test_an_activation_instance_shared_by_blocks_is_replaced_only_where_selected() -> None:
    net = Net()
    net.blocks[1].act = net.blocks[0].act
    gp.ReplaceFFN("swiglu", layers="blocks.0").attach(net)
    assert type(net.blocks[0].act) is nn.Identity
    assert type(net.blocks[1].act) is nn.ReLU


@pytest.mark.parametrize(("variant", "act"), [("ffn", "relu"), ("ffn_gelu", "gelu"), ("ffn_silu", "silu"), ("ffn_relu", "relu")])
def test_plain_variants_have_fresh_weights_and_the_named_activation(variant: str, act: str) -> None:
    net = Net()
    old = net.blocks[0].fc1.weight.clone()
    gp.ReplaceFFN(variant).attach(net)
    assert not torch.equal(net.blocks[0].fc1.weight, old)
    assert find(net)[0][0].activation == act


def test_warm_start_refuses_what_it_cannot_do_and_nearest_says_how_far_off() -> None:
    net = Net()
    with pytest.raises(ValueError, match="'relu' does"):
        gp.ReplaceFFN("swiglu", match="width", warm_start=True).attach(net)
    with pytest.raises(ValueError, match="needs a bias"):
        gp.ReplaceFFN("reglu", match="width", warm_start=True, bias=False).attach(net)
    bert = FAMILIES["bert"][0]().eval()
    before = run(bert, TEXT)
    plug = gp.ReplaceFFN("swiglu", match="width", warm_start="nearest")
    plug.attach(bert)
    assert all("off by" in line for line in plug.describe(bert).values())
    assert (run(bert, TEXT) - before).norm() / before.norm() < 0.02


def test_a_pretrained_model_with_fresh_blocks_is_warned_of(tmp_path: Any) -> None:
    FAMILIES["bert"][0]().save_pretrained(tmp_path)
    model = tr.BertModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="warm_start=True"):
        gp.ReplaceFFN("swiglu").attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.ReplaceFFN("auto", match="width", warm_start=True).attach(tr.BertModel.from_pretrained(tmp_path))


def test_fresh_weights_follow_the_models_initialiser_and_the_seed() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = tr.BertModel(tr.BertConfig(**SIZES, initializer_range=0.5))
        torch.rand(3)  # drawn numbers in between change nothing
        gp.ReplaceFFN("swiglu", match="width").attach(model)
        weights.append(model.encoder.layer[0].intermediate.dense.gate.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.4 < float(weights[0].std()) < 0.6
    layers = model.encoder.layer
    assert not torch.equal(layers[0].intermediate.dense.gate.weight, layers[1].intermediate.dense.gate.weight)

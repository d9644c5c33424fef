"""ReplaceActivation: every way in which a model holds an activation, and the one that nobody can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn
from torch.nn import functional as F

import gateplug as gp
from gateplug.privacy.sites import Old, find, present
from tests.modules import UserModule, digits, loader, trainer

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
}


class Reaches(nn.Module):
    """ReLU as a module, as a function in an attribute, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()
        self.act_fn = F.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.act_fn(self.relu(self.linear(x)))


class Calls(Reaches):
    """And one call that is out of reach."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.relu(x)


class Method(Reaches):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.relu()


def test_modules_and_functions_in_attributes_are_replaced_and_put_back() -> None:
    net = nn.Sequential(Reaches())
    before = net[0].act_fn
    plug = gp.ReplaceActivation(nn.ReLU, nn.Tanh)
    plug.attach(net, example=torch.randn(2, 4))
    assert list(plug.describe(net)) == ["0.relu", "0.act_fn"]
    x = torch.randn(3, 4)
    assert torch.allclose(net(x), torch.tanh(torch.tanh(net[0].linear(x))))
    plug.detach(net)
    assert net[0].act_fn is before
    assert "act_fn" not in net[0]._modules
    assert torch.allclose(net(x), torch.relu(net[0].linear(x)))


@pytest.mark.parametrize("net", [Calls, Method])
def test_a_call_out_of_reach_is_refused_by_name_and_nothing_is_lost(net: type[nn.Module]) -> None:
    model = nn.Sequential(net())
    text = repr(model)
    with pytest.raises(gp.PlugError, match=rf"forward of 0 \({net.__name__}\)"):
        gp.ReplaceActivation(nn.ReLU).attach(model, example=torch.randn(2, 4))
    assert repr(model) == text
    with pytest.raises((TypeError, RuntimeError)):
        gp.ReplaceActivation(nn.ReLU).attach(model, example=torch.randn(2, 5))
    assert repr(model) == text


def test_in_a_training_the_first_step_finds_the_call(tmp_path: Path) -> None:
    module = UserModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Calls(), nn.Linear(4, 10)))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(gp.PlugError, match=r"net\.2 \(Calls\)"):
        trainer(tmp_path, callbacks=[gp.ReplaceActivation(nn.ReLU)]).fit(module, loader())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    for layers in ("net.2", ["net.2"], "class:Calls", Calls):
        with pytest.raises(gp.PlugError, match=r"net\.2 \(Calls\)"):
            trainer(tmp_path, callbacks=[gp.ReplaceActivation(nn.ReLU, layers=layers)]).fit(module, loader())
    elsewhere = gp.ReplaceActivation(nn.ReLU, layers="net.3")
    module.net[3] = nn.Sequential(nn.ReLU(), nn.Linear(4, 10))
    trainer(tmp_path, callbacks=[elsewhere], max_steps=2).fit(module, loader())
    assert list(elsewhere.describe(module)) == ["net.3.0"]


@pytest.mark.parametrize(
    ("model", "old", "sites"),
    [
        (lambda: tr.BertModel(tr.BertConfig(**SIZES)), nn.GELU, ["intermediate.intermediate_act_fn"]),
        (lambda: tr.BertModel(tr.BertConfig(**SIZES, hidden_act="relu")), nn.ReLU, ["intermediate.intermediate_act_fn"]),
        (lambda: tr.GPT2Model(tr.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30)), "gelu_tanh", ["mlp.act"]),
        (
            lambda: tr.OPTModel(
                tr.OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, vocab_size=30, word_embed_proj_dim=16)
            ),
            "relu",
            ["activation_fn"],
        ),
        (lambda: tr.T5Model(tr.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30)), nn.ReLU, ["act"]),
        (lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4)), "quick_gelu", ["mlp.activation_fn"]),
        (lambda: tr.ResNetModel(tr.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")), nn.ReLU, ["activation"]),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2), nn.ReLU, ["activation"]),
    ],
)  # fmt: skip
def test_sites_of_known_families(model: Any, old: Any, sites: list[str]) -> None:
    net = model()
    found = find(net, Old.of(old))
    assert len(found) >= 2
    assert all(any(s.name.endswith(tail) for tail in sites) for s in found)
    plug = gp.ReplaceActivation(old, gp.TemperedSigmoid)
    plug.attach(net)
    assert not find(net, Old.of(old))
    assert sum(isinstance(m, gp.TemperedSigmoid) for m in net.modules()) == len(found)
    plug.detach(net)
    assert find(net, Old.of(old)) == found


def test_what_comes_in_may_compute_by_the_same_function() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    plug = gp.ReplaceActivation(nn.Sigmoid, gp.TemperedSigmoid(1.5, 2.0, 0.7, trainable=True))
    plug.attach(net, example=torch.randn(2, 4))
    assert isinstance(net[1], gp.TemperedSigmoid)


@pytest.mark.parametrize("old", [nn.Linear, nn.Module, nn.Sequential, "linear"])
def test_what_is_no_activation_is_refused(old: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="old="):
        gp.ReplaceActivation(old)


def test_the_poolers_tanh_is_left_unless_named() -> None:
    bert = tr.BertModel(tr.BertConfig(**SIZES))
    with pytest.raises(gp.PlugError, match=r"pooler\.activation \(Tanh\)"):
        gp.ReplaceActivation(nn.Tanh).attach(bert)
    plug = gp.ReplaceActivation(nn.Tanh, layers="pooler")
    plug.attach(bert)
    assert list(plug.describe(bert)) == ["pooler.activation"]


def test_instances_are_one_a_site_copied_or_shared() -> None:
    def made(new: Any, share: bool) -> list[nn.Module]:
        net = nn.Sequential(nn.ReLU(), nn.ReLU())
        gp.ReplaceActivation(nn.ReLU, new, share=share).attach(net)
        return list(net._modules.values())

    template = gp.TemperedSigmoid(scale=3.0, trainable=True)
    for new in (template, lambda: gp.TemperedSigmoid(scale=3.0, trainable=True)):
        a, b = made(new, share=False)
        assert a is not b
        assert a is not template
        assert float(b.scale) == 3.0
        a, b = made(new, share=True)
        assert a is b


def test_an_instance_that_two_layers_share_is_replaced_in_both() -> None:
    act = nn.ReLU()
    net = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    gp.ReplaceActivation(nn.ReLU, nn.Tanh).attach(net)
    assert [type(m).__name__ for m in net] == ["Linear", "Tanh", "Linear", "Tanh"]


def test_trainable_numbers_are_not_decayed(tmp_path: Path) -> None:
    class Decayed(UserModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), weight_decay=0.3)

    t = trainer(tmp_path, callbacks=[gp.ReplaceActivation(nn.ReLU, gp.TemperedSigmoid(trainable=True))], max_steps=1)
    t.fit(Decayed(), loader())
    weights, numbers = t.optimizers[0].param_groups
    assert (weights["weight_decay"], numbers["weight_decay"]) == (0.3, 0.0)
    assert len(numbers["params"]) == 6


def test_torchs_fused_path_does_not_skip_the_new_activation() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2).eval()
    x = torch.randn(2, 4, 16)
    gp.ReplaceActivation(nn.ReLU, nn.Tanh).attach(net)
    with torch.no_grad():
        fast = net(x)
    assert torch.allclose(net(x), fast, atol=1e-6)


def test_present_lists_activations_and_not_their_parts() -> None:
    bert = tr.BertModel(tr.BertConfig(**SIZES))
    assert len(present(bert)) == 3
    assert not any("act.act" in line or "dropout" in line for line in present(bert))


def test_checkpoints_keep_a_module_given_as_template(tmp_path: Path) -> None:
    module = UserModule()
    t = trainer(tmp_path, callbacks=[gp.ReplaceActivation("relu", gp.TemperedSigmoid(1.5, 3.0, 0.7))], max_epochs=1)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "a.ckpt")
    loaded = gp.load(tmp_path / "a.ckpt", UserModule())
    assert isinstance(loaded.net.blocks[0].act, gp.TemperedSigmoid)
    assert loaded.net.blocks[0].act.scale == 1.5
    x = digits(4)[:][0]
    assert torch.equal(loaded(x), module.eval()(x))
    t = trainer(tmp_path, callbacks=[gp.ReplaceActivation("relu", lambda: gp.TemperedSigmoid(1.5))], max_epochs=1)
    module = UserModule()
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(gp.PlugError, match="plugs="):
        gp.load(tmp_path / "b.ckpt", UserModule())
    plugs = [gp.ReplaceActivation("relu", lambda: gp.TemperedSigmoid(1.5))]
    assert torch.equal(gp.load(tmp_path / "b.ckpt", UserModule(), plugs=plugs)(x), module.eval()(x))
    other = [gp.ReplaceActivation("relu", gp.TemperedSigmoid)]
    with pytest.raises(gp.PlugError, match="same arguments"):
        gp.load(tmp_path / "b.ckpt", UserModule(), plugs=other)

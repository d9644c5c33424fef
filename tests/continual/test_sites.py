"""Where gates stand: which layers are found, in networks that other people wrote."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import gateplug as gp
from gateplug.continual.sites import find_sites
from tests.modules import vit

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


class FunctionalMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(torch.relu(self.a(x)))))


class SharedAct(nn.Module):
    """One activation instance behind all layers."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.act = act or nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.b(self.act(self.a(x)))))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4 * 4, 12), nn.ReLU(), nn.Linear(12, 10),
    )  # fmt: skip


def units(module: nn.Module) -> list[str]:
    return list(find_sites(module).units)


def test_a_network_with_functional_activations() -> None:
    sites = find_sites(FunctionalMLP())
    assert list(sites.units) == ["a", "b"]
    assert [s.reads for s in sites.units.values()] == ["a", "b"], "relu is homogeneous: read before it"
    assert sites.readouts == ["head"]


def test_a_norm_between_layer_and_activation_belongs_to_the_units() -> None:
    sites = find_sites(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    assert list(sites.units) == ["0"]
    assert sites.units["0"].rows == ("1",)
    assert sites.units["0"].reads == "2"


def test_one_activation_instance_that_serves_several_layers() -> None:
    sites = find_sites(SharedAct())
    assert {n: s.reads for n, s in sites.units.items()} == {"a": "act", "b": "act"}


def test_a_convolutional_network() -> None:
    sites = find_sites(cnn())
    assert {n: s.units for n, s in sites.units.items()} == {"0": 4, "4": 6, "7": 12}
    assert sites.units["0"].rows == ("1",)
    assert sites.readouts == ["9"]


def test_heads_and_hidden_units_of_hugging_face_vit() -> None:
    sites = find_sites(vit())
    assert [n.split(".")[-1] for n in sites.units] == ["fc1", "fc1"]
    assert len(sites.heads) == 2
    assert {(a.heads, a.groups, a.width) for a in sites.heads.values()} == {(2, 2, 8)}
    assert sites.readouts == ["classifier"]
    assert "vit.embeddings.patch_embeddings.projection" in sites.left


def test_bert() -> None:
    sites = find_sites(BertForSequenceClassification(BertConfig(**TEXT)))
    assert list(sites.units) == ["bert.encoder.layer.0.intermediate.dense", "bert.pooler.dense"]
    (attention,) = sites.heads.values()
    assert attention.out == "bert.encoder.layer.0.attention.output.dense"
    assert attention.query == "bert.encoder.layer.0.attention.self.query"
    assert sites.readouts == ["classifier"]


def test_distilbert() -> None:
    sites = find_sites(
        DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=4, hidden_dim=24, max_position_embeddings=16)
        )
    )
    assert list(sites.units) == ["distilbert.transformer.layer.0.ffn.lin1"]
    assert next(iter(sites.heads.values())).heads == 4
    assert sites.readouts == ["classifier"]


def test_gpt2_has_packed_queries_keys_and_values_in_transposed_layers() -> None:
    sites = find_sites(GPT2ForSequenceClassification(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4, n_positions=16)))
    assert {n: s.units for n, s in sites.units.items()} == {"transformer.h.0.mlp.c_fc": 64}
    (attention,) = sites.heads.values()
    assert (attention.query, attention.key, attention.value) == ("transformer.h.0.attn.c_attn", None, None)
    rows = attention.rows(torch.tensor([1.0, 0.5, 0.2, 0.0]))["transformer.h.0.attn.c_attn"]
    assert torch.equal(rows.reshape(3, 4, 4)[:, :, 0], torch.tensor([1.0, 0.5, 0.2, 0.0]).repeat(3, 1))


def test_llama_has_grouped_heads_and_a_gated_feed_forward() -> None:
    config = {k: v for k, v in TEXT.items() if "dropout" not in k}
    sites = find_sites(LlamaForSequenceClassification(LlamaConfig(**config, num_key_value_heads=2)))
    (site,) = sites.units.values()
    assert site.layer == "model.layers.0.mlp.gate_proj"
    assert site.rows == ("model.layers.0.mlp.up_proj",)
    (attention,) = sites.heads.values()
    assert (attention.heads, attention.groups) == (4, 2)
    rows = attention.rows(torch.tensor([1.0, 0.5, 0.2, 0.7]))
    assert torch.equal(rows[attention.query], torch.tensor([1.0, 0.5, 0.2, 0.7]).repeat_interleave(4))
    assert torch.equal(rows["model.layers.0.self_attn.k_proj"], torch.tensor([0.5, 0.2]).repeat_interleave(4))
    assert sites.readouts == ["score"]


def test_resnet() -> None:
    net = ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=10)
    )
    sites = find_sites(net)
    assert "resnet.embedder.embedder.convolution" in sites.units
    assert sites.units["resnet.embedder.embedder.convolution"].rows == ("resnet.embedder.embedder.normalization",)
    assert sites.readouts == ["classifier.1"]


@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.GELU()])
def test_torchs_own_encoder_layer(activation: Any) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, activation, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1))

    sites = find_sites(Encoder())
    assert list(sites.units) == ["layer.linear1"]
    assert sites.readouts == ["head"]
    x = torch.randn(2, 3, 16)
    net, plug = Encoder(), gp.GateON()
    text, out = repr(net), net(x)
    plug.attach(net)
    assert not torch.equal(net(x), out)
    with torch.no_grad():  # in eval mode torch has a fast path, which would pass by the gate
        assert torch.allclose(net.eval()(x), net.train()(x), atol=1e-6)
    plug.detach(net)
    assert repr(net) == text
    assert torch.equal(net(x), out)


def test_a_module_with_several_parts() -> None:
    class Parts(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5), nn.ReLU())
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x))

        def training_step(self, batch: Any) -> Tensor:
            return self(batch).sum()

    sites = find_sites(Parts())
    assert list(sites.units) == ["encoder.0", "encoder.2"]
    assert sites.readouts == ["head"]


def test_what_cannot_be_followed_in_a_network_does_not_hide_the_rest() -> None:
    class Chooses(nn.Module):
        """Its forward looks at values."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) if x.mean() > 0 else self.two(x)

    class Around(nn.Module):
        """Its head was built first."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)
            self.a, self.blocks = nn.Linear(8, 6), nn.ModuleList([Chooses(), Chooses()])

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    sites = find_sites(Around())
    assert set(sites.units) == {"a", "blocks.0.one.0", "blocks.1.one.0"}
    assert sites.readouts == ["head"]
    sites = find_sites(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Chooses()))
    assert set(sites.units) == {"0", "2.one.0"}
    assert sites.readouts == ["2.two"]


def test_an_activation_that_somebody_wrote() -> None:
    class Snake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.sin(self.alpha * x).square() / self.alpha

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean()

    sites = find_sites(nn.Sequential(nn.Linear(8, 6), Snake(), nn.Linear(6, 5), Centred(), nn.Linear(5, 3)))
    assert {n: s.reads for n, s in sites.units.items()} == {"0": "1"}
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    gp.ReplaceActivation(nn.ReLU, gp.TemperedSigmoid(trainable=True)).attach(net)
    assert find_sites(net).units["0"].reads == "1"


def test_a_sigmoid_behind_the_read_out_makes_no_hidden_layer_of_it() -> None:
    sites = find_sites(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1), nn.Sigmoid()))
    assert list(sites.units) == ["0"]
    assert sites.readouts == ["2"]


def test_transposed_convolutions_get_no_gate() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 1, 1))
    assert units(net) == ["0"]
    plug = gp.GateON()
    plug.attach(net)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 1, 8, 8)
    assert plug.describe(net)["2"] == "held back weight by weight"


def test_looking_leaves_a_network_as_it_was() -> None:
    class Notes(nn.Module):
        """Keeps what it saw, counts its calls, and has a metric beside."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(8, 6), nn.Linear(6, 3)
            self.mean = torchmetrics.MeanMetric()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = torch.relu(self.a(x))
            return self.head(self.seen)

    net = Notes()
    assert units(net) == ["a"]
    assert net.calls == 0
    assert not hasattr(net, "seen")
    assert net.mean._update_count == 0


# ---------------------------------------------------------------------- what is refused


def test_a_read_out_that_is_named_is_refused() -> None:
    net = FunctionalMLP()
    with pytest.raises(gp.PlugError, match="head is the read-out"):
        gp.GateON(layers=["a", "head"]).attach(net)
    assert not any(isinstance(m, gp.Gate) for m in net.modules())


def test_an_activation_that_cannot_be_read_is_refused_and_parameters_can_be() -> None:
    class Tanh(FunctionalMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.b(torch.relu(self.a(x)))))

    with pytest.raises(gp.PlugError, match=r"tanh gives after b:.*Hold it as a module"):
        gp.GateON().attach(Tanh())
    gp.GateON("parameter").attach(Tanh())
    gp.GateON(layers="a").attach(Tanh())


def test_robertas_head_calls_tanh_as_a_function() -> None:
    net = RobertaForSequenceClassification(RobertaConfig(**TEXT))
    with pytest.raises(gp.PlugError, match=r"classifier\.dense"):
        gp.GateON().attach(net)
    gp.GateON(layers="roberta.encoder").attach(net)


def test_a_network_without_hidden_layers_is_refused_by_name() -> None:
    with pytest.raises(gp.PlugError, match=r"finds no hidden layer.*0 \(the read-out\)"):
        gp.GateON().attach(nn.Sequential(nn.Linear(8, 3)))


def test_a_layer_with_nothing_to_gate_is_refused() -> None:
    with pytest.raises(gp.PlugError, match=r"nothing to gate in 1 \(BatchNorm1d\)"):
        gp.GateON(layers="1").attach(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))


def test_weights_that_are_not_there_yet_are_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(gp.PlugError, match="meta device"):
        gp.GateON().attach(net)


def test_named_layers_stand_for_what_is_in_and_below_them() -> None:
    net = nn.Sequential(cnn(), nn.ReLU(), nn.Linear(10, 3))
    plug = gp.GateON(layers="0")
    plug.attach(net)
    assert set(plug.gates(net)) == {"0.0.gate", "0.4.gate", "0.7.gate", "0.9.gate"}


def test_a_layer_without_an_activation_can_be_named() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    plug = gp.GateON(layers=["0"])
    plug.attach(net)
    assert list(plug.gates(net)) == ["0.gate"]


def test_a_layer_with_a_gate_and_held_weights_says_both() -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, num_labels=2
    )
    net, plug = BertForSequenceClassification(config), gp.GateON()
    plug.attach(net)
    assert plug.describe(net)["bert.encoder.layer.0.attention.output.dense"] == "4 heads of 4; held back weight by weight"

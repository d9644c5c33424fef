"""Gates of contexts on layers: rows, growth, loading, statistics of norms, and the way out by gp.fold."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import gateplug as gp
from gateplug.continual.functional import gate
from gateplug.continual.guards import Guards
from gateplug.continual.layers import Availability, ContextGate, HeadGate
from gateplug.continual.norms import ContextStatistics
from gateplug.core.edit import AddGate
from tests.continual.test_sites import TEXT, FunctionalMLP, cnn
from tests.plugs import ToyPlug


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def attached(net: nn.Module, opened: int = 3, **arguments: Any) -> gp.GateON:
    """A plug on a network in which so many contexts were opened."""
    torch.manual_seed(0)  # gates are a function of it
    plug = gp.GateON(**arguments)
    plug.attach(net)
    for context in range(1, opened):
        plug.switch(net, context)
    return plug


def disturb(net: nn.Module) -> None:
    """Run the network in training, so that statistics move."""
    net.train()
    for _ in range(3):
        net(torch.randn(16, 8))


# ---------------------------------------------------------------------- gates


def test_a_gate_multiplies_units_by_the_row_of_its_context_over_its_rms() -> None:
    g = ContextGate(4, 2, 0.5, seed=3)
    x = torch.randn(5, 4)
    for context in range(2):
        g.place(context, context)
        row = g.rows[context].detach().double()
        opened = torch.tanh(row.clamp_min(0)) ** 2
        expected = x.double() * opened / opened.square().mean().sqrt()
        assert torch.allclose(g(x).double(), expected, atol=1e-6)
    assert not torch.equal(g.rows[0], g.rows[1])


def test_channels_are_gated_in_images_and_heads_side_by_side() -> None:
    channels = ContextGate(3, 1, 0.5, seed=0, trailing=2)
    x = torch.ones(2, 3, 4, 4)
    assert torch.allclose(channels(x)[0, :, 1, 2], channels.scale())
    heads = HeadGate(2, 1, 0.5, seed=0, trailing=0, repeat=3)
    out = heads(torch.ones(2, 5, 6))[0, 0]
    assert torch.equal(out, heads.scale())
    assert torch.equal(out[:3], out[:1].expand(3))


@pytest.mark.parametrize("share", [0.07, 0.16, 0.5, 0.9])
def test_open_share_is_the_share_of_units_that_start_open(share: float) -> None:
    row = ContextGate(20_000, 1, share, seed=1).rows[0]
    # standard error √(.25 / 20,000) = .0035
    assert abs(float((row > 0).float().mean()) - share) < 0.011


def test_a_context_starts_with_at_least_one_unit_open() -> None:
    few = ContextGate(2, 40, 0.05, seed=1)  # 90 % of the contexts would have none
    assert all((row > 0).any() for row in few.rows)
    few.place(0, 0)
    assert few.scale().isfinite().all()
    assert few.scale().any()


def test_a_row_is_a_function_of_the_gate_and_the_context_not_of_when_it_came() -> None:
    early, late = ContextGate(6, 4, 0.5, seed=5), ContextGate(6, 1, 0.5, seed=5)
    torch.randn(3)
    while len(late.rows) < 4:
        late.grow()
    assert all(torch.equal(a, b) for a, b in zip(early.rows, late.rows, strict=True))


def test_gates_of_one_network_differ_and_attaching_again_gives_the_same() -> None:
    a, b = mlp(), mlp()
    first, second = attached(a, 1), attached(b, 1)
    rows = [[g.rows[0] for g in plug.gates(net).values()] for plug, net in ((first, a), (second, b))]
    assert all(torch.equal(x, y) for x, y in zip(*rows, strict=True))
    assert not torch.equal(rows[0][0][:5], rows[0][1][:5])


def test_openness_is_that_of_the_active_context() -> None:
    g = ContextGate(4, 2, 0.5, seed=3)
    g.place(1, 0)
    assert torch.equal(g.openness().values, gate(g.rows[0].detach()))
    assert g.opennesses().shape == (2, 4)


# ---------------------------------------------------------------------- contexts


@given(st.lists(st.integers(0, 2), max_size=12))
@settings(max_examples=25, deadline=None)
def test_the_order_in_which_contexts_are_shown_does_not_matter(order: list[int]) -> None:
    net = mlp()
    plug = attached(net)
    disturb(net)
    net.eval()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    answers = {}
    for context in (0, 1, 2):
        plug.show(net, context)
        answers[context] = net(x)
    for context in order:
        plug.show(net, context)
        assert torch.equal(net(x), answers[context])
    assert plug.context == 2


def test_statistics_of_a_context_stay_while_another_trains() -> None:
    net = mlp()
    plug = attached(net, 1)
    disturb(net)
    then = {k: v.clone() for k, v in net[1].state_dict().items() if k.startswith(("running", "num"))}
    plug.switch(net, 1)
    assert torch.equal(net[1].running_mean, torch.zeros(6)), "a new context begins as the layer began"
    assert net[1].num_batches_tracked == 0
    disturb(net)
    now = net[1].running_mean.clone()
    plug.show(net, 0)
    assert all(torch.equal(v, net[1].state_dict()[k]) for k, v in then.items())
    plug.show(net, 1)
    assert torch.equal(net[1].running_mean, now)


def test_new_contexts_begin_with_the_statistics_of_a_pretrained_network() -> None:
    net = mlp()
    disturb(net)
    before = net[1].running_mean.clone()
    plug = attached(net, 1)
    disturb(net)
    plug.switch(net, 1)
    assert torch.equal(net[1].running_mean, before)
    disturb(net)
    plug.switch(net, 0)
    plug.switch(net, 2)
    assert torch.equal(net[1].running_mean, before)


def test_shared_statistics_warn_and_can_be_refused() -> None:
    with pytest.warns(UserWarning, match=r"bn='shared'\): the running statistics of 1 "):
        gp.GateON(bn="shared").attach(mlp())
    with pytest.raises(gp.PlugError, match=r"running statistics in 1,.*per_context"):
        gp.GateON(bn="refuse").attach(mlp())
    gp.GateON(bn="refuse").attach(nn.Sequential(nn.Linear(8, 6), nn.GroupNorm(2, 6), nn.ReLU(), nn.Linear(6, 3)))


def test_instance_norm_with_running_statistics_counts_as_well() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True), nn.ReLU(), nn.Conv2d(2, 1, 1))
    attached(net, 1)
    assert isinstance(net[1].contexts, ContextStatistics)


def test_unknown_contexts_and_too_many_are_refused() -> None:
    net = mlp()
    plug = attached(net, 2, contexts=2)
    with pytest.raises(gp.PlugError, match=r"context 3 is unknown. There are 0 … 1, and 2 is new"):
        plug.switch(net, 3)
    with pytest.raises(gp.PlugError, match="contexts=2.*one too many"):
        plug.switch(net, 2)
    with pytest.raises(gp.PlugError, match="context 2 is unknown"):
        plug.show(net, 2)
    with pytest.raises(gp.PlugError, match="unknown"):
        plug.show(net, -1)
    with pytest.raises(TypeError):
        plug.switch(net, 1.0)  # type: ignore[arg-type]
    assert plug.context == 1


def test_a_module_without_the_plug_is_refused() -> None:
    plug = gp.GateON()
    with pytest.raises(gp.PlugError, match=r"call attach\(module\) first"):
        plug.switch(mlp(), 0)
    plug.attach(mlp())
    with pytest.raises(gp.PlugError, match=r"call attach\(module\) first"):
        plug.show(mlp(), 0)


def test_a_copy_can_be_shown_in_another_context_and_the_original_stays() -> None:
    net = mlp()
    plug = attached(net)
    twin = copy.deepcopy(net)
    plug.show(twin, 0)
    assert {m.active for m in net.modules() if isinstance(m, ContextGate)} == {2}
    assert {m.active for m in twin.modules() if isinstance(m, ContextGate)} == {0}


# ---------------------------------------------------------------------- state


def test_a_plain_state_dict_brings_rows_statistics_and_contexts() -> None:
    net = mlp()
    plug = attached(net)
    disturb(net)
    plug.show(net, 1)
    other = mlp()
    fresh = gp.GateON()
    fresh.attach(other)
    other.load_state_dict(net.state_dict())
    assert (fresh.context, fresh.known) == (2, 3)
    x = torch.randn(4, 8)
    for context in (0, 2, 1):
        plug.show(net, context)
        fresh.show(other, context)
        assert torch.equal(net.eval()(x), other.eval()(x))


def test_a_state_with_fewer_contexts_takes_the_others_away() -> None:
    net, other = mlp(), mlp()
    attached(net, 2)
    plug = attached(other, 4)
    other.load_state_dict(net.state_dict())
    assert (plug.known, {len(g.rows) for g in plug.gates(other).values()}) == (2, {2})
    plug.switch(other, 2)
    assert {len(g.rows) for g in plug.gates(other).values()} == {3}


def test_availability_stays_in_float32_when_a_network_is_halved() -> None:
    net = mlp()
    plug = attached(net, 1)
    a = next(iter(plug.availabilities().values()))
    a.draft.mul_(0.998)  # bfloat16 would make 0.9961 of it
    net.to(torch.bfloat16)
    assert a.draft.dtype == torch.float32
    assert torch.equal(a.draft, torch.full_like(a.draft, 0.998))
    plug.switch(net, 1)
    assert {row.dtype for g in plug.gates(net).values() for row in g.rows} == {torch.bfloat16}


def test_module_with_contexts_is_pickled() -> None:
    net = mlp()
    attached(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    x = torch.randn(4, 8)
    assert torch.equal(twin.eval()(x), net.eval()(x))


def test_state_of_a_network_that_was_pretrained_fits_one_that_was_not() -> None:
    """Inference builds the network from its config; then nothing was loaded by from_pretrained."""
    pretrained, built = FunctionalMLP(), FunctionalMLP()
    for p in pretrained.parameters():
        p._is_hf_initialized = True  # type: ignore[attr-defined]
    for net in (pretrained, built):
        net.norm = nn.LayerNorm(8)
    for p in pretrained.norm.parameters():
        p._is_hf_initialized = True  # type: ignore[attr-defined]
    plugs = [gp.GateON(), gp.GateON()]
    for plug, net in zip(plugs, (pretrained, built), strict=True):
        plug.attach(net)
    assert (plugs[0].describe(pretrained)["norm"], plugs[1].describe(built)["norm"]) == ("frozen", "held back weight by weight")
    state = {k: v.clone() for k, v in built.state_dict().items()}
    built.load_state_dict(pretrained.state_dict())
    assert isinstance(built.norm.guards, Guards)
    assert built.norm.guards.frozen == ["bias", "weight"]
    pretrained.load_state_dict(state)
    assert sorted(pretrained.norm.guards.of) == ["of_bias", "of_weight"]


# ---------------------------------------------------------------------- the way out


def same_in_every_context(net: nn.Module, plug: gp.GateON, *x: Tensor, **kwargs: Tensor) -> None:
    net.eval()
    names = set(dict(net.named_parameters()))
    for context in range(plug.known):
        plug.show(net, context)
        plain = gp.fold(net)
        with torch.no_grad():
            expected, out = net(*x, **kwargs), plain(*x, **kwargs)
        expected, out = (o if isinstance(o, Tensor) else o.logits for o in (expected, out))
        assert torch.allclose(out, expected, atol=2e-6), context
        assert set(dict(plain.named_parameters())) <= names
        for m in plain.modules():
            assert not m._forward_hooks
            assert not m._forward_pre_hooks
            assert "gateplug.continual" not in type(m).__module__, m
        exported = torch.export.export(plain, x, kwargs).module()(*x, **kwargs)
        exported = exported if isinstance(exported, Tensor) else exported.logits
        assert torch.allclose(exported, expected, atol=2e-6)


def test_folds_a_dense_network_in_every_context() -> None:
    net = mlp()
    plug = attached(net)
    disturb(net)
    same_in_every_context(net, plug, torch.randn(4, 8))


def test_folds_a_convolutional_network_in_every_context() -> None:
    net = cnn()
    same_in_every_context(net, attached(net), torch.randn(2, 1, 8, 8))


def test_folds_bert_with_its_heads_in_every_context() -> None:
    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig(**TEXT, attn_implementation="eager"))
    plug = attached(net, 2)
    same_in_every_context(net, plug, input_ids=torch.arange(12).reshape(2, 6))


def test_folds_an_activation_that_is_a_function() -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, 0.0, F.gelu, batch_first=True), nn.Flatten(), nn.Linear(24, 3))
    net[0].norm_first = True  # torch's fast path takes other kernels in the plain network
    text = repr(net)
    plug = attached(net, 2)
    assert repr(gp.fold(net)) == text
    assert gp.fold(net)[0].activation is F.gelu
    plug.detach(net)
    assert repr(net) == text


class Shift(gp.Gate):
    """Does not commute with what multiplies."""

    room = "toy"

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class ShiftPlug(ToyPlug):
    def plan(self, module: nn.Module, layers: Any) -> Any:
        return [AddGate(n, Shift(), what="shift") for n in layers]

    def terms(self, module: nn.Module) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("first", ["gateon", "shift"])
def test_folds_gates_in_the_order_in_which_they_were_put_on(first: str) -> None:
    net = mlp()
    plug, shift = gp.GateON(), ShiftPlug(layers="3")
    for p in (plug, shift) if first == "gateon" else (shift, plug):
        p.attach(net)
    x = torch.randn(4, 8)
    assert torch.allclose(gp.fold(net)(x), net.eval()(x), atol=1e-6)


@pytest.mark.parametrize("first", ["gateon", "toy"])
def test_folds_two_gates_on_one_layer_in_both_orders(first: str) -> None:
    net = mlp()
    plug, toy = gp.GateON(), ToyPlug(layers="3", energy=0.0)
    for p in (plug, toy) if first == "gateon" else (toy, plug):
        p.attach(net)
    plug.switch(net, 1)
    with torch.no_grad():
        next(iter(toy.parameters(net).values())).copy_(torch.linspace(-2, 2, 5))
    x = torch.randn(4, 8)
    for context in (0, 1):
        plug.show(net, context)
        plain = gp.fold(net)
        assert torch.allclose(plain(x), net.eval()(x), atol=1e-6)
        assert not any(m._forward_hooks for m in plain.modules())


def test_folds_a_weight_that_is_computed() -> None:
    net = mlp()
    nn.utils.parametrizations.weight_norm(net[0])
    nn.utils.parametrizations.weight_norm(net[3])
    plug = attached(net, 2)
    a, b = (net[i].gate.availability for i in (0, 3))
    assert a is not b, "a computed weight is another tensor each time, and its id means nothing"
    x = torch.randn(4, 8)
    assert torch.allclose(gp.fold(net)(x), net.eval()(x), atol=1e-6)
    plug.detach(net)


def test_nothing_stays_after_detach(tmp_path: Path) -> None:
    net = mlp()
    disturb(net)
    text, names, x = repr(net), list(net.state_dict()), torch.randn(4, 8)
    out = net.eval()(x)
    plug = attached(net, 3)
    plug.show(net, 0)
    plug.detach(net)
    assert repr(net) == text
    assert list(net.state_dict()) == names
    assert torch.equal(net.eval()(x), out)
    assert not any(isinstance(m, Availability) for m in net.modules())

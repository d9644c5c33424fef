"""Edits: all or nothing, in the right order, on shared layers, sequentials and tuples."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.edit import AddGate, Edit, Replace, SetAttribute
from gateplug.core.record import all_records, apply, undo
from gateplug.core.wrap import unwrap, wrap
from tests.modules import BACKEND, Net, UserModule, digits
from tests.plugs import ToyPlug, UnitGate


def put(net: nn.Module, *edits: Edit) -> None:
    """Apply edits as a plug does."""
    apply(net, "Toy", "toy", {}, 0, list(edits))


def test_an_error_in_the_middle_undoes_what_was_done() -> None:
    net = Net()
    text, keys = repr(net), list(net.state_dict())
    for name in ("gate", "toy_gate"):
        net.blocks[1].fc2.add_module(name, nn.Identity())
    taken = repr(net)
    with pytest.raises(gp.PlugError, match="named 'toy_gate' already"):
        ToyPlug().attach(net)
    assert repr(net) == taken
    for name in ("gate", "toy_gate"):
        del net.blocks[1].fc2._modules[name]
    assert (repr(net), list(net.state_dict())) == (text, keys)
    assert not net.blocks[0].fc2._forward_hooks


def test_attaching_twice_changes_nothing_and_other_arguments_are_refused() -> None:
    net = Net()
    plug = ToyPlug()
    plug.attach(net)
    first = net.blocks[0].fc2.gate
    plug.attach(net)
    ToyPlug().attach(net)
    assert net.blocks[0].fc2.gate is first
    assert len(net.blocks[0].fc2._forward_hooks) == 1
    with pytest.raises(gp.PlugError, match="sparsity=0.1"):
        ToyPlug(sparsity=0.2).attach(net)


def test_what_came_last_goes_first() -> None:
    net = Net()
    replace, toy = gp.ReplaceFFN("swiglu"), ToyPlug(layers="blocks.*.fc2")
    replace.attach(net)
    toy.attach(net)
    with pytest.raises(gp.PlugError, match="detach ToyPlug first"):
        replace.detach(net)
    toy.detach(net)
    replace.detach(net)
    assert not [k for m in net.modules() for k in m.__dict__ if "gateplug" in k]


def test_a_layer_under_two_names_is_replaced_under_both_and_given_back() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    new = nn.Linear(4, 4)
    put(net, Replace("a", new))
    assert net["a"] is net["b"][0] is new
    undo(net, all_records(net)[0])
    assert net["a"] is net["b"][0] is shared


def test_records_move_with_the_part_that_was_changed() -> None:
    module = UserModule()
    toy, replace = ToyPlug(), gp.ReplaceFFN("swiglu", layers="blocks.*")
    replace.attach(module)
    toy.attach(module)
    other = UserModule(module.net)
    assert list(toy.describe(other)) == ["net.blocks.0.fc2", "net.blocks.1.fc2"]
    toy.attach(other)
    x = torch.randn(2, 8, 8)
    part = gp.fold(module.net.blocks[0])
    h = module.net.embed(x)
    assert not any(m._forward_hooks for m in part.modules())
    assert torch.equal(part(h), module.eval().net.blocks[0](h))
    toy.detach(other.net)
    replace.detach(module)
    assert list(module.state_dict()) == list(UserModule().state_dict())


def test_two_lambdas_are_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # the first plug is gone when the second is made, which may come to lie where it lay
    monkeypatch.setattr("gateplug.core.attach.id", lambda thing: 1, raising=False)
    net = Net()
    gp.ReplaceFFN(layers=lambda n, m: n == "blocks.0").attach(net)
    with pytest.raises(gp.PlugError, match="carries ReplaceFFN"):
        gp.ReplaceFFN(layers=lambda n, m: n == "blocks.1").attach(net)


def test_a_gate_on_a_sequential_is_its_last_child_and_runs_once() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    x = torch.randn(3, 4)
    before = net(x)
    put(net, AddGate("0", UnitGate(4, 0.0)))
    share = torch.sigmoid(torch.tensor(1.0))
    assert torch.allclose(net(x), before * share, atol=1e-6)
    undo(net, all_records(net)[0])
    assert torch.equal(net(x), before)


class Tuple(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), "rest"


class Text(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return "text"


def test_a_gate_takes_the_first_of_a_tuple_and_refuses_other_outputs() -> None:
    net = nn.ModuleDict({"t": Tuple(4, 4), "s": Text(4, 4)})
    put(net, AddGate("t", UnitGate(4, 0.0)), AddGate("s", UnitGate(4, 0.0)))
    x = torch.randn(2, 4)
    first, rest = net["t"](x)
    assert rest == "rest"
    assert torch.allclose(first, nn.functional.linear(x, net["t"].weight, net["t"].bias) * torch.sigmoid(torch.tensor(1.0)))
    with pytest.raises(TypeError, match="tuple"):
        net["s"](x)


def test_layers_that_are_never_called_are_refused() -> None:
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(gp.PlugError, match="never called"):
        put(attention, AddGate("out_proj", UnitGate(4, 0.0)))
    with pytest.raises(gp.PlugError, match="never called"):
        put(Net(), AddGate("blocks", UnitGate(4, 0.0)))


def test_a_flag_goes_back_when_the_last_plug_that_needs_it_leaves() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    for key in "ab":
        apply(layer, key, key, {}, 0, [SetAttribute("", "activation_relu_or_gelu", 0, shared=True)])
    a, b = all_records(layer)
    undo(layer, a)
    assert layer.activation_relu_or_gelu == 0
    undo(layer, b)
    assert layer.activation_relu_or_gelu == 1
    assert not [k for k in layer.__dict__ if "gateplug" in k]


def test_what_comes_back_follows_the_model_that_was_moved() -> None:
    net = Net()
    plug = gp.ReplaceFFN("swiglu")
    plug.attach(net)
    net.double()
    plug.detach(net)
    assert net(torch.zeros(1, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_replacing_keeps_the_training_mode() -> None:
    net = Net().eval()
    put(net, Replace("embed", nn.Linear(8, 16)))
    assert not net.embed.training
    assert len(all_records(net)) == 1


def test_a_module_in_training_can_be_copied_and_the_copy_stands_alone() -> None:
    module = UserModule()
    calls: list[str] = []
    wrap(module, "training_step", module, lambda inner, *a, **k: calls.append("x"))
    twin = copy.deepcopy(module)
    assert twin.training_step.instance is twin
    unwrap(module, module)
    assert "training_step" not in module.__dict__
    plug = ToyPlug()
    plug.attach(module)
    assert pickle.loads(pickle.dumps(module.net))(torch.zeros(1, 8, 8)).shape == (1, 10)


def test_wraps_nest_in_order_and_leave_the_users_own_attribute() -> None:
    module = UserModule()
    module.training_step = lambda batch, batch_idx: ["inner"]  # type: ignore[method-assign, assignment]
    own = module.training_step
    one, two = object(), object()
    wrap(module, "training_step", one, lambda inner, *a: [*inner(*a), "one"])
    wrap(module, "training_step", two, lambda inner, *a: [*inner(*a), "two"])
    wrap(module, "training_step", one, lambda inner, *a: ["never"])
    assert module.training_step(None, 0) == ["inner", "one", "two"]
    unwrap(module, one)
    assert module.training_step(None, 0) == ["inner", "two"]
    unwrap(module, two)
    assert module.training_step is own


def test_code_compiled_before_a_gate_came_does_not_run_without_it() -> None:
    x = digits(4)[:][0]
    plain, gated, late = Net(), Net(), Net()
    ToyPlug().attach(gated)
    with torch.no_grad():
        expected = gated(x)
        for net in (plain, gated, late):
            net.compile(backend=BACKEND)
        plain(x)  # compiled for layers of these classes without a hook
        assert torch.allclose(gated(x), expected, atol=1e-6)
        late(x)
        ToyPlug().attach(late)
        late.load_state_dict(gated.state_dict())
        assert torch.allclose(late(x), expected, atol=1e-6)

"""Edits: all or nothing, in the right order, on shared layers, sequentials and tuples."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.edit import AddGate, Replace, SetAttribute, swap
from gateplug.core.record import Record, apply, records, undo
from gateplug.core.wrap import unwrap, wrap
from tests.modules import Net, UserModule
from tests.plugs import ToyPlug, UnitGate


def test_an_error_in_the_middle_undoes_what_was_done() -> None:
    net = Net()
    text, keys = repr(net), list(net.state_dict())
    net.blocks[1].fc2.add_module("gate", nn.Identity())
    taken = repr(net)
    with pytest.raises(gp.PlugError, match="named 'gate' already"):
        ToyPlug().attach(net)
    assert repr(net) == taken
    del net.blocks[1].fc2._modules["gate"]
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
    assert "_gateplug_records" not in net.__dict__


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    new = nn.Linear(4, 4)
    swap(net, shared, new)
    assert net["a"] is net["b"][0] is new


def test_a_gate_on_a_sequential_is_its_last_child_and_runs_once() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    x = torch.randn(3, 4)
    before = net(x)
    record = Record("Toy", "toy", {}, [AddGate("0", UnitGate(4, 0.0))])
    apply(net, record)
    share = torch.sigmoid(torch.tensor(1.0))
    assert torch.allclose(net(x), before * share, atol=1e-6)
    undo(net, record)
    assert torch.equal(net(x), before)


class Tuple(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), "rest"


class Text(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return "text"


def test_a_gate_takes_the_first_of_a_tuple_and_refuses_other_outputs() -> None:
    net = nn.ModuleDict({"t": Tuple(4, 4), "s": Text(4, 4)})
    apply(net, Record("Toy", "toy", {}, [AddGate("t", UnitGate(4, 0.0)), AddGate("s", UnitGate(4, 0.0))]))
    x = torch.randn(2, 4)
    first, rest = net["t"](x)
    assert rest == "rest"
    assert torch.allclose(first, nn.functional.linear(x, net["t"].weight, net["t"].bias) * torch.sigmoid(torch.tensor(1.0)))
    with pytest.raises(TypeError, match="tuple"):
        net["s"](x)


def test_layers_that_are_never_called_are_refused() -> None:
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(gp.PlugError, match="never called"):
        apply(attention, Record("Toy", "toy", {}, [AddGate("out_proj", UnitGate(4, 0.0))]))
    with pytest.raises(gp.PlugError, match="never called"):
        apply(Net(), Record("Toy", "toy", {}, [AddGate("blocks", UnitGate(4, 0.0))]))


def test_a_flag_goes_back_when_the_last_plug_that_needs_it_leaves() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    a = Record("A", "a", {}, [SetAttribute("", "activation_relu_or_gelu", 0, shared=True)])
    b = Record("B", "b", {}, [SetAttribute("", "activation_relu_or_gelu", 0, shared=True)])
    apply(layer, a)
    apply(layer, b)
    undo(layer, a)
    assert layer.activation_relu_or_gelu == 0
    undo(layer, b)
    assert layer.activation_relu_or_gelu == 1


def test_replacing_keeps_the_training_mode() -> None:
    net = Net().eval()
    apply(net, Record("R", "r", {}, [Replace("embed", nn.Linear(8, 16))]))
    assert not net.embed.training
    assert len(records(net)) == 1


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

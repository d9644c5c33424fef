"""What is obstructed does not move, whatever the optimizer makes of its gradient; what is free is not touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import gateplug as gp
from gateplug.continual.functional import blend_update
from gateplug.continual.layers import Availability
from tests.continual.gated import OPTIMIZERS, seeded
from tests.continual.test_gate_layers import mlp
from tests.continual.test_sites import TEXT, FunctionalMLP, SharedAct

EVERY = sorted(OPTIMIZERS)
DECAYING = sorted({*OPTIMIZERS} - {"sgd"})
"""Without weight decay, a unit whose gate is closed stands still by itself."""


class Loop:
    """A training loop of somebody's own around a network."""

    def __init__(self, net: nn.Module, optimizer: str, steps: int = 0, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.net, self.plug = net, gp.GateON(**arguments)
        self.plug.attach(net)
        self.optimizer = OPTIMIZERS[optimizer](net.parameters())
        self.plug.follow(net, self.optimizer)
        self.number = 0
        self.steps(steps)

    def steps(self, n: int) -> None:
        for _ in range(n):
            generator = torch.Generator().manual_seed(self.number)
            x, y = torch.randn(16, 8, generator=generator), torch.randint(3, (16,), generator=generator)
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()
            self.number += 1

    def hold(self, **values: Tensor | float) -> None:
        """Set availabilities by name (dots as underscores), as if a context had needed them, and go to the next one."""
        for name, a in self.plug.availabilities().items():
            value = values.get(name.replace(".", "_"), 1.0)
            a.draft.copy_(torch.as_tensor(value).expand_as(a.draft))
        self.plug.switch(self.net, self.plug.known)

    def copies(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.net.named_parameters()}


# ---------------------------------------------------------------------- update


@pytest.mark.parametrize("optimizer", DECAYING)
def test_what_is_used_up_does_not_move_by_one_bit(optimizer: str) -> None:
    """Momentum of five steps is there when the context changes; then fifty with weight decay."""
    loop = Loop(seeded(FunctionalMLP), optimizer, 5)
    loop.hold(a=torch.tensor([0.0, 1, 1, 0, 1, 0.5]), b=0.0)
    before = loop.copies()
    loop.steps(50)
    now = loop.copies()
    for name in ("a.weight", "a.bias"):
        still = [torch.equal(before[name][i], now[name][i]) for i in range(6)]
        assert still == [True, False, False, True, False, False]
    assert torch.equal(before["b.weight"], now["b.weight"])
    assert torch.equal(before["b.bias"], now["b.bias"])
    assert not torch.equal(before["head.weight"], now["head.weight"])


@pytest.mark.parametrize("optimizer", DECAYING)
def test_weights_are_held_one_by_one_by_their_own_relevance(optimizer: str) -> None:
    loop = Loop(seeded(FunctionalMLP), optimizer, 5, relevance="parameter")
    a = torch.ones(6, 8)
    a[2, 3] = a[0, 0] = 0.0
    loop.hold(a_weight=a, a_bias=torch.tensor([1.0, 0, 1, 1, 1, 1]))
    before = loop.copies()
    loop.steps(50)
    now = loop.copies()
    assert torch.equal(now["a.weight"] == before["a.weight"], a == 0)
    assert torch.equal(now["a.bias"] == before["a.bias"], torch.tensor([False, True, False, False, False, False]))


@pytest.mark.parametrize("optimizer", EVERY)
@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
def test_what_is_free_trains_as_without_obstruction(optimizer: str, relevance: Any) -> None:
    free = Loop(seeded(FunctionalMLP), optimizer, 5, relevance="none", obstruct="none")
    held = Loop(seeded(FunctionalMLP), optimizer, 5, relevance=relevance)
    free.plug.switch(free.net, 1)
    held.hold()  # availability 1 everywhere
    free.steps(10)
    held.steps(10)
    one, two = free.copies(), held.copies()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_part_of_the_update_is_let_through() -> None:
    free = Loop(seeded(FunctionalMLP), "adamw", 5)
    held = Loop(seeded(FunctionalMLP), "adamw", 5)
    free.hold()
    held.hold(a=0.25)
    before = held.copies()["a.weight"].double()
    free.steps(1)
    held.steps(1)
    expected = before + 0.25 * (free.copies()["a.weight"].double() - before)
    assert torch.allclose(held.copies()["a.weight"].double(), expected, rtol=0, atol=5e-8)


def test_a_context_is_not_slowed_by_its_own_relevance() -> None:
    free = Loop(seeded(FunctionalMLP), "adamw", 0, relevance="none", obstruct="none")
    held = Loop(seeded(FunctionalMLP), "adamw", 0, eta=0.3)
    free.steps(20)
    held.steps(20)
    assert any((a.draft < 0.05).any() for a in held.plug.availabilities().values())
    assert all(torch.equal(free.copies()[n], held.copies()[n]) for n in free.copies())


def test_availability_is_committed_at_a_switch_and_only_there() -> None:
    loop = Loop(seeded(FunctionalMLP), "adamw", 8)
    (a, *_) = loop.plug.availabilities().values()
    assert (a.draft < 1).any()
    assert (a.committed == 1).all()
    loop.plug.switch(loop.net, 0)  # no change of context
    loop.plug.show(loop.net, 0)
    assert (a.committed == 1).all()
    loop.plug.switch(loop.net, 1)
    assert torch.equal(a.committed, a.draft)
    then = a.committed.clone()
    loop.steps(4)
    assert torch.equal(a.committed, then)
    assert not torch.equal(a.draft, then)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=6), st.floats(1e-3, 0.5), st.floats(0, 2), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_availability_stays_between_0_and_1_and_falls_without_reactivation(
    relevance: list[float], eta: float, reactivation: float, steps: int
) -> None:
    a = Availability((len(relevance),))
    r = torch.tensor(relevance)
    for step in range(steps):
        before = a.draft.clone()
        a.step(r.roll(step), eta, reactivation)
        assert ((a.draft >= 0) & (a.draft <= 1)).all()
        if reactivation == 0:
            assert (a.draft <= before).all()
    a.commit()
    once = a.committed.clone()
    a.commit()
    assert torch.equal(a.committed, once)


def test_reactivation_lets_unused_units_recover() -> None:
    a = Availability((2,))
    a.draft.copy_(torch.tensor([0.5, 0.5]))
    for _ in range(200):
        a.step(torch.tensor([1.0, 0.0]), 0.05, 0.2)
    assert a.draft[0] < 0.01
    assert a.draft[1] == 1


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_update_is_blended_as_the_formula_says(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loop = Loop(seeded(FunctionalMLP), "sgd", 0)
    a = torch.rand(6, generator=generator).round(decimals=1)
    loop.hold(a=a)
    old = loop.copies()["a.weight"]
    guarded = next(p for p in loop.plug._obstruction.parts if p.parameter is loop.net.a.weight)
    new = old + torch.randn(old.shape, generator=generator)
    guarded.remember()
    with torch.no_grad():
        loop.net.a.weight.copy_(new)
        guarded.blend()
    assert torch.equal(loop.net.a.weight, blend_update(old, new, a))
    guarded.remember()
    with torch.no_grad():  # 0 · ∞ is no number
        loop.net.a.weight.fill_(float("inf"))
        guarded.blend()
    assert torch.equal(loop.net.a.weight[a == 0], blend_update(old, new, a)[a == 0])


# ---------------------------------------------------------------------- whose rows are whose


def small(kind: str) -> nn.Module:
    if kind == "llama":
        config = {k: v for k, v in TEXT.items() if "dropout" not in k}
        return LlamaForSequenceClassification(
            LlamaConfig(**config, num_key_value_heads=2, num_labels=3, pad_token_id=0, attention_bias=True)
        )
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4, n_positions=16, num_labels=3, pad_token_id=0)
    )


def moved(kind: str, heads: Tensor, units: float = 1.0) -> dict[str, Tensor]:
    """Which numbers of each parameter have moved after some steps, with availability of heads and hidden units given."""
    net = seeded(small, kind)
    plug = gp.GateON(others="free")
    plug.attach(net)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1)
    plug.follow(net, optimizer)
    for name, a in plug.availabilities().items():
        a.draft.copy_(heads if "attn" in name else torch.full_like(a.draft, units))
    plug.switch(net, 1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for step in range(3):
        ids = torch.randint(1, 40, (8, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(net(input_ids=ids).logits, ids[:, 0] % 3).backward()
        optimizer.step()
    return {n: p != before[n] for n, p in net.named_parameters()}


def test_rows_of_queries_keys_and_values_belong_to_their_heads() -> None:
    found = moved("llama", torch.tensor([0.0, 1.0, 1.0, 1.0]))
    attn = "model.layers.0.self_attn"
    by_head = found[f"{attn}.q_proj.weight"].reshape(4, -1)
    assert not by_head[0].any()
    assert by_head[1:].any(1).all()
    # two groups of two heads: the first is as used as its most used head
    for name in ("k_proj", "v_proj"):
        groups = found[f"{attn}.{name}.weight"].reshape(2, -1)
        assert not groups[0].any()
        assert groups[1].any()
    assert not found[f"{attn}.q_proj.bias"].reshape(4, 4)[0].any()
    assert found[f"{attn}.o_proj.weight"].any()


def test_both_branches_of_a_gated_feed_forward_belong_to_its_units() -> None:
    found = moved("llama", torch.ones(4), units=0.0)
    for name in ("gate_proj", "up_proj"):
        assert not found[f"model.layers.0.mlp.{name}.weight"].any()
    assert found["model.layers.0.mlp.down_proj.weight"].any()


def test_columns_of_transposed_layers_belong_to_units_and_heads() -> None:
    found = moved("gpt2", torch.tensor([0.0, 1.0, 0.0, 1.0]), units=0.0)
    packed = found["transformer.h.0.attn.c_attn.weight"]  # (in, 3 · heads · width)
    by_head = packed.reshape(16, 3, 4, 4).any(-1).any(0)
    assert torch.equal(by_head, torch.tensor([False, True, False, True]).expand(3, 4))
    assert not found["transformer.h.0.mlp.c_fc.weight"].any()
    assert not found["transformer.h.0.mlp.c_fc.bias"].any()
    assert found["transformer.h.0.mlp.c_proj.weight"].any()


def test_scale_and_shift_of_a_norm_belong_to_the_units_before_it() -> None:
    loop = Loop(mlp(), "adamw", 3, open_share=0.98)
    loop.hold(**{"0": torch.tensor([0.0, 1, 1, 1, 1, 1])})
    before = loop.copies()
    loop.steps(5)
    for name in ("1.weight", "1.bias"):
        assert torch.equal(before[name] == loop.copies()[name], torch.tensor([True, *[False] * 5]))


def test_what_belongs_to_no_unit_is_held_weight_by_weight() -> None:
    class Residual(FunctionalMLP):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.shift = nn.LayerNorm(8), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x)) + self.shift

    loop = Loop(seeded(Residual), "adamw", 5)
    found = loop.plug.availabilities()
    assert set(found) == {"a", "b", "norm.weight", "norm.bias", ".shift"}
    loop.hold(norm_weight=0.0, _shift=0.0)
    before = loop.copies()
    loop.steps(10)
    assert torch.equal(before["norm.weight"], loop.copies()["norm.weight"])
    assert torch.equal(before["shift"], loop.copies()["shift"])
    assert not torch.equal(before["norm.bias"], loop.copies()["norm.bias"])


@pytest.mark.parametrize("heads", ["free", "obstructed"])
def test_the_read_out_is_free_or_held_like_the_rest(heads: Any) -> None:
    loop = Loop(seeded(FunctionalMLP), "adamw", 5, heads=heads)
    assert ("head.weight" in loop.plug.availabilities()) == (heads == "obstructed")
    loop.hold(head_weight=0.0)
    before = loop.copies()
    loop.steps(5)
    assert torch.equal(before["head.weight"], loop.copies()["head.weight"]) == (heads == "obstructed")


def test_tied_weights_are_held_once() -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        net[2].weight = net[0].weight
        return net

    loop = Loop(seeded(make), "adamw", 3)
    assert sum(p.parameter is loop.net[0].weight for p in loop.plug._obstruction.parts) == 1
    loop.hold(**{"0": 0.0, "2": 0.0})
    before = loop.copies()
    loop.steps(5)
    assert torch.equal(before["0.weight"], loop.copies()["0.weight"])
    assert torch.equal(before["2.bias"], loop.copies()["2.bias"])


# ---------------------------------------------------------------------- grad


def test_grad_multiplies_the_gradient() -> None:
    free = Loop(seeded(FunctionalMLP), "sgd", 5)
    held = Loop(seeded(FunctionalMLP), "sgd", 5, obstruct="grad")
    a = torch.linspace(0, 1, 6)
    free.hold()
    held.hold(a=a)
    free.steps(1)
    held.steps(1)
    assert torch.allclose(held.net.a.weight.grad, free.net.a.weight.grad * a[:, None], rtol=1e-6, atol=0)
    assert torch.equal(held.net.head.weight.grad, free.net.head.weight.grad)
    # SGD: the update is the gradient, so both kinds agree
    update = Loop(seeded(FunctionalMLP), "sgd", 5)
    update.hold(a=a)
    update.steps(1)
    assert torch.allclose(update.net.a.weight, held.net.a.weight, rtol=0, atol=1e-7)


def test_grad_drops_the_state_of_what_is_obstructed_at_a_switch_and_no_other() -> None:
    loop = Loop(seeded(FunctionalMLP), "adamw", 5, obstruct="grad")
    state = loop.optimizer.state
    kept = {
        p: {k: v.clone() for k, v in state[p].items()}
        for p in (*loop.net.head.parameters(), *(g.rows[0] for g in loop.plug.gates(loop.net).values()))
    }
    loop.plug.switch(loop.net, 1)
    for p in (*loop.net.a.parameters(recurse=False), *loop.net.b.parameters(recurse=False)):
        assert p not in state
    for p, values in kept.items():
        assert all(torch.equal(v, state[p][k]) for k, v in values.items())


def test_update_keeps_the_state_of_the_optimizer() -> None:
    loop = Loop(seeded(FunctionalMLP), "adamw", 5)
    state = loop.optimizer.state
    kept = {p: {k: v.clone() for k, v in s.items()} for p, s in state.items()}
    loop.plug.switch(loop.net, 1)
    assert all(torch.equal(v, state[p][k]) for p, values in kept.items() for k, v in values.items())


def test_sparse_gradients_of_an_embedding() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 8, sparse=True)
            self.mlp = FunctionalMLP()

        def forward(self, ids: Tensor) -> Tensor:
            return self.mlp(self.words(ids).mean(1))

    for obstruct in ("update", "grad"):
        net = seeded(Words)
        plug = gp.GateON(obstruct=obstruct, open_share=0.9)  # type: ignore[arg-type]
        plug.attach(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        plug.follow(net, optimizer)

        def step(number: int, net: nn.Module = net, optimizer: Any = optimizer) -> None:
            ids = torch.randint(10, (8, 3), generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            F.cross_entropy(net(ids), ids[:, 0] % 3).backward()
            optimizer.step()

        step(0)
        a = plug.availabilities()["words.weight"]
        assert (a.draft < 1).any()
        a.draft[4:].zero_()
        plug.switch(net, 1)
        before = net.words.weight.detach().clone()
        step(1)
        assert torch.equal(before[4:], net.words.weight[4:])
        assert not torch.equal(before[:4], net.words.weight[:4])


# ---------------------------------------------------------------------- rows of other contexts


@pytest.mark.parametrize("optimizer", EVERY)
@pytest.mark.parametrize("to_none", [True, False])
def test_gates_of_other_contexts_do_not_move_by_one_bit(optimizer: str, to_none: bool) -> None:
    """Also where gradients are set to zero instead of none: a zero gradient has momentum and weight decay."""
    net = seeded(FunctionalMLP)
    plug = gp.GateON("none", obstruct="none", contexts=3)
    plug.attach(net)
    opt = OPTIMIZERS[optimizer](net.parameters())
    plug.follow(net, opt)

    def steps(n: int) -> None:
        for i in range(n):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(i))
            opt.zero_grad(set_to_none=to_none)
            F.cross_entropy(net(x), (x.argmax(1) % 3)).backward()
            opt.step()

    steps(5)
    plug.switch(net, 1)
    steps(5)
    rows = {n: p.detach().clone() for n, p in net.named_parameters() if ".rows." in n}
    plug.switch(net, 2)
    steps(20)
    for name, row in rows.items():
        assert torch.equal(net.get_parameter(name), row) == (not name.endswith(".2"))


# ---------------------------------------------------------------------- what cannot be followed


def test_lbfgs_is_refused() -> None:
    net = seeded(FunctionalMLP)
    plug = gp.GateON()
    plug.attach(net)
    with pytest.raises(gp.PlugError, match="LBFGS moves the parameters several times"):
        plug.follow(net, torch.optim.LBFGS(net.parameters()))


def test_an_optimizer_without_the_gates_is_refused() -> None:
    net = seeded(FunctionalMLP)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    plug = gp.GateON()
    plug.attach(net)
    with pytest.raises(gp.PlugError, match=r"in no optimizer.*a\.gate\.rows\.0"):
        plug.follow(net, optimizer)


def test_an_activation_that_another_plug_replaces_later_is_refused() -> None:
    net = seeded(SharedAct)
    plug = gp.GateON()
    plug.attach(net)
    gp.ReplaceActivation(nn.Tanh, gp.TemperedSigmoid()).attach(net)
    with pytest.raises(gp.PlugError, match="activations of .* from a Tanh that was replaced"):
        plug.follow(net, torch.optim.SGD(net.parameters(), 0.1))


def test_another_module_is_refused_while_one_is_followed() -> None:
    one, two = seeded(FunctionalMLP), seeded(FunctionalMLP)
    plug = gp.GateON()
    plug.attach(two)
    plug.attach(one)
    plug.follow(one, torch.optim.SGD(one.parameters(), 0.1))
    with pytest.raises(gp.PlugError, match="follows the training of another module"):
        plug.switch(two, 1)
    plug.unfollow()
    plug.switch(two, 1)
    assert plug.context == 1


def test_two_gateons_hold_back_nothing_twice() -> None:
    net = seeded(FunctionalMLP)
    first, second = gp.GateON(layers="a", others="free"), gp.GateON(layers="b", eta=0.02)
    first.attach(net)
    second.attach(net)
    assert set(first.availabilities()) == {"a"}
    assert set(second.availabilities()) == {"b"}
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    for plug in (first, second):
        plug.follow(net, optimizer)
    F.cross_entropy(net(torch.randn(8, 8)), torch.randint(3, (8,))).backward()
    optimizer.step()
    for plug in (first, second):
        plug.switch(net, 1)
    assert all((a.committed < 1).any() for plug in (first, second) for a in plug.availabilities().values())


def test_two_gateons_on_one_parameter_are_refused() -> None:
    net = seeded(FunctionalMLP)
    gp.GateON(layers="a").attach(net)  # holds back b as well, weight by weight
    with pytest.raises(gp.PlugError, match=r"another GateON holds b\.weight back already.*others='free'"):
        gp.GateON(layers="b").attach(net)

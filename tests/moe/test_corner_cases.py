"""What goes wrong in the corners: padding that is NaN, plugs used twice, gates that choose nothing, arguments of a wrong type."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import gateplug as gp
from gateplug.moe import functional as M
from tests.modules import UserModule, loader, trainer
from tests.moe.nets import MoENet

D = 8


def mlp(experts: int = 4) -> gp.ExpertMLP:
    return gp.ExpertMLP(experts, D, 16)


# ------------------------------------------------------------------ padding


@pytest.mark.parametrize("far", [5.0, 1e4])
@pytest.mark.parametrize("kind", ["noisy", "selectors", "tasks"])
def test_padding_has_no_part_in_any_term_nor_gradient(kind: str, far: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    noise = torch.randn(12, 4)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise[: len(like)])  # rows that count come first
    gate = {
        "noisy": lambda: gp.TopKGate(4, 2, D, noisy=True),
        "selectors": lambda: gp.DSelectK(3, 2, dim=D, entropy=1.0),
        "tasks": lambda: gp.DSelectK(3, 2, dim=D, entropy=1.0, tasks=2),
    }[kind]()
    factors = {"smooth_load": 1.0, "load_balance": 1.0, "importance": 1.0, "z_loss": 0.1} if kind == "noisy" else {"entropy": 0.5}
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    x = torch.randn(3, 4, D)

    def run(rows: Tensor, mask: Tensor | None) -> tuple[dict[str, float], dict[str, float], list[Tensor]]:
        net = nn.Sequential(copy.deepcopy(gate))
        plug = gp.RegulateRouters(**factors)
        plug.attach(net)
        plug._padding.read({"attention_mask": mask} if mask is not None else {})
        weights = net(rows)
        terms = {name: float(value) for name, value in plug._injection.values().items()}
        used = weights.reshape(rows.reshape(-1, D).shape[0], -1)
        loss = (used if mask is None else used[mask.flatten().bool()]).square().sum()
        plug.total_loss(net, loss).backward()
        return terms, plug.table(), [p.grad for p in net.parameters()]

    count = int(mask.sum())
    order = torch.argsort(mask.flatten(), descending=True, stable=True)
    rows = x.reshape(-1, D)[order]
    sorted_mask = torch.arange(12) < count
    padded = rows.clone()
    padded[count:] = far
    all_terms, all_table, all_grads = run(padded.view(3, 4, D), sorted_mask.view(3, 4))
    terms, table, grads = run(rows[:count].view(1, count, D), None)
    assert set(terms) == set(all_terms)
    assert terms
    assert all_terms == pytest.approx(terms, rel=1e-5)
    for name, row in table.items():
        assert all_table[name] == pytest.approx(row, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(all_grads, grads, strict=True))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_nan_in_masked_rows_reaches_neither_outputs_nor_gradients(several: bool, folded: bool) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(6, D), torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    bad = x.clone()
    bad[4:] = torch.nan
    for gate in (gp.DSelectK(4, 2), gp.TopKGate(4, 2, D)):
        net: nn.Module = nn.Sequential(gp.MultiGateMoE(mlp(), [gate, copy.deepcopy(gate)]) if several else gp.MoE(mlp(), gate))
        layer = (gp.fold(net) if folded else net)[0]
        y = layer(bad, mask=mask)
        assert torch.equal(y[4:], torch.zeros_like(y[4:]))
        assert torch.allclose(y[:4], layer(x)[:4], atol=1e-6)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_losses_of_masked_nan_are_those_of_the_rest() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    bad = logits.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    assigned = logits.topk(2).indices
    probs = bad.softmax(-1)
    for value, want in (
        (M.z_loss(bad, mask), M.z_loss(logits[mask])),
        (M.router_entropy(bad, mask), M.router_entropy(logits[mask])),
        (M.importance(bad.exp(), mask), M.importance(logits[mask].exp())),
        (M.load_balance(probs, assigned, mask), M.load_balance(logits[mask].softmax(-1), assigned[mask])),
    ):
        assert torch.allclose(value, want)
    (gradient,) = torch.autograd.grad(M.z_loss(bad, mask), bad)
    assert gradient.isfinite().all()


def test_nan_padding_in_a_model_of_others_leaves_the_terms_as_they_are() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(D, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.score(x)
            top = logits.softmax(-1).topk(2)
            return logits, top.values, top.indices

    x = torch.randn(4, D)
    tables = []
    for fill in (0.0, float("nan")):
        torch.manual_seed(0)
        net = nn.Sequential(Router())
        plug = gp.RegulateRouters(load_balance=1.0, z_loss=1.0, entropy=1.0, importance=1.0)
        plug.attach(net)
        plug._padding.read({"attention_mask": torch.tensor([[1, 1], [1, 0]])})
        rows = x.clone()
        rows[3] = fill
        _, weights, _ = net(rows)
        plug.total_loss(net, weights[:3].sum()).backward()
        tables.append(plug.table()["0"])
        assert net[0].score.weight.grad.isfinite().all() or fill != fill  # the model's own graph has NaN · 0 then
    assert tables[1] == pytest.approx(tables[0])


# ------------------------------------------------------------------ plugs used twice, or for a part


def test_only_the_chosen_selectors_are_regulated_and_each_plug_takes_off_its_own() -> None:
    net = nn.Sequential(*(gp.MoE(mlp(), gp.DSelectK(4, 2, dim=D, entropy=5.0)) for _ in range(2)))
    first, second = (gp.RegulateRouters(load_balance=0.1, routers=f"{i}.gate") for i in (0, 1))
    first.attach(net)
    assert set(first.parameters(net)) == {f"0.gate.{part}.{p}" for part in "zw" for p in ("weight", "bias")}
    with pytest.warns(UserWarning, match="enter no loss"):
        net(torch.randn(3, D))
    second.attach(net)
    second.detach(net)
    second.attach(net)
    first.detach(net)
    net(torch.randn(3, D))
    assert set(second._injection.values()) == {"moe/selectors", "moe/load_balance"}


def test_a_plug_on_a_second_model_starts_its_ramps_anew(tmp_path: Path) -> None:
    plug, seen = gp.RegulateRouters(), []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            gate = pl_module.net.layers[0].gate
            seen.append(float(gate.entropy.at(gate.steps)))

    for _ in range(2):
        module = UserModule(net=MoENet(gp.DSelectK(4, 2, entropy=gp.Ramp(0.0, 1.0, 8))))
        trainer(tmp_path, callbacks=[plug, Watch()], max_steps=4, max_epochs=1).fit(module, loader())
    assert seen == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8] * 2)


# ------------------------------------------------------------------ what has been decided


def test_a_hardened_gate_is_hardened_after_a_round_trip(tmp_path: Path) -> None:
    module = UserModule(net=MoENet(gp.DSelectK(4, 2, entropy=1.0)))
    gate = module.net.layers[0].gate
    gate.harden(force=True)
    assert not gate.has_terms
    again = UserModule(net=MoENet(gp.DSelectK(4, 2, entropy=1.0)))
    again.load_state_dict(module.state_dict())
    t = trainer(tmp_path, max_epochs=1)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "hard.ckpt")
    loaded = gp.load(tmp_path / "hard.ckpt", UserModule(net=MoENet(gp.DSelectK(4, 2, entropy=1.0))))
    for other in (again, loaded):
        theirs = other.net.layers[0].gate
        assert theirs.hardened
        assert not theirs.z.requires_grad
        optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=1.0)
        for _ in range(20):
            optimizer.zero_grad()
            other.net(torch.randn(4, 8, 8)).square().mean().backward()
            optimizer.step()
        assert torch.equal(theirs.z, gate.z)
    assert "hardened" not in gp.DSelectK(4, 2).state_dict()


@pytest.mark.parametrize("experts", [mlp, lambda n: [nn.Linear(D, D) for _ in range(n)]])
@pytest.mark.parametrize("renormalize", [False, True])
def test_selectors_that_stand_for_no_expert_are_said(experts: Callable[[int], Any], renormalize: bool) -> None:
    gate = gp.DSelectK(5, 1, renormalize=renormalize)
    gate.z.data.fill_(2.0)
    layer = gp.MoE(experts(5), gate)
    with pytest.raises(ValueError, match=r"DSelectK\(experts=5.*has chosen no expert: .* codes of 5 or more"):
        layer(torch.randn(3, D))
    with pytest.raises(ValueError, match="has chosen no expert"):
        gp.fold(nn.Sequential(layer))


def test_a_balancing_bias_in_half_precision_moves_as_one_in_float32() -> None:
    biases = {}
    for dtype in (torch.float32, torch.bfloat16):
        net = nn.Sequential(gp.SigmoidGate(4, 1, D)).to(dtype)
        plug = gp.RegulateRouters(bias_rate=1e-4)
        plug.attach(net)
        for step in range(3000):
            plug._biased[0].regulator.load = torch.tensor([9.0, 1.0, 1.0, 1.0])
            plug.step(net)
            if step == 1500 and dtype == torch.bfloat16:  # a resume
                state = plug.state_dict()
                plug = gp.RegulateRouters(bias_rate=1e-4)
                plug.attach(net)
                plug.load_state_dict(state)
                plug._settle(net)
        biases[dtype] = net[0].bias.float()
    assert torch.allclose(biases[torch.bfloat16], biases[torch.float32], rtol=4e-3)
    gate = gp.DSelectK(4, 2).bfloat16()
    gate.steps.fill_(513)
    assert int(gate.steps) == 513


# ------------------------------------------------------------------ routers of others


def mixtral(**kwargs: Any) -> nn.Module:
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_size": 16}
    shape |= {"intermediate_size": 32, "vocab_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**shape, **kwargs}))


def test_a_router_of_one_expert_is_left_out_and_named() -> None:
    net = mixtral(num_local_experts=1, num_experts_per_tok=1)
    for plug in (gp.RegulateRouters(z_loss=0.1), gp.ExpertMonitor()):
        with pytest.raises(gp.PlugError, match="one expert: there is nothing to choose"):
            plug.attach(net) if isinstance(plug, gp.RegulateRouters) else plug._chosen(net)
    assert float(M.load_statistics(torch.tensor([3.0]))["entropy"]) == 1.0


class MyRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x)


class Cosine(MyRouter):
    """Its first matrix is not the one of its input."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.mixing = nn.Parameter(torch.eye(4, 3))
        self.score = nn.Linear(D, 4)


class Two(MyRouter):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.score(x + y)


ADAPTERS = [
    ({"MyRuoter": lambda o: (o, o.topk(2).indices)}, r"names MyRuoter, and no module here is one. Did you mean 'MyRouter'"),
    ({MyRouter: lambda o: (o["logits"], o)}, r"0 \(MyRouter\) cannot be read with its adapter: the adapter raises"),
    ({MyRouter: lambda o: (o, o.topk(2).indices + 4)}, r"chosen experts outside of 0 … 3"),
    ({MyRouter: lambda o: (o, o.topk(2).indices, o.softmax(-1))}, r"gave weights \(6, 4\) for chosen experts \(6, 2\)"),
    ([lambda o: o], "must be a dict"),
]


@pytest.mark.parametrize(("adapters", "message"), ADAPTERS)
def test_an_adapter_with_a_fault_is_told(adapters: Any, message: str) -> None:
    with pytest.raises(gp.PlugError, match=message):
        gp.RegulateRouters(load_balance=0.1, adapters=adapters).attach(nn.Sequential(MyRouter(), gp.TopKGate(4, 2, D)))


def test_an_adapter_without_weights_has_no_importance() -> None:
    plug = gp.RegulateRouters(importance=0.1, adapters={MyRouter: lambda o: (o, o.topk(2).indices)})
    with pytest.raises(gp.PlugError, match="importance has no meaning .* third part"):
        plug.attach(nn.Sequential(MyRouter()))


def test_a_router_is_run_on_rows_of_the_width_of_any_of_its_matrices() -> None:
    net = nn.Sequential(Cosine())
    gp.RegulateRouters(load_balance=0.1, adapters={Cosine: lambda o: (o, o.topk(2).indices)}).attach(net)
    with pytest.raises(gp.PlugError, match=r"0 \(Two\) .* could not be run on rows alone: TypeError: .*missing 1 required"):
        gp.RegulateRouters(load_balance=0.1, adapters={Two: lambda o: (o, o.topk(2).indices)}).attach(nn.Sequential(Two()))


def test_the_auxiliary_loss_of_any_family_that_the_call_asks_for_is_said(tmp_path: Path) -> None:
    class Module(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            ids = torch.randint(1, 32, (2, 8))
            loss: Tensor = self.net(input_ids=ids, labels=ids, output_router_logits=True).loss
            return loss

    t = trainer(tmp_path, callbacks=[gp.RegulateRouters(load_balance=0.1)], max_steps=1, max_epochs=1)
    with pytest.warns(UserWarning, match="MixtralForCausalLM is called with output_router_logits=True"):
        t.fit(Module(net=mixtral()), loader())


# ------------------------------------------------------------------ what does not go together


def test_a_gate_may_look_at_rows_of_another_width() -> None:
    x, look = torch.randn(5, 16), torch.randn(5, D)
    for experts in (gp.ExpertMLP(4, 16, 32), [nn.Linear(16, 16) for _ in range(4)]):
        with pytest.raises(ValueError, match="width 8"):
            gp.MoE(experts, gp.TopKGate(4, 2, D))
        layer = gp.MoE(experts, gp.TopKGate(4, 2, D), dim=16)
        assert layer(x, route=look).shape == (5, 16)
        assert gp.MultiGateMoE(experts, gp.TopKGate(4, 2, D, tasks=3), dim=16)(x, route=look).shape == (5, 3, 16)


def test_several_tasks_row_by_row_take_rows() -> None:
    with pytest.raises(ValueError, match=r"look at \(rows, dim\), and got \(5, 3, 8\) for 5 rows: flatten"):
        gp.MultiGateMoE(mlp(), gp.TopKGate(4, 2, D, tasks=2))(torch.randn(5, 3, D))


def test_choices_that_look_into_the_future_are_said(tmp_path: Path) -> None:
    net = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.warns(UserWarning, match="later tokens can push out the choices of earlier ones: in LlamaForCausalLM"):
        gp.Upcycle(experts=4, capacity_factor=1.0).attach(net)
    net.model.layers[0].mlp = gp.MoE(gp.ExpertMLP(4, 16, 32), gp.ExpertChoiceGate(4, 16))

    class Module(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            ids = torch.randint(1, 32, (2, 8))
            loss: Tensor = self.net(input_ids=ids, labels=ids).loss
            return loss

    for plug in (gp.RegulateRouters(z_loss=0.1), gp.ExpertMonitor()):
        with pytest.warns(UserWarning, match="sees the whole batch: in LlamaForCausalLM that is a look into the future"):
            trainer(tmp_path, callbacks=[plug], max_steps=1, max_epochs=1).fit(Module(net=net), loader())


def test_rows_that_are_not_finite_name_the_layer() -> None:
    net = nn.Sequential(gp.MoE(mlp(), gp.TopKGate(4, 2, D)))
    gp.RegulateRouters(z_loss=0.1).attach(net)
    with pytest.raises(ValueError, match=r"0\.gate \(TopKGate.*not finite"):
        net(torch.full((2, D), torch.nan))


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: gp.TopKGate(4, 1.5, D), TypeError, "k=1.5 is a float, and must be a whole number"),
    (lambda: gp.TopKGate(4, True, D), TypeError, "k=True"),
    (lambda: gp.DSelectK(4.0, 2), TypeError, "experts=4.0"),
    (lambda: gp.DSelectK(4, 2, gamma="1"), TypeError, "gamma='1' is a str, and must be a number"),
    (lambda: gp.DSelectK(4, 2, entropy=None), TypeError, "entropy=None"),
    (lambda: gp.Ramp("0", 1, 3), TypeError, "start='0'"),
    (lambda: gp.Ramp(0, 1, 2.5), TypeError, "steps=2.5"),
    (lambda: gp.ExpertMLP(4, D, 16, dropout="a"), TypeError, "dropout='a'"),
    (lambda: gp.ExpertMLP(4, D, 16.0), TypeError, "hidden=16.0"),
    (lambda: gp.MoE(mlp(), gp.TopKGate(4, 2, D), capacity_factor="1"), TypeError, "capacity_factor='1'"),
    (lambda: gp.MoE(mlp(), gp.TopKGate(4, 2), capacity_factor=0.5), ValueError, "one choice for all rows: it takes no capacity"),
    (lambda: gp.MoE(mlp(), gp.TopKGate(4, 2, D), shared=3), TypeError, "shared must be a module or None"),
    (lambda: gp.MoE(mlp(), gp.TopKGate(4, 2, D), shared=nn.Linear(D, 1))(torch.randn(3, D)), ValueError, "must have one shape"),
    (lambda: gp.MoE(nn.Linear(D, D), gp.TopKGate(4, 2, D)), TypeError, "experts must be a list of modules .* are Linear"),
    (lambda: gp.MultiGateMoE(mlp(), 3), TypeError, "gates must be one of gateplug's gates, or a list"),
    (lambda: gp.TopKGate(4, 2, D)(torch.randn(3, D), mask=torch.tensor([0.0, 0.0, -torch.inf])), TypeError, "must be bool"),
    (lambda: gp.TopKGate(4, 2, D)(torch.randn(3, 5, D), mask=torch.ones(5, 3).bool()), ValueError, r"\(5, 3\) .* \(3, 5\)"),
    (lambda: gp.TopKGate(4, 2)(torch.randn(3, 5, D), mask=torch.ones(5, 3).bool()), ValueError, r"\(5, 3\) .* \(3, 5\)"),
    (lambda: gp.MoE(mlp(), gp.DSelectK(4, 2))(torch.randn(3, D), mask=torch.ones(4).bool()), ValueError, r"\(4,\) .* \(3,\)"),
    (lambda: gp.Upcycle(gate=lambda e, d: gp.TopKGate(e, 2, d), gate_args={"k": 1}), ValueError, "a function has its own"),
    (lambda: gp.TaskHead("regression", weight="1"), TypeError, "weight='1'"),
    (lambda: gp.TaskHead("regression", outputs=2.5), TypeError, "outputs=2.5"),
    (lambda: gp.TaskHead("regression", tower=3), TypeError, "tower=3"),
    (lambda: gp.TaskHead("regression", metrics=[3]), TypeError, "metrics="),
    (lambda: gp.TaskTowers(3, 8), TypeError, "widths=8"),
    (lambda: gp.TaskTowers(3, [8, 1.0]), TypeError, r"widths\[1\]=1.0"),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG)
def test_a_wrong_argument_is_said(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_upcycle_says_what_it_left(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.act = nn.Linear(8, 16), nn.Linear(16, 10), nn.ReLU()
            self.odd, self.even, self.between = nn.Linear(8, 16), nn.Linear(16, 8).half(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.act(self.first(x))).mean(1)

    t = trainer(tmp_path, callbacks=[gp.Upcycle(experts=4, layers="first")], max_epochs=1)
    t.fit(UserModule(net=Two()), loader())
    said = capsys.readouterr().out
    assert "Left as they are" in said
    assert "net.odd" in said.partition("Left as they are")[2]


def test_upcycle_takes_gates_by_keyword_where_it_can() -> None:
    class Mine(gp.TopKGate):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    for gate, k in ((functools.partial(gp.TopKGate, k=3), 3), (Mine, 2)):
        net = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, D))
        x = torch.randn(4, D)
        before = net(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gp.Upcycle(experts=8, gate=gate).attach(net)
        (mixture,) = (m for m in net.modules() if isinstance(m, gp.MoE))
        assert (mixture.gate.k, mixture.gate.dim) == (k, D)
        assert torch.allclose(net(x), before, atol=1e-6)

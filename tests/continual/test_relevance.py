"""Relevance against a literal transcription in float64, and that how a step is computed does not change it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import gateplug as gp
from gateplug.continual.layers import Availability
from tests.continual.gated import Learner, Spy, dense, seeded, stream, train
from tests.continual.test_sites import TEXT, FunctionalMLP, SharedAct, cnn
from tests.ddp import two_processes
from tests.modules import Net

CLOSE = {"rtol": 2e-4, "atol": 1e-6}
"""float32 against float64, squares of products of numbers with 7 digits."""


def one_step(
    net: nn.Module, batches: list[Any], relevance: str = "neuron", run: Callable[..., Tensor] | None = None, **arguments: Any
) -> tuple[gp.GateON, Spy, nn.Module]:
    """One optimizer step over some batches: the plug, what it saw, and the network as it was before."""
    torch.manual_seed(0)
    plug = gp.GateON(relevance, **arguments)  # type: ignore[arg-type]
    plug.attach(net)
    net.train()
    before = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    plug.follow(net, optimizer)
    with Spy() as spy:
        for x, y in batches:
            out = run(net, x) if run is not None else net(x)
            (F.cross_entropy(out, y) / len(batches)).backward()
        optimizer.step()
    plug.unfollow()
    return plug, spy, before.double()


def over_mean(r: Tensor) -> Tensor:
    return r / r.mean()


def literal(heard: Callable[[Any], tuple[Tensor, Tensor]], x: Any, y: Tensor) -> Tensor:
    """Mean over samples of (h · ∂ℓ/∂h)², one sample at a time: `heard` gives h (1, …, n) and logits (1, C) of one."""
    total, rows = torch.zeros(()), 0
    for i in range(len(y)):
        h, logits = heard({k: v[i : i + 1] for k, v in x.items()} if isinstance(x, dict) else x[i : i + 1].double())
        (g,) = torch.autograd.grad(F.cross_entropy(logits, y[i : i + 1]), h)
        squares = (h * g).square().detach().reshape(-1, h.shape[-1])
        total, rows = total + squares.sum(0), rows + len(squares)
    return over_mean(total / rows)


def through(net: nn.Module, layer: nn.Module, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a layer gives, or the first part of it, and the network's logits."""
    kept: list[Any] = []
    hook = layer.register_forward_hook(lambda m, a, out: kept.append(out))
    logits = net(**x).logits
    hook.remove()
    return kept[-1] if isinstance(kept[-1], Tensor) else kept[-1][0], logits


def data(n: int = 12, *shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *(shape or (8,)), generator=generator), torch.randint(classes, (n,), generator=generator)


# ---------------------------------------------------------------------- units


def test_units_of_a_dense_network_with_functional_relu() -> None:
    net, (x, y) = seeded(FunctionalMLP), data()
    plug, spy, ref = one_step(net, [(x, y)])
    found = plug.availabilities()

    def heard(unit: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def run(v: Tensor) -> tuple[Tensor, Tensor]:
            h1 = torch.relu(ref.a(v))  # the gate is in the layer: act(g ⊙ (W x + b))
            h2 = torch.relu(ref.b(h1))
            return {"a": h1, "b": h2}[unit], ref.head(h2)

        return run

    for unit in ("a", "b"):
        assert torch.allclose(spy.of(found[unit]).double(), literal(heard(unit), x, y), **CLOSE)


@pytest.mark.parametrize("act", [nn.Tanh(), nn.GELU(), nn.LeakyReLU(0.3), nn.ReLU(inplace=True), nn.ELU()])
def test_units_behind_one_activation_module_that_serves_two_layers(act: nn.Module) -> None:
    net, (x, y) = seeded(SharedAct, act), data()
    plug, spy, ref = one_step(net, [(x, y)])
    found = plug.availabilities()

    def heard(unit: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def run(v: Tensor) -> tuple[Tensor, Tensor]:
            # + 0: an activation in place must not change what is kept
            h1 = ref.act(ref.a(v) + 0)
            h2 = ref.act(ref.b(h1) + 0)
            return {"a": h1, "b": h2}[unit], ref.head(h2)

        return run

    for unit in ("a", "b"):
        assert torch.allclose(spy.of(found[unit]).double(), literal(heard(unit), x, y), **CLOSE)


@pytest.mark.parametrize("functional", [False, True])
def test_units_behind_a_batch_norm(functional: bool) -> None:
    class Normed(FunctionalMLP):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.act = nn.BatchNorm1d(6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            z = self.bn(self.a(x))
            return self.head(F.relu(self.b(torch.relu(z) if functional else self.act(z))))

    net, (x, y) = seeded(Normed), data()
    plug, spy, ref = one_step(net, [(x, y)])
    h = torch.relu(ref.bn(ref.a(x.double())))
    # samples meet in the norm: the gradient of the sum over all of them
    (g,) = torch.autograd.grad(F.cross_entropy(ref.head(F.relu(ref.b(h))), y, reduction="sum"), h)
    assert torch.allclose(spy.of(plug.availabilities()["a"]).double(), over_mean((h * g).square().mean(0).detach()), **CLOSE)


def test_channels_are_averaged_over_positions() -> None:
    x, y = data(6, 1, 8, 8, classes=10)
    # without its BatchNorm, which has a test above: here one sample at a time
    plug, spy, ref = one_step(seeded(lambda: nn.Sequential(*[m for m in cnn() if not isinstance(m, nn.BatchNorm2d)])), [(x, y)])
    found = plug.availabilities()
    for name, act in (("0", 1), ("3", 4), ("6", 7)):

        def heard(v: Tensor, act: int = act) -> tuple[Tensor, Tensor]:
            h = ref[: act + 1](v)
            last = h.movedim(1, -1) if h.dim() == 4 else h
            return last, ref[act + 1 :](last.movedim(-1, 1) if h.dim() == 4 else last)

        assert torch.allclose(spy.of(found[name]).double(), literal(heard, x, y), **CLOSE), name


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh()])
def test_an_activation_behind_a_flatten_still_is_of_the_channels(act: nn.Module) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), act, nn.Linear(3 * 36, 10))

    x, y = data(6, 1, 8, 8, classes=10)
    plug, spy, ref = one_step(seeded(make), [(x, y)])

    def heard(v: Tensor) -> tuple[Tensor, Tensor]:
        h = act(ref[0](v)).movedim(1, -1)
        return h, ref[3](h.movedim(-1, 1).flatten(1))

    assert torch.allclose(spy.of(plug.availabilities()["0"]).double(), literal(heard, x, y), **CLOSE)


def bert() -> BertForSequenceClassification:
    config = BertConfig(**{**TEXT, "num_hidden_layers": 2}, attn_implementation="eager", num_labels=3)
    return BertForSequenceClassification(config)


def tokens() -> tuple[dict[str, Tensor], Tensor]:
    ids, y = torch.randint(1, 40, (6, 7), generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2, 0, 1, 2])
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 7, 2, 6])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}, y


def test_padding_does_not_count_and_heads_are_sums_over_their_width() -> None:
    x, y = tokens()
    net = seeded(bert)

    class Text(Learner):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(**batch["x"], attention_mask=batch["attention_mask"]).logits, batch["labels"])

    batch = {"x": {"input_ids": x["input_ids"]}, "attention_mask": x["attention_mask"], "labels": y}
    plug = gp.GateON()
    plug.attach(module := Text(net, "sgd"))
    ref = copy.deepcopy(net).double()
    with Spy() as spy:
        train_on([batch], module, [plug])
    found = plug.availabilities()
    for number, layer in enumerate(ref.bert.encoder.layer):
        of_units, of_heads = [], []
        for i in range(len(y)):
            v, label = {k: t[i : i + 1] for k, t in x.items()}, y[i : i + 1]
            real = v["attention_mask"][0].bool()
            h, logits = through(ref, layer.intermediate, v)
            (g,) = torch.autograd.grad(F.cross_entropy(logits, label), h)
            of_units.append((h * g).detach().square()[0][real])
            o, logits = through(ref, layer.attention.self, v)
            (g,) = torch.autograd.grad(F.cross_entropy(logits, label), o)
            of_heads.append((o * g).detach().reshape(7, 4, 4).sum(-1).square()[real])  # (tokens, heads, width)
        name = f"net.bert.encoder.layer.{number}"
        expected = over_mean(torch.cat(of_units).mean(0))
        assert torch.allclose(spy.of(found[f"{name}.intermediate.dense"]).double(), expected, **CLOSE)
        expected = over_mean(torch.cat(of_heads).mean(0))
        assert torch.allclose(spy.of(found[f"{name}.attention.output.dense"]).double(), expected, **CLOSE)


def test_padding_does_not_count_where_it_has_a_gradient() -> None:
    """Without attention that leaves it out: a mean over all tokens."""

    class Bag(Learner):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch["x"]).mean(1), batch["labels"])

    net = seeded(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    plug = gp.GateON()
    plug.attach(module := Bag(net, "sgd"))
    ref = copy.deepcopy(net).double()
    x, y = data(6, 5, 8)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
    with Spy() as spy:
        train_on([{"x": x, "attention_mask": mask, "labels": y}], module, [plug])
    h = ref[1](ref[0](x.double()))
    (g,) = torch.autograd.grad(F.cross_entropy(ref[2](h).mean(1), y, reduction="sum"), h)
    expected = over_mean((h * g).detach().square()[mask].mean(0))
    assert torch.allclose(spy.of(plug.availabilities()["net.0"]).double(), expected, **CLOSE)


def train_on(batches: list[Any], module: Any, plugs: list[Any], **kwargs: Any) -> None:
    """Train on these very batches."""
    from tests.modules import trainer

    torch.manual_seed(0)  # gates are a function of it
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer("", callbacks=plugs, max_epochs=1, **kwargs).fit(module, loader)


def test_one_weight_in_two_layers_adds_up_to_one_availability() -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        net[2].weight = net[0].weight
        return net

    x, y = data()
    plug, spy, ref = one_step(seeded(make), [(x, y)])
    a, b = plug.availabilities().values()
    assert a is b
    total = torch.zeros(8, dtype=torch.float64)
    for act in (1, 3):

        def heard(v: Tensor, act: int = act) -> tuple[Tensor, Tensor]:
            h = ref[: act + 1](v)
            return h, ref[act + 1 :](h)

        # not over its own mean: a sum of two relevances
        h = ref[: act + 1](x.double())
        (g,) = torch.autograd.grad(F.cross_entropy(ref[act + 1 :](h), y, reduction="sum"), h)
        total += (h * g).square().mean(0).detach()
    assert len(spy.seen[id(a)]) == 1, "one step of availability for one step of the optimizer"
    assert torch.allclose(spy.of(a).double(), over_mean(total), **CLOSE)


def test_a_layer_used_twice_counts_both_uses() -> None:
    class Twice(FunctionalMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.b(torch.relu(self.a(x)) + torch.relu(self.a(2 * x)))))

    x, y = data()
    plug, spy, ref = one_step(seeded(Twice), [(x, y)])
    one, two = torch.relu(ref.a(x.double())), torch.relu(ref.a(2 * x.double()))
    g, k = torch.autograd.grad(F.cross_entropy(ref.head(torch.relu(ref.b(one + two))), y, reduction="sum"), (one, two))
    expected = over_mean(((one * g).square() + (two * k).square()).mean(0).detach())
    assert torch.allclose(spy.of(plug.availabilities()["a"]).double(), expected, **CLOSE)


def test_an_activation_that_is_changed_in_place_later_is_told() -> None:
    class InPlace(FunctionalMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.leaky_relu(self.b(torch.relu(self.a(x))), inplace=True))

    with pytest.warns(UserWarning, match="changed in place"):
        one_step(seeded(InPlace), [data()])


def test_nothing_is_read_in_evaluation() -> None:
    net = seeded(FunctionalMLP)
    plug = gp.GateON()
    plug.attach(net)
    plug.follow(net, torch.optim.SGD(net.parameters(), 0.1))
    net.eval()
    net(torch.randn(3, 8)).sum().backward()
    assert not plug._listener._sums


# ---------------------------------------------------------------------- parameters


def test_parameters_are_read_from_the_gradient_of_the_whole_step() -> None:
    net, (x, y) = seeded(FunctionalMLP), data()
    plug, spy, ref = one_step(net, [(x[:4], y[:4]), (x[4:], y[4:])], "parameter")
    loss = (F.cross_entropy(ref(x[:4].double()), y[:4]) + F.cross_entropy(ref(x[4:].double()), y[4:])) / 2
    named = {n: p for n, p in ref.named_parameters() if n.startswith(("a", "b")) and "gate" not in n and "guards" not in n}
    grads = torch.autograd.grad(loss, list(named.values()))
    found = plug.availabilities()
    assert set(found) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    for (name, w), g in zip(named.items(), grads, strict=True):
        assert torch.allclose(spy.of(found[name]).double(), over_mean((w * g).square().detach()), **CLOSE)


# ---------------------------------------------------------------------- how a step is computed


def test_uneven_micro_batches_count_by_their_samples() -> None:
    x, y = data(16)
    whole, spy, _ = one_step(seeded(FunctionalMLP), [(x, y)])
    parts, other, _ = one_step(seeded(FunctionalMLP), [(x[:10], y[:10]), (x[10:], y[10:])])
    for a, b in zip(whole.availabilities().values(), parts.availabilities().values(), strict=True):
        assert torch.allclose(spy.of(a), other.of(b), rtol=1e-4, atol=1e-6)


def drafts(module: nn.Module) -> dict[str, Tensor]:
    return {name: m.draft for name, m in module.named_modules() if isinstance(m, Availability)}


def alike(a: nn.Module, b: nn.Module, atol: float = 2e-5) -> None:
    x, y = drafts(a), drafts(b)
    assert list(x) == list(y)
    assert x
    assert any((v < 1).any() for v in x.values())
    for name in x:
        assert torch.allclose(x[name], y[name], rtol=0, atol=atol), name
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=atol), name


@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_one_large_batch(relevance: Any, parts: int, tmp_path: Path) -> None:
    def run(n: int) -> nn.Module:
        data = stream(2, 4 * n, 16 // n)
        return train([gp.GateON(relevance)], tmp_path, seeded(Learner, optimizer="sgd"), data, accumulate_grad_batches=n)

    alike(run(1), run(parts))


@pytest.mark.parametrize("kind", ["reentrant", "nonreentrant"])
@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
def test_activation_checkpointing_changes_nothing(kind: str, relevance: Any, tmp_path: Path) -> None:
    class Rows(Learner):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, 0])

    def run(checkpointing: str | None) -> nn.Module:
        module = seeded(lambda: Rows(Net(checkpointing=checkpointing), "sgd"))
        return train([gp.GateON(relevance)], tmp_path, module, stream(2, 4), accumulate_grad_batches=2)

    alike(run(None), run(kind))


def test_a_stopped_recomputation_leaves_nothing_waiting() -> None:
    """Checkpointing without re-entry stops when it has what backward needs: maybe between a gate and its activation."""

    class Stopped(SharedAct):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(lambda v: self.act(self.a(v)), x, use_reentrant=False)
            return self.head(self.act(self.b(h)))

    x, y = data()
    plug, spy, _ = one_step(seeded(SharedAct), [(x[:6], y[:6]), (x[6:], y[6:])])
    stopped, other, _ = one_step(seeded(Stopped), [(x[:6], y[:6]), (x[6:], y[6:])])
    for a, b in zip(plug.availabilities().values(), stopped.availabilities().values(), strict=True):
        assert torch.allclose(spy.of(a), other.of(b), rtol=1e-5, atol=1e-7)


class Spoilt(Learner):
    """Its loss is infinite in some steps."""

    def __init__(self, *args: Any, spoilt: tuple[int, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spoilt = spoilt

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx in self.spoilt:
            # of one layer alone: the relevance of all the others is finite
            loss = loss + self.net[1].bias.sum() * float("inf")
        return loss


@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_a_step_that_the_scaler_skips_changes_nothing(relevance: Any, optimizer: str, tmp_path: Path) -> None:
    kept: list[dict[str, Tensor]] = []

    class Watch(gp.ExactResume):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            kept.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    from tests.modules import trainer

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
    module = seeded(Spoilt, optimizer=optimizer, spoilt=(3, 10))
    t = trainer(
        tmp_path, callbacks=[gp.GateON(relevance), Watch(seed=0)], max_epochs=1, limit_val_batches=0,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )  # fmt: skip
    t.fit(module, datamodule=stream(2, 8))
    assert len(kept) == 16
    for i in range(1, 16):
        same = {k for k in kept[i - 1] if torch.equal(kept[i][k], kept[i - 1][k])}
        if i in (3, 10):
            assert same == set(kept[i])
        else:
            assert "net.1.weight" not in same


def test_what_a_skipped_step_has_read_does_not_count_in_the_next(tmp_path: Path) -> None:
    class Skips(Spoilt):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in self.spoilt else Learner.training_step(self, batch, batch_idx)

    runs = []
    for kind in (Spoilt, Skips):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6, backoff_factor=1.0 - 1e-9)
        module = seeded(lambda kind=kind: kind(spoilt=(3,)))
        train([gp.GateON()], tmp_path, module, stream(1, 6), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        runs.append(drafts(module))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
def test_a_scaler_does_not_change_relevance(relevance: Any) -> None:
    def run(scale: float) -> tuple[gp.GateON, Spy]:
        net, (x, y) = seeded(FunctionalMLP), data()
        plug = gp.GateON(relevance)
        plug.attach(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        plug.follow(net, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with Spy() as spy:
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            scaler.step(optimizer)
        return plug, spy

    (a, spy), (b, other) = run(1.0), run(2.0**16)
    for x, y in zip(a.availabilities().values(), b.availabilities().values(), strict=True):
        assert torch.equal(spy.of(x), other.of(y))


@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_does_not_change_relevance(relevance: Any, algorithm: str, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> dict[str, Tensor]:
        return drafts(train([gp.GateON(relevance)], tmp_path, seeded(Learner, optimizer="sgd"), stream(1, 1), **kwargs))

    free, clipped = run(), run(gradient_clip_val=0.001, gradient_clip_algorithm=algorithm)
    for name in free:
        assert torch.allclose(free[name], clipped[name], rtol=0, atol=1e-6), name


def test_a_loss_that_is_not_finite_is_left_out_counted_and_told(tmp_path: Path) -> None:
    class Infinite(Learner):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 1 else 1.0)

        def on_after_backward(self) -> None:
            for p in self.parameters():
                if p.grad is not None:
                    p.grad.nan_to_num_(0.0)

    plug = gp.GateON()
    with pytest.warns(UserWarning, match="relevance was not finite in 1 steps"):
        train([plug], tmp_path, seeded(Infinite), stream(2, 4))
    assert all(int(a.skipped) == 1 for a in plug.availabilities().values())
    assert all(a.draft.isfinite().all() for a in plug.availabilities().values())


def test_a_skipped_batch_is_no_step(tmp_path: Path) -> None:
    class Skips(Learner):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    module = seeded(Skips)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    train([gp.GateON()], tmp_path, module, stream(1, 3))
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
    assert all((d == 1).all() for d in drafts(module).values())


# ---------------------------------------------------------------------- processes


def ddp_run(folder: Path, devices: int) -> None:
    """n and p, with contexts that come while it runs, and a BatchNorm's place taken by nothing: its batches differ."""
    for relevance in ("neuron", "parameter"):
        settings: dict[str, Any] = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
        module = seeded(lambda: Learner(dense(), "momentum"))
        train([gp.GateON(relevance)], folder, module, stream(3, 4, 16 // devices), **settings)  # type: ignore[arg-type]
        if module.global_rank == 0:
            torch.save(module.state_dict(), folder / f"{relevance}-{devices}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    two_processes(ddp_run, tmp_path)
    ddp_run(tmp_path, 1)
    for relevance in ("neuron", "parameter"):
        one, two = (torch.load(tmp_path / f"{relevance}-{n}.pt", weights_only=True) for n in (1, 2))
        assert list(one) == list(two)
        assert sum(".rows." in k for k in one) == 6
        for key in one:
            assert torch.allclose(one[key], two[key], rtol=0, atol=1e-5), (relevance, key)


# ---------------------------------------------------------------------- how active a unit is


def test_activity_is_the_mean_of_what_a_unit_gives() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 4))
    plug = gp.GateON(relevance="activity")
    plug.attach(net)
    x, y = torch.randn(5, 1, 6, 6), torch.randint(0, 4, (5,))
    want = {"0": net[:2](x).mean((0, 2, 3)), "3": net[:5](x).mean(0)}
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    plug.follow(net, optimizer)
    with Spy() as spy:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    found = plug.availabilities()
    for name, mean in want.items():
        assert torch.allclose(spy.of(found[name]), over_mean(mean.detach()), rtol=1e-5)

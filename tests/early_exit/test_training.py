"""EarlyExit in a Trainer: phases, what rests, what is restored, and tests in which samples leave."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import gateplug as gp
from gateplug.early_exit import functional as E
from gateplug.early_exit.schedule import Schedule
from tests.early_exit.nets import NETS
from tests.modules import UserModule, digits, loader, trainer, vit


def exits(module: nn.Module) -> list[Any]:
    """The branches of a module, in order."""
    from gateplug.early_exit.branch import ExitBranch

    return [m for m in module.modules() if isinstance(m, ExitBranch)]


def early(**kwargs: Any) -> gp.EarlyExit:
    """The plug; most tests have no use for what exits take on this machine."""
    return gp.EarlyExit(**{"latency": (), **kwargs})


def fit(plug: gp.EarlyExit, tmp: Path, module: UserModule | None = None, *more: Any, **kwargs: Any) -> UserModule:
    module = UserModule(lr=0.05) if module is None else module
    settings = {"max_epochs": 2, **kwargs}
    trainer(tmp, callbacks=[plug, *more], **settings).fit(module, loader(8), loader(8, shuffle=False))
    return module


class Watch(L.Callback):
    """Gradients of heads and gates just before the optimizer, and weights after each batch."""

    def __init__(self) -> None:
        self.grads: list[tuple[bool, bool]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        heads = any(p.grad is not None for b in exits(pl_module) for p in b.head.parameters())
        gates = any(p.grad is not None for b in exits(pl_module) for p in b.gate.parameters())
        self.grads.append((heads, gates))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def test_heads_and_gates_take_turns_and_who_rests_does_not_move(tmp_path: Path) -> None:
    watch = Watch()
    fit(early(cost_weight=0.1, warmup_epochs=1, every=2), tmp_path, None, watch)
    warmup, turns = watch.grads[:8], watch.grads[8:]
    assert warmup == [(True, False)] * 8
    assert turns == [(False, True)] * 2 + [(True, False)] * 2 + [(False, True)] * 2 + [(True, False)] * 2
    for before, after, (heads, gates) in zip(watch.weights[7:], watch.weights[8:], turns, strict=False):
        moved = {k for k in after if not torch.equal(before[k], after[k])}
        assert any(".exit.head." in k for k in moved) == heads
        assert any(".exit.gate." in k for k in moved) == gates
        assert all(".exit." in k for k in moved), "the network is frozen"


@pytest.mark.parametrize("phase", ["warmup", "gate", "inference"])
def test_the_term_of_each_phase_is_the_formula(phase: str, tmp_path: Path) -> None:
    """Written out in float64 from the logits of the exits."""
    module, found = UserModule(lr=0.0), {}
    plug = early(cost_weight=0.4, warmup_epochs=1 if phase == "warmup" else 0, every=1)

    class Look(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
            if plug._phase == phase and not found:
                (branch,) = exits(pl_module)
                z, last = branch.logits.detach().double(), plug._logits.detach().double()
                a = branch.gate(branch.logits.detach()).detach().double()
                found.update(z=z, last=last, y=plug._labels, a=a, loss=loss.detach(), cost=plug.cost)

    fit(plug, tmp_path, module, Look(), max_epochs=1)
    ce = torch.stack([nn.functional.cross_entropy(found[k], found["y"], reduction="none") for k in ("z", "last")], 1)
    own = ce[:, 1].mean()
    if phase == "warmup":
        term = 2 * ce[:, 0].mean() + ce[:, 1].mean()  # K + 1 − l = 2 for the only head, 1 for the network
    elif phase == "gate":
        target = (ce[:, 0] + 0.4 * found["cost"][0] <= ce[:, 1] + 0.4).double()
        a = found["a"]
        term = (target * nn.functional.softplus(-a) + (1 - target) * nn.functional.softplus(a)).mean()
    else:
        g = found["a"].sigmoid()
        r = ce[:, 0] / (g * ce[:, 0])
        term = (g * r * ce[:, 0]).mean()
    assert float(found["loss"]) == pytest.approx(float(own + term), rel=1e-5)


def test_costs_are_counted_from_what_is_run(tmp_path: Path) -> None:
    plug = early(warmup_epochs=0)
    fit(plug, tmp_path, max_epochs=1)
    # 8 tokens: embedding 8·16, a block 2·16·32; the head on the mean 16·10, a gate 9·10 + 6; the network's head 16·10
    first = 8 * (8 * 16 + 2 * 16 * 32) + 16 * 10 + 96
    assert plug.cost.tolist() == pytest.approx([first / (first + 8 * 2 * 16 * 32 + 16 * 10), 1.0])


@pytest.mark.parametrize("freeze", [True, False])
def test_the_network_is_frozen_in_eval_mode_or_trained_and_given_back(freeze: bool, tmp_path: Path) -> None:
    module = UserModule(lr=0.05, dropout=0.5)
    start = {k: v.clone() for k, v in module.state_dict().items()}
    modes: list[bool] = []

    class Mode(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            modes.append(pl_module.net.blocks[0].drop.training)

    fit(early(freeze_backbone=freeze, warmup_epochs=0, every=1), tmp_path, module, Mode())
    assert set(modes) == {not freeze}
    assert all(p.requires_grad for p in module.parameters())
    assert module.net.blocks[0].drop.training
    same = all(torch.equal(module.state_dict()[k], v) for k, v in start.items())
    assert same == freeze


def test_an_exit_sends_its_gradient_into_a_network_that_is_not_frozen(tmp_path: Path) -> None:
    """Equal to adding the term to the loss by hand, with the exit written into the network."""
    torch.manual_seed(0)
    module = UserModule(lr=0.1)
    plug = early(warmup_epochs=1, freeze_backbone=False)
    plug.attach(module)
    (branch,) = exits(module)
    twin = UserModule(lr=0.1)
    twin.net.load_state_dict({k: v for k, v in module.net.state_dict().items() if ".exit." not in k})
    head = nn.Linear(16, 10)
    head.load_state_dict(branch.head.state_dict())
    x, y = next(iter(loader(8, shuffle=False)))
    h = twin.net.blocks[0](twin.net.embed(x))
    z0, z1 = head(h.mean(1)), twin.net.head(twin.net.blocks[1](h).mean(1))
    ce0, ce1 = (nn.functional.cross_entropy(z, y) for z in (z0, z1))
    (ce1 + 2 * ce0 + ce1).backward()
    trainer(tmp_path, callbacks=[plug], max_steps=1, max_epochs=1).fit(module, loader(8, shuffle=False))
    for name, p in twin.net.named_parameters():
        assert torch.allclose(module.net.state_dict()[name], p - 0.1 * p.grad, atol=1e-6), name
    assert torch.allclose(branch.head.weight, head.weight - 0.1 * head.weight.grad, atol=1e-6)


def test_a_head_that_no_longer_improves_rests_with_its_best_weights() -> None:
    heads = [nn.Linear(2, 2), nn.Linear(2, 2)]
    schedule = Schedule(2, warmup_epochs=6, every=1)
    best = {k: v.clone() for k, v in heads[0].state_dict().items()}
    for epoch, accuracies in enumerate([(0.5, 0.1), (0.4, 0.2), (0.5, 0.3)]):
        schedule.validated(accuracies, heads)
        assert not schedule.epoch_over(heads)
        assert schedule.resting == [epoch == 2, False]
        nn.init.constant_(heads[1].weight, float(epoch))
        if epoch < 2:
            nn.init.constant_(heads[0].weight, float(epoch))
    assert all(torch.equal(v, best[k]) for k, v in heads[0].state_dict().items())
    for _ in range(2):
        assert schedule.warm
        schedule.validated((0.9, 0.1), heads)
        over = schedule.epoch_over(heads)
    assert over, "all heads rest"
    assert not schedule.warm
    assert torch.equal(heads[1].weight, torch.full((2, 2), 1.0)), "the weights of the validation with .3"


@pytest.mark.parametrize(
    ("batches", "accumulate", "every", "length"), [(500, 1, 200, 200), (20, 1, 200, 10), (21, 2, 5, 6), (3, 2, 200, 2)]
)
def test_a_phase_is_whole_windows_and_not_more_than_half_of_the_epoch(
    batches: int, accumulate: int, every: int, length: int
) -> None:
    schedule = Schedule(1, 0, every)
    assert schedule.length(accumulate, batches) == length
    phases = [schedule.phase(i, 0, accumulate, batches) for i in range(batches)]
    assert set(phases) == {"gate", "inference"}
    for i in range(0, batches, accumulate):
        assert len(set(phases[i : i + accumulate])) == 1


def test_one_window_an_epoch_alternates_by_epoch() -> None:
    schedule = Schedule(1, 0, 200)
    assert [schedule.phase(0, epoch, 4, 3) for epoch in range(4)] == ["gate", "inference"] * 2


def test_in_a_test_samples_leave_and_the_modules_own_metric_is_of_what_the_exits_answer(tmp_path: Path) -> None:
    module = UserModule(vit(), lr=0.05)
    plug = early(gate="confidence", threshold=0.1, warmup_epochs=1)
    t = trainer(tmp_path, callbacks=[plug], max_epochs=1)
    t.fit(module, loader(8, image=True), loader(8, shuffle=False, image=True))
    calls: list[int] = []
    handle = module.net.vit.layers[1].register_forward_hook(lambda *_: calls.append(1))
    (result,) = t.test(module, loader(8, shuffle=False, image=True), verbose=False)
    handle.remove()
    assert len(calls) == 2, "all leave at the first exit; the first batch was run whole as well, to see how the network ends"
    assert result["early_exit/test/exit0/left"] == 1
    (branch,) = exits(module)
    module.eval()
    branch.listening = True
    x, y = digits(image=True)[:]
    with torch.no_grad():
        module.net(x)
        want = nn.functional.cross_entropy(branch.logits, y)
    branch.listening = False
    assert result["val_loss"] == pytest.approx(float(want), rel=1e-4)
    assert "forward" not in module.net.__dict__


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "resnet", "convolutions"])
def test_each_family_is_trained_and_then_tested_by_its_exits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, batch = NETS[name][0](), NETS[name][1](16)
    parts = batch if isinstance(batch, dict) else {"input": batch[0]}
    rows = [{**{k: v[i] for k, v in parts.items()}, "labels": torch.tensor(i % 4)} for i in range(16)]
    module = gp.Classifier(net, num_classes=4, optimizer=lambda p: torch.optim.AdamW(p, 1e-2))
    data = torch.utils.data.DataLoader(rows, batch_size=4)
    plug = early(warmup_epochs=1, every=1, freeze_backbone=False, gate="confidence", threshold=0.3)
    t = trainer(tmp_path, callbacks=[plug], max_epochs=3)
    t.fit(module, data, data)
    assert plug.cost is not None
    assert bool((plug.cost.diff() > 0).all())
    (result,) = t.test(module, data, verbose=False)
    assert plug.seen is not None
    assert result["test/accuracy"] == pytest.approx(plug.seen.answered)
    assert result["early_exit/test/cost"] == pytest.approx(plug.seen.cost, rel=1e-5)


def test_what_a_validation_says_is_of_all_its_samples(tmp_path: Path) -> None:
    plug = early(cost_weight=0.2, warmup_epochs=0, every=1, threshold=0.6)
    module = fit(plug, tmp_path, max_epochs=1)
    (branch,) = exits(module)
    module.eval()
    branch.listening = True
    x, y = digits()[:]
    with torch.no_grad():
        last = module(x)
        z = branch.logits
        g = branch.gate(z).sigmoid()[:, None]
    exit_ = E.first_exit(E.exit_scores(g), 0.6)
    answers = torch.where(exit_ == 0, z.argmax(-1), last.argmax(-1))
    assert plug.seen is not None
    assert plug.seen.answered == pytest.approx(float((answers == y).double().mean()))
    assert plug.seen.cost == pytest.approx(float(plug.cost[exit_].mean()))
    ce = torch.stack([nn.functional.cross_entropy(t, y, reduction="none") for t in (z, last)], 1)
    assert torch.allclose(plug.seen.pos_weight, E.gate_pos_weight(E.best_exit(ce, plug.cost.float(), 0.2), 1))


def test_what_would_not_be_as_meant_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a phase takes 4 of them and not 200"):
        fit(early(warmup_epochs=0), tmp_path)
    with pytest.warns(UserWarning, match="ended within the warm-up"):
        fit(early(warmup_epochs=5), tmp_path)
    with pytest.warns(UserWarning, match="cost_weight=0: running on costs nothing"):
        fit(early(cost_weight=0.0, warmup_epochs=0), tmp_path)
    with pytest.warns(UserWarning, match=r"cost_weight=2\.4 ≥ ln 10"):
        fit(early(cost_weight=2.4, warmup_epochs=0), tmp_path)
    with pytest.warns(UserWarning, match="without validation data: heads are not kept"):
        trainer(tmp_path, callbacks=[early(warmup_epochs=0)], max_epochs=1).fit(UserModule(), loader(8))
    with pytest.warns(UserWarning, match=r"100\.0% of the validation's samples leave at exit 0 of 1 .*threshold=0"):
        fit(early(threshold=0.0, warmup_epochs=0), tmp_path)
    module = UserModule()
    plug = early()
    plug.attach(module)
    with pytest.warns(UserWarning, match="the gates that decide who leaves are untrained"):
        trainer(tmp_path, callbacks=[plug]).test(module, loader(8, shuffle=False), verbose=False)


@pytest.mark.parametrize(("point", "gate"), [({"cost": 0.9}, "jei"), ({"accuracy": 0.12}, "jei"), ({"cost": 0.95}, "confidence")])
def test_the_threshold_is_fitted_to_an_operating_point_and_found_in_the_checkpoint(
    point: dict[str, float], gate: str, tmp_path: Path
) -> None:
    L.seed_everything(1, verbose=False)
    module, plug = UserModule(lr=0.1), early(gate=gate, warmup_epochs=1, every=1, operating_point=point)
    t = trainer(tmp_path, callbacks=[plug], max_epochs=4)
    t.fit(module, loader(8), loader(8, shuffle=False))
    assert plug.seen is not None
    (name, value), one = next(iter(point.items())), plug.seen.points[gate]
    assert plug.seen.threshold == plug.threshold_for(**{name: value})
    for threshold, cost, accuracy in zip(one.threshold.tolist(), one.cost.tolist(), one.accuracy.tolist(), strict=True):
        if name == "cost":
            assert cost > value or threshold <= plug.seen.threshold, "the dearest that is affordable"
        else:
            assert accuracy < value or threshold >= plug.seen.threshold, "the cheapest that is good enough"
    t.save_checkpoint(tmp_path / "exits.ckpt")
    loaded = gp.load(tmp_path / "exits.ckpt", UserModule(lr=0.1))
    runner = gp.ExitRunner(loaded)
    assert runner.threshold == pytest.approx(plug.seen.threshold)
    x, y = digits()[:]
    out = runner(x)
    assert float((out.logits.argmax(-1) == y).double().mean()) == pytest.approx(plug.seen.answered)
    assert float(out.cost.mean()) == pytest.approx(plug.seen.cost, rel=1e-5)


def test_an_operating_point_out_of_reach_says_what_can_be_reached(tmp_path: Path) -> None:
    with pytest.raises(gp.PlugError, match=r"cannot fit operating_point=\{'cost': 0\.01\}: .*0\."):
        fit(early(warmup_epochs=0, operating_point={"cost": 0.01}), tmp_path)
    plug = early(warmup_epochs=0)
    with pytest.raises(gp.PlugError, match="has seen no validation"):
        plug.threshold_for(cost=0.5)
    fit(plug, tmp_path)
    with pytest.raises(ValueError, match="no threshold costs at most 0.01: the least is 0"):
        plug.threshold_for(cost=0.01)
    with pytest.raises(ValueError, match="give one target"):
        plug.threshold_for()


def test_an_accuracy_that_is_not_reached_ends_no_training(tmp_path: Path) -> None:
    plug = early(warmup_epochs=1, every=1, operating_point={"accuracy": 1.0})
    with pytest.warns(UserWarning, match=r"operating_point=\{'accuracy': 1\.0\} was not reached .* the best accuracy there is"):
        fit(plug, tmp_path, max_epochs=2)
    assert plug.seen is not None
    one = plug.seen.points["jei"]
    best = float(one.accuracy.max())
    assert plug.seen.answered == pytest.approx(best)
    assert plug.seen.cost == pytest.approx(float(one.cost[one.accuracy == best].min()))


def test_a_cost_that_no_threshold_uses_up_is_said(tmp_path: Path) -> None:
    module = UserModule(lr=0.0)  # gates that stay open: all leave at the first exit, whatever the threshold up to 1
    plug = early(warmup_epochs=0, every=1, operating_point={"cost": 0.99})
    plug.attach(module)
    (branch,) = exits(module)
    nn.init.constant_(branch.gate.linear.bias, 50.0)
    with pytest.warns(UserWarning, match="is not used up: .* mode='hazard' reaches every cost"):
        fit(plug, tmp_path, module)


def test_operating_points_are_drawn_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plug = early(warmup_epochs=1, every=1)
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(plug, tmp_path, UserModule(lr=0.1), max_epochs=3, logger=logger)
    said = capsys.readouterr().out
    assert "Accuracy at equal cost" in said
    assert plug.seen is not None
    with (Path(logger.log_dir) / "early_exit_operating_points.csv").open() as file:
        rows = list(csv.DictReader(file))
    for rule, one in plug.seen.points.items():
        mine = [row for row in rows if row["rule"] == rule]
        assert [float(row["cost"]) for row in mine] == pytest.approx(one.cost.tolist(), rel=1e-6)
        assert [float(row["accuracy"]) for row in mine] == pytest.approx(one.accuracy.tolist(), rel=1e-6)
        # the ends: all at the first exit (patience never leaves there), and nobody
        assert float(mine[-1]["accuracy"]) == pytest.approx(float(plug.seen.accuracy[-1]))
    assert (Path(logger.log_dir) / "figures" / "early_exit_operating_points.png").stat().st_size > 5000
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert "early_exit/operating_points" in events.Tags()["images"]


def test_heads_and_network_of_different_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(8, 10\), and an exit \(8, 4\): give EarlyExit classes=10"):
        fit(early(classes=4), tmp_path)


def test_batches_without_classes_are_refused(tmp_path: Path) -> None:
    class Numbers(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    x, _ = digits(16)[:]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.randn(16)), batch_size=8)
    with pytest.raises(
        ValueError, match=r"the class of each sample is needed, and the batch's labels are of shape \(8,\) and torch.float32"
    ):
        trainer(tmp_path, callbacks=[early()], max_epochs=1).fit(Numbers(), data)


def test_a_run_stopped_in_the_warm_up_goes_on_as_one_that_was_not(tmp_path: Path) -> None:
    def run(folder: str, epochs: int, ckpt: str | None = None) -> tuple[UserModule, gp.EarlyExit]:
        L.seed_everything(3, verbose=False)
        module, plug = UserModule(lr=0.05), early(cost_weight=0.1, warmup_epochs=2, every=2)
        t = trainer(tmp_path / folder, callbacks=[plug, gp.ExactResume()], max_epochs=epochs)
        t.fit(module, loader(8), loader(8, shuffle=False), ckpt_path=ckpt)
        t.save_checkpoint(tmp_path / f"{folder}.ckpt")
        return module, plug

    whole, plug = run("whole", 4)
    run("half", 1)
    resumed, again = run("rest", 4, str(tmp_path / "half.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert torch.equal(plug.cost, again.cost)
    assert torch.equal(plug._pos_weight, again._pos_weight)


def test_exits_are_timed_drawn_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plug = early(warmup_epochs=1, every=1, latency=(1, 4))
    logger, module = TensorBoardLogger(tmp_path, name="run"), UserModule(lr=0.1)
    module.blocks_in_eval = module.net.blocks[0].eval()  # somebody's own choice
    modes: list[list[bool]] = []

    class Modes(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            modes.append([m.training for m in pl_module.modules()])

    trainer(tmp_path, callbacks=[Modes(), plug, Modes()], max_epochs=3, logger=logger).fit(
        module, loader(8), loader(8, shuffle=False)
    )
    said = capsys.readouterr().out
    assert "Time of a batch that leaves at each exit" in said
    assert "p95, batch 4 (ms)" in said
    assert modes[0] == modes[1], "timing leaves every module in the mode in which it was"
    folder = Path(logger.log_dir)
    with (folder / "early_exit_latency.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["batch"] for row in rows} == {"1", "4"}
    assert plug.seen is not None
    for row in rows:
        assert 0 < float(row["p50"]) <= float(row["p95"])
        assert row["rule"] == "jei"
    assert float(rows[0]["threshold"]) == pytest.approx(plug.seen.threshold)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    names = ("latency", "reliability", "over_training", "operating_points")
    assert {f"early_exit/{name}" for name in names} <= set(events.Tags()["images"])
    assert all((folder / "figures" / f"early_exit_{name}.png").stat().st_size > 4000 for name in names)


def test_calibration_and_conformal_sets_are_those_of_the_answers(tmp_path: Path) -> None:
    L.seed_everything(1, verbose=False)
    plug = early(warmup_epochs=1, every=1, freeze_backbone=False, alpha=0.2, threshold=0.55, latency=())
    module = UserModule(lr=0.1)
    t = trainer(tmp_path, callbacks=[plug], max_epochs=4)
    t.fit(module, loader(8), loader(8, shuffle=False))
    assert plug.seen is not None
    x, y = digits()[:]
    logits, _ = gp.ExitRunner(module).everything(x)
    confidence, guess = logits.softmax(-1).max(-1)
    for i in range(logits.shape[1]):
        want = E.calibration_error(confidence[:, i], guess[:, i] == y)
        assert float(plug.seen.calibration[i]) == pytest.approx(float(want), abs=1e-6)
    out = gp.ExitRunner(module)(x)
    p = out.logits.softmax(-1)
    own = E.calibration_error(p.max(-1).values, p.argmax(-1) == y)
    assert float(t.callback_metrics["early_exit/calibration_error"]) == pytest.approx(float(own), abs=1e-6)

    t.save_checkpoint(tmp_path / "exits.ckpt")
    again, fresh = early(**plug.arguments()), UserModule(lr=0.1)
    for plugs, model, path in (([plug], module, None), ([again], fresh, tmp_path / "exits.ckpt")):
        (result,) = trainer(tmp_path, callbacks=plugs).test(
            model, loader(7, shuffle=False), verbose=False, ckpt_path=path, weights_only=True
        )
        assert result["early_exit/test/calibration_error"] == pytest.approx(float(own), abs=1e-6)
        true = 1 - logits.softmax(-1).gather(2, y[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
        for variant in ("general", "all", "strict", "per_exit"):
            q = E.conformal_thresholds(true, out.exit, 0.2, variant)
            sets = E.conformal_sets(p, out.exit, q)
            covered = sets.gather(1, y[:, None])[:, 0]
            assert result[f"early_exit/test/conformal/{variant}/coverage"] == pytest.approx(float(covered.double().mean()))
            assert result[f"early_exit/test/conformal/{variant}/size"] == pytest.approx(float(sets.sum(1).double().mean()))
        for i in out.exit.unique().tolist():
            here = out.exit == i
            q = E.conformal_thresholds(true, out.exit, 0.2, "per_exit")
            covered = E.conformal_sets(p, out.exit, q).gather(1, y[:, None])[:, 0][here]
            assert result[f"early_exit/test/conformal/per_exit/exit{i}/coverage"] == pytest.approx(float(covered.double().mean()))


def test_a_threshold_is_fitted_to_a_measured_time(tmp_path: Path) -> None:
    plug = early(gate="confidence", warmup_epochs=1, operating_point={"latency": 10.0, "batch": 2}, latency=())
    fit(plug, tmp_path, max_epochs=3)
    assert plug.seen is not None
    assert plug.seen.threshold == float("inf"), "ten seconds are enough for everything"
    assert list(plug._times) == [2]
    with pytest.raises(gp.PlugError, match=r"cannot fit operating_point=\{'latency': 1e-09\}: to leave at the first exit takes"):
        fit(early(gate="confidence", warmup_epochs=1, operating_point={"latency": 1e-9}), tmp_path, max_epochs=3)


def test_samples_without_a_label_take_no_part(tmp_path: Path) -> None:
    x, y = digits()[:]
    hidden = torch.where(torch.arange(64) % 3 == 0, torch.full_like(y, -100), y)
    found = []
    for labels, rows in ((hidden, slice(None)), (y, hidden != -100)):
        torch.manual_seed(0)
        module = UserModule(lr=0.1)
        plug = early(warmup_epochs=0, every=1, latency=())
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[rows], labels[rows]), batch_size=64)
        trainer(tmp_path, callbacks=[plug], max_epochs=2).fit(module, data, data)
        assert plug.seen is not None
        found.append((plug.seen, exits(module)))
    (a, mine), (b, want) = found
    assert len(a.exit) == len(b.exit)
    assert torch.equal(a.accuracy, b.accuracy)
    for one, other in zip(mine, want, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-6)


def test_half_precision_rounds_neither_threshold_nor_cost() -> None:
    module = UserModule()
    early(threshold=0.123456).attach(module)
    (branch,) = exits(module)
    branch.cost.fill_(0.3333333)
    module.bfloat16()
    assert branch.head.weight.dtype == torch.bfloat16
    assert float(branch.threshold) == pytest.approx(0.123456, abs=1e-7)
    assert float(branch.cost) == pytest.approx(0.3333333, abs=1e-7)
    assert gp.ExitRunner(module).threshold == pytest.approx(0.123456, abs=1e-7)


class SlowHead(nn.Linear):
    """Dearer than what it saves."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            time.sleep(0.01)
        return super().forward(x)


def test_an_exit_that_costs_more_than_it_saves_is_said(tmp_path: Path) -> None:
    plug = gp.EarlyExit(gate="confidence", threshold=0.2, warmup_epochs=1, head=SlowHead, latency=(2,))
    with pytest.warns(
        UserWarning, match=r"exit 0 costs more than it saves on this machine, at batch 2: its head and gate take 1"
    ):
        trainer(tmp_path, callbacks=[plug], max_epochs=1, logger=TensorBoardLogger(tmp_path)).fit(
            UserModule(), loader(8), loader(8, shuffle=False)
        )


def test_a_network_that_cannot_be_run_by_blocks_is_trained_and_not_timed(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    with pytest.warns(UserWarning, match="exits are not timed: Around does something between"):
        trainer(tmp_path, callbacks=[gp.EarlyExit(warmup_epochs=1, latency=(1,))], max_epochs=2).fit(
            UserModule(Around()), loader(8), loader(8, shuffle=False)
        )

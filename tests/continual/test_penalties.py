"""EWC, SI and MAS: against formulas that are written out, in a Trainer, over several tasks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

import gateplug as gp
from gateplug.continual.ewc import EWC
from gateplug.continual.mas import MAS
from gateplug.continual.penalty import Penalty
from gateplug.continual.pulled import Pulled
from gateplug.continual.synaptic_intelligence import SynapticIntelligence
from tests.continual.literal import Written, train
from tests.continual.stream import SIZES, Digits, PermutedDigits, fit
from tests.ddp import two_processes
from tests.modules import UserModule, loader, trainer, vit

PLUGS: dict[str, Callable[[], Pulled]] = {
    "ewc": lambda: EWC(50.0, samples=20),
    "online": lambda: EWC(50.0, samples=20, online=True, decay=0.5),
    "sampled": lambda: EWC(50.0, samples=20, fisher="sampled"),
    "mas": lambda: MAS(2.0, samples=20),
    "si": lambda: SynapticIntelligence(1.0, xi=1e-2),
}
WRITTEN: dict[str, Callable[[], Written]] = {
    "ewc": lambda: Written("ewc", 50.0),
    "online": lambda: Written("online", 50.0, decay=0.5),
    "mas": lambda: Written("mas", 2.0),
    "si": lambda: Written("si", 1.0, xi=1e-2),
}


def start(optimizer: str = "sgd") -> Digits:
    torch.manual_seed(0)
    return Digits(16, optimizer, 0.1 if optimizer in ("sgd", "momentum") else 0.01)


def close(a: nn.Module, b: nn.Module, atol: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=0, atol=atol), name


# ---------------------------------------------------------------------- formulas


@given(st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([0.0, 1e3]), st.sampled_from([torch.float64, torch.float32]))
@settings(max_examples=60, deadline=None)
def test_one_parabola_is_the_sum_over_tasks(tasks: int, seed: int, far: float, dtype: torch.dtype) -> None:
    """Also far from the origin, where F θ² and its like would cancel; some parameters matter to no task."""
    g = torch.Generator().manual_seed(seed)
    thetas = [far + torch.randn(7, generator=g, dtype=dtype) for _ in range(tasks)]
    importances = [torch.rand(7, generator=g, dtype=dtype) * (torch.arange(7) != t) * (torch.arange(7) > 0) for t in range(tasks)]
    penalty, now = Penalty(), (far + torch.randn(7, generator=g, dtype=dtype)).requires_grad_()
    for theta, importance in zip(thetas, importances, strict=True):
        penalty.add({"p": importance}, {"p": theta})
    value = penalty.value({"p": now})
    (gradient,) = torch.autograd.grad(value, now)
    pairs = [(i.double(), now.detach().double() - t.double()) for i, t in zip(importances, thetas, strict=True)]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6 * (far + 1)
    assert float(value.detach()) == pytest.approx(
        float(sum(0.5 * (i * d**2).sum() for i, d in pairs)), abs=5 * tolerance * tasks, rel=1e-3 if far else 1e-5
    )
    assert torch.allclose(gradient.double(), sum(i * d for i, d in pairs), rtol=0, atol=tolerance * tasks)
    assert torch.equal(penalty.gradient("p", now), gradient)


@pytest.mark.parametrize(
    ("settings", "data"),
    [({}, {}), ({"accumulate_grad_batches": 4}, {"steps": 7}), ({"gradient_clip_val": 0.3}, {})],
    ids=["plain", "accumulated", "clipped"],
)
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_run_is_the_written_out_one(kind: str, settings: dict[str, Any], data: dict[str, Any], tmp_path: Path) -> None:
    """With seven batches a task and four an update, updates have batches of two tasks, and the last one is not complete."""
    stream = PermutedDigits(**{**SIZES, **data})
    written, plug, module = WRITTEN[kind](), PLUGS[kind](), start()
    expected = train(written, module, stream, settings.get("accumulate_grad_batches", 1), settings.get("gradient_clip_val"))
    fit([plug], tmp_path, stream, module, precision="64-true", **settings)
    close(module, expected, 1e-10)
    assert plug.penalty.tasks == 3
    if kind != "ewc":
        for name, importance in written.importances[-1].items():
            assert torch.allclose(plug.penalty.importance[name], importance, rtol=1e-8, atol=1e-12), name
    assert float(plug.terms(module)[plug.term].detach()) == pytest.approx(float(written.penalty(module).detach()), rel=1e-8)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_synaptic_intelligence_counts_what_the_optimizer_really_did(optimizer: str, tmp_path: Path) -> None:
    stream, module = PermutedDigits(**SIZES), start(optimizer)
    written, plug = WRITTEN["si"](), PLUGS["si"]()
    expected = train(written, module, stream)
    fit([plug], tmp_path, stream, module, precision="64-true")
    close(module, expected, 1e-10)
    assert all(torch.allclose(plug.penalty.importance[n], i, rtol=1e-7, atol=1e-12) for n, i in written.importances[-1].items())
    assert max(float(i.max()) for i in written.importances[-1].values()) > 0.01


def test_the_fisher_is_of_single_samples_and_not_of_a_batch(tmp_path: Path) -> None:
    """The squared gradient of the mean of a batch is about as many times too small as the batch is large."""
    module, plug = start(), EWC(samples=48)
    data = PermutedDigits(**SIZES)
    plug.consolidate(module, data.task_batches(0))
    x, y = data.pixels(0, torch.arange(48)), data.y[:48]
    right = Written("ewc", 1.0).measure(copy.deepcopy(module).double(), x.double(), y)
    F.cross_entropy(module(x), y).backward()
    for name, p in module.named_parameters():
        assert torch.allclose(plug.penalty.importance[name].double(), right[name], rtol=1e-4, atol=1e-9)
        assert float(right[name].sum()) > 5 * float(p.grad.square().sum())


@pytest.mark.parametrize("kind", ["ewc", "sampled", "mas"])
def test_importance_does_not_depend_on_how_samples_are_batched(kind: str) -> None:
    found = []
    for batch in (1, 8, 48):
        plug = PLUGS[kind]()
        plug.consolidate(start(), PermutedDigits(**{**SIZES, "batch_size": batch}).task_batches(0))
        found.append(plug.penalty.importance)
    for other in found[1:]:
        assert all(torch.allclose(i, other[n], rtol=1e-4, atol=1e-9) for n, i in found[0].items())


def test_importance_is_measured_in_eval_mode_and_the_modes_are_given_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 10))
    net(torch.rand(16, 64))
    twin, data, plug = copy.deepcopy(net).eval().double(), PermutedDigits(**SIZES), EWC(samples=20)
    plug.consolidate(net, data.task_batches(0))
    expected = Written("ewc", 1.0).measure(twin, data.pixels(0, torch.arange(20)).double(), data.y[:20])
    assert all(torch.allclose(i.double(), expected[n], rtol=1e-3, atol=1e-8) for n, i in plug.penalty.importance.items())
    assert all(m.training for m in net.modules())
    assert int(net[1].num_batches_tracked) == 1


def test_sampled_labels_are_drawn_from_the_answers_and_repeat_by_seed_and_task() -> None:
    plug = EWC(samples=20000, fisher="sampled")
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, 4)
    places = torch.arange(20000)
    y = plug.labels(logits, None, places, task=0)
    assert torch.allclose(y.bincount(minlength=4) / 20000, logits[0].softmax(0), atol=0.015)  # four standard deviations
    assert torch.equal(y[5:9], plug.labels(logits[:4], None, places[5:9], 0)), "a batch is drawn as it would be among others"
    assert not torch.equal(y, plug.labels(logits, None, places, 1))
    assert not torch.equal(y, EWC(samples=20000, fisher="sampled", seed=1).labels(logits, None, places, 0))
    assert torch.equal(plug.labels(torch.full((4, 3), -1e9), None, places[:4], 0) < 3, torch.ones(4, dtype=torch.bool))


def test_the_sampled_fisher_stays_where_the_training_set_is_fitted() -> None:
    """In expectation over y the Fisher of a softmax on a fixed feature is known: x² p (1 − p) for the class's weight."""
    net = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(net.weight)
    x, y = torch.full((4000, 1), 2.0), torch.zeros(4000, dtype=torch.int64)
    plugs = EWC(samples=4000, fisher="sampled"), EWC(samples=4000)
    for plug in plugs:
        plug.consolidate(net, [(x, y)])
        assert torch.allclose(plug.penalty.importance["weight"], torch.full((2, 1), 4 * 0.25), atol=1e-6)
    with torch.no_grad():
        net.weight[0] += 2.0
    p = torch.tensor([4.0, 0.0]).softmax(0)
    for plug, expected in zip(plugs, (4 * p[0] * p[1], 4 * p[1] ** 2), strict=True):
        plug = type(plug)(**plug.arguments())  # noqa: PLW2901
        plug.consolidate(net, [(x, y)])
        assert float(plug.penalty.importance["weight"][0]) == pytest.approx(float(expected), rel=0.3)


def test_samples_without_a_label_and_beyond_the_number_are_left_out() -> None:
    module, plug, other = start(), EWC(samples=3), EWC(samples=3)
    x, y = torch.rand(6, 64), torch.tensor([1, -100, 2, 3, 4, 5])
    plug.consolidate(module, [(x[:2], y[:2]), (x[2:], y[2:])])
    other.consolidate(module, [(x[[0, 2, 3]], y[[0, 2, 3]])])
    assert all(torch.allclose(i, other.penalty.importance[n], atol=1e-9) for n, i in plug.penalty.importance.items())
    with pytest.raises(gp.PlugError, match="no labelled sample"):
        plug.consolidate(module, [(x, torch.full((6,), -100))])


def test_mas_sums_or_averages(tmp_path: Path) -> None:
    mean, total = MAS(samples=20), MAS(samples=20, accumulate="sum")
    module, data = start(), PermutedDigits(**SIZES)
    for task in range(3):
        mean.consolidate(module, data.task_batches(task))
        total.consolidate(module, data.task_batches(task))
    assert all(torch.allclose(3 * i, total.penalty.importance[n], rtol=1e-5) for n, i in mean.penalty.importance.items())


def test_a_class_that_is_masked_counts_nothing_in_mas() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.tensor([False, False, True]), float("-inf"))

    net, plug = Masked(4, 3), MAS(samples=5)
    plug.consolidate(net, [(torch.rand(5, 4), torch.zeros(5, dtype=torch.int64))])
    assert plug.penalty.importance["weight"].isfinite().all()
    assert (plug.penalty.importance["weight"][2] == 0).all()


# ---------------------------------------------------------------------- by hand


@pytest.mark.parametrize("kind", PLUGS)
def test_by_hand_is_as_in_a_trainer(kind: str, tmp_path: Path) -> None:
    data, plug, byhand, module = PermutedDigits(**SIZES), PLUGS[kind](), PLUGS[kind](), start("adam")
    net = copy.deepcopy(module.net)
    fit([plug], tmp_path, data, module)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for i, (x, y) in enumerate(data.train_dataloader()):
        optimizer.zero_grad()
        byhand.total_loss(net, F.cross_entropy(net(x), y)).backward()
        if isinstance(byhand, SynapticIntelligence):
            byhand.before_step(net)
        optimizer.step()
        if isinstance(byhand, SynapticIntelligence):
            byhand.after_step(net)
        if (i + 1) % data.steps == 0:
            args = () if isinstance(byhand, SynapticIntelligence) else (data.task_batches(i // data.steps),)
            byhand.consolidate(net, *args)
    close(module.net, net, 1e-6)


# ---------------------------------------------------------------------- in a Trainer


@pytest.mark.parametrize("kind", PLUGS)
def test_the_first_task_is_trained_as_without_the_plug_and_the_second_is_not(kind: str, tmp_path: Path) -> None:
    for tasks, same in ((1, True), (2, False)):
        data = PermutedDigits(**{**SIZES, "tasks": tasks})
        with_plug, without = start(), start()
        fit([PLUGS[kind]()], tmp_path, data, with_plug)
        fit([], tmp_path, data, without)
        assert all(torch.equal(a, b) for a, b in zip(with_plug.parameters(), without.parameters(), strict=True)) == same


@pytest.mark.parametrize("kind", PLUGS)
def test_killed_at_any_step_and_resumed_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    def run(*more: Any, **kwargs: Any) -> tuple[Any, Pulled]:
        L.seed_everything(1, verbose=False)
        module, plug = start("adam"), PLUGS[kind]()
        t = trainer(tmp_path, callbacks=[plug, gp.ExactResume(), *more], max_epochs=1, enable_checkpointing=bool(more))
        t.fit(module, datamodule=PermutedDigits(**SIZES), **kwargs)
        return module, plug

    whole, kept = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    for step in sorted({5, 6, 7, 17, *random.Random(kind).sample(range(1, 18), 6)}):
        resumed, plug = run(ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)), step
        for what, tensors in kept.kept().items():
            assert all(torch.equal(t, plug.kept()[what][n]) for n, t in tensors.items()), (step, what)


@pytest.mark.parametrize("kind", PLUGS)
def test_accumulation_equals_one_large_batch(kind: str, tmp_path: Path) -> None:
    whole, parts = start(), start()
    fit([PLUGS[kind]()], tmp_path, PermutedDigits(**{**SIZES, "batch_size": 16}), whole)
    fit([PLUGS[kind]()], tmp_path, PermutedDigits(**{**SIZES, "steps": 12}), parts, accumulate_grad_batches=2)
    close(whole, parts, 5e-6)  # sums of float32 in another order


def scaled(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))


@pytest.mark.parametrize("kind", PLUGS)
def test_a_grad_scaler_changes_nothing(kind: str, tmp_path: Path) -> None:
    found = []
    for scale in (2.0**10, 1.0):
        plug, module = PLUGS[kind](), start()
        fit([plug], tmp_path, None, module, plugins=[scaled(scale)])
        found.append((module, plug))
    close(found[0][0], found[1][0], 2e-3)  # gradients in float16
    means = [float(plug.penalty.mean_importance()) for _, plug in found]
    assert means[0] == pytest.approx(means[1], rel=0.02)


def test_a_fused_optimizer_that_takes_the_scale_off_by_itself_is_counted_right(tmp_path: Path) -> None:
    class Fused(Digits):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, fused=True)

    found = []
    for kind, plugins in ((Digits, []), (Fused, [scaled(2.0**10)])):
        torch.manual_seed(0)
        module, plug = kind(16, "sgd", 0.1), PLUGS["si"]()
        fit([plug], tmp_path, None, module, plugins=plugins)
        found.append(float(plug.penalty.mean_importance()))
    assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_the_scaler_skips_counts_nothing(fused: bool, tmp_path: Path) -> None:
    class Made(Digits):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, fused=fused)

    module, plug = Made(16), SynapticIntelligence(20.0)
    before = copy.deepcopy(module)
    fit([plug], tmp_path, None, module, plugins=[scaled(2.0**60)], max_steps=3)
    close(before, module, 0.0)
    assert all((omega == 0).all() for omega in plug.omega.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", PLUGS)
def test_importance_is_kept_in_float32_in_lower_precision(kind: str, precision: str, tmp_path: Path) -> None:
    plug = PLUGS[kind]()
    fit([plug], tmp_path, None, start(), precision=precision)
    for tensors in plug.kept().values():
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
    assert float(plug.penalty.mean_importance()) > 0


def run_ddp(folder: Path, devices: int) -> None:
    """Each method through a stream, with a global batch of 16."""
    for kind, make in PLUGS.items():
        plug, module = make(), start()
        settings = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
        fit([plug], folder, PermutedDigits(**{**SIZES, "batch_size": 16 // devices}), module, **settings)
        rank = torch.distributed.get_rank() if devices == 2 else 0
        torch.save({"weights": module.state_dict(), **plug.kept()}, folder / f"{kind}_{devices}_{rank}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    two_processes(run_ddp, tmp_path)
    run_ddp(tmp_path, 1)
    for kind in PLUGS:
        one, first, second = (torch.load(tmp_path / f"{kind}_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
        for what, tensors in one.items():
            for name, t in tensors.items():
                assert torch.equal(first[what][name], second[what][name]), f"{kind}: processes differ in {what} of {name}"
                assert torch.allclose(t, first[what][name], rtol=1e-3, atol=2e-6), (kind, what, name)


def test_frozen_parameters_have_no_importance(tmp_path: Path) -> None:
    module, plug = start(), EWC(samples=20)
    module.net[0].requires_grad_(False)
    fit([plug], tmp_path, None, module)
    assert set(plug.penalty.importance) == {n for n, p in module.named_parameters() if p.requires_grad}


def test_a_hugging_face_model_keeps_what_it_learned(tmp_path: Path) -> None:
    class Images(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return super().training_step((x.view(-1, 1, 8, 8), y), batch_idx)

    for make in PLUGS.values():
        plug = make()
        fit([plug], tmp_path, PermutedDigits(**{**SIZES, "steps": 2}), Images(vit(), lr=0.05))
        assert float(plug.penalty.mean_importance()) > 0


class Failure(Exception):
    """Whatever goes wrong."""


class Fail(L.Callback):
    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 8:
            raise Failure


def test_after_an_exception_nothing_stands_around_the_optimizer_or_the_module(tmp_path: Path) -> None:
    module, plug = start(), SynapticIntelligence(20.0)
    t = trainer(tmp_path, callbacks=[plug, Fail()], max_epochs=1)
    with pytest.raises(Failure):
        t.fit(module, datamodule=PermutedDigits(**SIZES))
    (optimizer,) = t.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert "training_step" not in module.__dict__
    fit([plug], tmp_path, None, module)
    assert plug.penalty.tasks == 1 + 1 + 3, "the task that was left is held as it was, then three more"


def test_what_was_learned_stays_for_the_next_fit_and_not_for_another_network(tmp_path: Path) -> None:
    module, plug = start(), EWC(samples=20)
    fit([plug], tmp_path, None, module)
    fit([plug], tmp_path, None, module)
    assert plug.penalty.tasks == 6
    with pytest.raises(gp.PlugError, match="Make a new EWC for another network"):
        fit([plug], tmp_path, None, Digits(20))


def test_without_a_stream_nothing_happens_and_it_is_said(tmp_path: Path) -> None:
    for kind, make in PLUGS.items():
        plug, module, other = make(), UserModule(), UserModule()
        other.load_state_dict(module.state_dict())
        with pytest.warns(UserWarning, match=f"{type(plug).__name__}: the data are no stream"):
            trainer(tmp_path, callbacks=[plug]).fit(module, loader())
        trainer(tmp_path).fit(other, loader())
        close(module, other, 0.0)
        assert not plug.penalty.tasks, kind


def test_a_network_that_is_not_called_as_a_whole_is_refused(tmp_path: Path) -> None:
    class Layers(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            for layer in self.net:
                x = layer(x)
            return F.cross_entropy(x, y)

    with pytest.raises(gp.PlugError, match=r"call self\(batch\) or self.net\(batch\)"):
        fit([EWC()], tmp_path, None, Layers(16))
    fit([SynapticIntelligence()], tmp_path, None, Layers(16))


def test_penalty_and_importance_are_logged_and_memory_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    module = start()
    fit(
        [EWC(50.0, samples=20), MAS(samples=20), SynapticIntelligence()],
        tmp_path,
        None,
        module,
        logger=logger,
        log_every_n_steps=1,
    )
    found = EventAccumulator(logger.log_dir).Reload()
    numbers = sum(p.numel() for p in module.parameters())
    text = capsys.readouterr().out
    for term, title, kept in (("ewc", "EWC", 2), ("mas", "MAS", 2), ("si", "SynapticIntelligence", 3)):
        assert len(found.Scalars(f"continual/{term}")) == 12, "from the second task on"
        assert [e.step for e in found.Scalars(f"continual/{term}/importance")] == [6, 12, 18]
        table = text.split(f"{title} after 3 tasks")[1].split("after 3 tasks")[0]
        assert table.count(f"{numbers:,}") == kept
        assert table.count(f"{4 * numbers:,}") == kept


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: EWC(-1.0), ValueError, "weight=-1.0 must be a finite number ≥ 0"),
        (lambda: EWC(float("nan")), ValueError, "weight=nan"),
        (lambda: EWC("much"), TypeError, "must be a number"),  # type: ignore[arg-type]
        (lambda: EWC(samples=0), ValueError, "samples=0 must be ≥ 1"),
        (lambda: EWC(samples=1.5), TypeError, "whole number"),  # type: ignore[arg-type]
        (lambda: EWC(online=1), TypeError, "online=1 must be True or False"),  # type: ignore[arg-type]
        (lambda: EWC(online=True, decay=1.5), ValueError, "decay=1.5 must lie in"),
        (lambda: EWC(decay=0.5), ValueError, "give online=True as well"),
        (lambda: EWC(fisher="sample"), ValueError, "Did you mean 'sampled'"),
        (lambda: EWC(seed=0.5), TypeError, "whole number"),  # type: ignore[arg-type]
        (lambda: MAS(-1.0), ValueError, "weight=-1.0"),
        (lambda: MAS(samples=0), ValueError, "samples=0"),
        (lambda: MAS(accumulate="means"), ValueError, "Did you mean 'mean'"),
        (lambda: SynapticIntelligence(-1.0), ValueError, "weight=-1.0"),
        (lambda: SynapticIntelligence(xi=0.0), ValueError, "xi=0.0 must be a finite number > 0"),
        (lambda: SynapticIntelligence(xi="small"), TypeError, "must be a number"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_say_what_is_allowed(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)

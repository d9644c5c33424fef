"""GateON on a stream of tasks: contexts that come, runs that are killed, evaluation in between, and that it works."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import gateplug as gp
from gateplug.continual.layers import ContextGate
from gateplug.continual.norms import ContextStatistics
from tests.continual.gated import OPTIMIZERS, Learner, dense, seeded, stream, train
from tests.ddp import two_processes
from tests.modules import trainer


def bits(a: nn.Module, b: nn.Module) -> None:
    """The same names, and the same bits."""
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y)
    different = [k for k in x if not torch.equal(x[k], y[k])]
    assert not different


def same_optimizer(a: Any, b: Any) -> None:
    """The same state for the same parameters, in the same groups."""
    x, y = a.state_dict(), b.state_dict()
    assert x["param_groups"] == y["param_groups"]
    assert x["state"].keys() == y["state"].keys()
    for number, values in x["state"].items():
        for name, value in values.items():
            other = y["state"][number][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


class Optimizer(L.Callback):
    """Keeps hold of the optimizer."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (self.optimizer,) = trainer.optimizers


# ---------------------------------------------------------------------- contexts that come


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "amsgrad", "fused"])
@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
def test_contexts_that_come_equal_contexts_that_were_there(relevance: Any, optimizer: str, named: bool, tmp_path: Path) -> None:
    kept = []
    for contexts in (None, 3):
        watch = Optimizer()
        module = seeded(lambda: Learner(dense(bn=True), optimizer, named))
        train([gp.GateON(relevance, contexts=contexts), watch], tmp_path, module)
        kept.append((module, watch.optimizer))
    (a, x), (b, y) = kept
    bits(a, b)
    same_optimizer(x, y)
    if named:
        names = {id(p): n for n, p in a.named_parameters()}
        for group in x.param_groups:
            assert group["param_names"] == [names[id(p)] for p in group["params"]]
            assert any(".rows.2" in n for n in group["param_names"]) == ("gateplug" in group)


def test_a_group_of_parameters_per_layer(tmp_path: Path) -> None:
    class Groups(Learner):
        def configure_optimizers(self) -> Any:
            layers = [m for m in self.net if list(m.parameters())]
            return torch.optim.AdamW([{"params": list(m.parameters()), "lr": 0.01 / (i + 1)} for i, m in enumerate(layers)])

    modules = [seeded(lambda: Groups(dense())) for _ in range(2)]
    for module, contexts in zip(modules, (None, 3), strict=True):
        train([gp.GateON(contexts=contexts)], tmp_path, module)
    bits(*modules)


def test_a_task_that_comes_again_finds_its_context(tmp_path: Path) -> None:
    plug = gp.GateON()
    seen: list[int] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            seen.append(plug.context)

    module = train([plug, Watch()], tmp_path, seeded(Learner), stream(3, 2, order=[2, 0, 2, 1]))
    assert [c for c, _ in itertools.groupby(seen)] == [0, 1, 0, 2]
    assert {len(g.rows) for g in plug.gates(module).values()} == {3}


def test_more_contexts_than_there_may_be_are_refused(tmp_path: Path) -> None:
    plug, module = gp.GateON(contexts=2), seeded(Learner)
    train([plug], tmp_path, module, stream(2, 2))
    with pytest.raises(gp.PlugError, match=r"contexts=2\): context 2 would be one too many"):
        plug.switch(module, 2)


def test_batches_may_name_their_task(tmp_path: Path) -> None:
    def batches(order: list[int]) -> Any:
        x = torch.rand(len(order), 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        items = [{"pixel_values": x[i], "labels": torch.arange(8), "task": torch.full((8,), t)} for i, t in enumerate(order)]
        return torch.utils.data.DataLoader(items, batch_size=None)

    plug = gp.GateON()
    module = seeded(Learner)
    trainer(tmp_path, callbacks=[plug], max_epochs=1).fit(module, batches([5, 5, 9, 9, 5]))
    assert (plug.context, plug.known) == (0, 2)
    with pytest.raises(gp.PlugError, match="task 9 begins at batch 1, in the middle of accumulate_grad_batches=2"):
        trainer(tmp_path, callbacks=[gp.GateON()], max_epochs=1, accumulate_grad_batches=2).fit(seeded(Learner), batches([5, 9]))


@pytest.mark.parametrize("contexts", [None, 3])
def test_a_trainer_for_each_task(contexts: int | None, tmp_path: Path) -> None:
    """Somebody's loop over tasks, who says the context between two fits."""
    module, plug = seeded(lambda: Learner(dense(bn=True))), gp.GateON(contexts=contexts)
    rows: dict[int, Tensor] = {}
    for task in range(3):
        if task:
            plug.switch(module, task)
        base = gp.Digits(batch_size=16, seed=task)
        trainer(tmp_path, callbacks=[plug], max_epochs=1, limit_train_batches=4, limit_val_batches=0).fit(module, base)
        gate = plug.gates(module)["net.1.gate"]
        for context, row in rows.items():
            assert torch.equal(gate.rows[context], row)
        rows[task] = gate.rows[task].detach().clone()
        assert (plug.context, plug.known) == (task, task + 1)
    (a, *_) = plug.availabilities().values()
    assert (a.committed < 1).any()


# ---------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize(
    ("relevance", "optimizer", "arguments"),
    [
        ("neuron", "adamw", {}),
        ("parameter", "amsgrad", {"heads": "obstructed"}),
        ("neuron", "momentum", {"obstruct": "grad", "contexts": 4}),
    ],
)
def test_killed_anywhere_and_resumed_gives_the_same_bits(
    relevance: Any, optimizer: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Four tasks of four steps: before, at and after a context comes; on a network with BatchNorm."""
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def run(extra: list[Any], **kwargs: Any) -> tuple[nn.Module, Any]:
        watch = Optimizer()
        module = seeded(lambda: Learner(dense(bn=True), optimizer))
        plugs = [gp.GateON(relevance, **arguments), watch, *extra]
        train(plugs, tmp_path, module, stream(4, 4), limit_val_batches=1, val_check_interval=2, **kwargs)
        return module, watch.optimizer

    whole, state = run([steps], enable_checkpointing=True)
    places = [*random.Random(relevance).sample(range(1, 16), 7), 4, 8, 12]
    for step in places:
        resumed, again = run([], ckpt_path=tmp_path / f"step={step}.ckpt")
        bits(whole, resumed)
        same_optimizer(state, again)


@pytest.mark.parametrize("trained", [1, 3])
def test_a_checkpoint_with_fewer_or_more_contexts_than_the_model(trained: int, tmp_path: Path) -> None:
    """The model has been through another number of tasks when the checkpoint of two is loaded."""
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = seeded(lambda: Learner(dense(bn=True)))
    train([gp.GateON(), steps], tmp_path, whole, stream(3, 4), enable_checkpointing=True)
    other = seeded(lambda: Learner(dense(bn=True)), seed=5)
    train([gp.GateON()], tmp_path, other, stream(trained, 3))
    assert {len(m.rows) for m in other.modules() if isinstance(m, ContextGate)} == {trained}
    train([gp.GateON()], tmp_path, other, stream(3, 4), ckpt_path=tmp_path / "step=6.ckpt")
    bits(whole, other)


def resumed_on_two(folder: Path, devices: int) -> None:
    """Contexts that a checkpoint brings are unknown to the module when DDP is told what to leave alone."""
    settings: dict[str, Any] = {"strategy": "ddp", "devices": devices}
    steps = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)

    def run(**kwargs: Any) -> nn.Module:
        extra = kwargs.pop("extra", [])
        module = seeded(lambda: Learner(dense(bn=True)))
        train([gp.GateON(others="frozen"), *extra], folder, module, stream(3, 3, 8), **settings, **kwargs)
        return module

    whole = run(extra=[steps], enable_checkpointing=True)
    for step in (3, 5, 8):
        again = run(ckpt_path=folder / f"step={step}.ckpt")
        bits(whole, again)
        assert "_ddp_params_and_buffers_to_ignore" not in again.__dict__
    items = [{"pixel_values": torch.rand(4, 1, 8, 8), "labels": torch.arange(4), "task": torch.full((4,), t)} for t in (0, 1)]
    loader = torch.utils.data.DataLoader(items, batch_size=None)
    t = trainer(folder, callbacks=[gp.GateON()], max_epochs=1, **settings)
    with pytest.raises(gp.PlugError, match="one batch is of tasks 0 and 1 on different processes"):
        t.fit(seeded(Learner), loader)
    (folder / f"done-{whole.global_rank}").touch()


def test_two_processes_resume_after_contexts_have_come(tmp_path: Path) -> None:
    two_processes(resumed_on_two, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("done-*")) == ["done-0", "done-1"]


# ---------------------------------------------------------------------- evaluation


def test_evaluation_in_between_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for settings in ({}, {"limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 2}):
        module = seeded(lambda: Learner(dense(bn=True)))
        runs.append(train([gp.GateON()], tmp_path, module, stream(3, 4, forward=bool(settings)), **settings))
    bits(*runs)


def test_what_somebody_shows_between_batches_does_not_matter(tmp_path: Path) -> None:
    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            plug.show(pl_module, 0)

    runs = []
    for callbacks in ([], [Look()]):
        plug = gp.GateON()
        runs.append(train([plug, *callbacks], tmp_path, seeded(lambda: Learner(dense(bn=True)))))
        plug.show(runs[-1], 2)
    bits(*runs)


def test_each_task_is_evaluated_in_its_context(tmp_path: Path) -> None:
    plug, data = gp.GateON(), stream(3, 3)
    seen: dict[str, list[int]] = {"val": [], "test": []}

    class Watch(L.Callback):
        def on_validation_batch_end(self, *rest: Any) -> None:
            seen["val"].append(plug._gates[0].active)

        def on_test_batch_end(self, *rest: Any) -> None:
            seen["test"].append(plug._gates[0].active)

    module = seeded(Learner)
    L.seed_everything(1, verbose=False)
    t = trainer(tmp_path, callbacks=[plug, Watch()], max_epochs=1, num_sanity_val_steps=0)
    t.fit(module, datamodule=data)
    t.test(module, datamodule=data)
    assert seen["val"] == [c for c, n in data.eval_lengths("val") for _ in range(n)]
    assert seen["test"] == [c for c, n in data.eval_lengths("test") for _ in range(n)]
    assert plug._gates[0].active == plug.context == 2


def test_a_task_without_a_context_is_refused_at_test(tmp_path: Path) -> None:
    module, plug = seeded(Learner), gp.GateON()
    train([plug], tmp_path, module, stream(2, 2))
    with pytest.raises(gp.PlugError, match=r"task 2 is unknown at test.*\[0, 1\]"):
        trainer(tmp_path, callbacks=[plug]).test(module, datamodule=stream(3, 2))


def test_statistics_of_the_first_task_are_the_same_bits_after_the_second(tmp_path: Path) -> None:
    kept: list[Tensor] = []
    plug = gp.GateON()

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                kept.append(pl_module.net[2].running_var.clone())

    module = train([plug, Watch()], tmp_path, seeded(lambda: Learner(dense(bn=True))), stream(2, 4))
    assert isinstance(module.net[2].contexts, ContextStatistics)
    assert not torch.equal(module.net[2].running_var, kept[0])
    plug.show(module, 0)
    assert torch.equal(module.net[2].running_var, kept[0])


# ---------------------------------------------------------------------- by hand


@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
def test_a_loop_of_ones_own_gives_the_same_bits(relevance: Any, tmp_path: Path) -> None:
    batches: list[Any] = []

    class Keep(Learner):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batches.append(batch)
            return super().training_step(batch, batch_idx)

    def make(cls: type[Learner]) -> Learner:
        return seeded(lambda: cls(dense(bn=True), "momentum"))

    L.seed_everything(1, verbose=False)
    module = train([gp.GateON(relevance)], tmp_path, make(Keep), stream(3, 4))

    L.seed_everything(1, verbose=False)  # gates are a function of torch's seed
    mine, plug = make(Learner), gp.GateON(relevance)
    plug.attach(mine)
    gates = list(plug.parameters(mine).values())
    rest = [p for p in mine.parameters() if all(p is not g for g in gates)]
    optimizer = OPTIMIZERS["momentum"](rest)
    optimizer.add_param_group({"params": gates, "weight_decay": 0.0})
    plug.follow(mine, optimizer)
    mine.train()
    for number, batch in enumerate(batches):
        plug.switch(mine, number // 4)
        optimizer.zero_grad()
        mine.training_step(batch, number).backward()
        optimizer.step()
    plug.unfollow()
    bits(module, mine)
    text = repr(dense(bn=True))
    plug.detach(mine)
    assert repr(mine.net) == text
    assert not any(m._forward_hooks for m in mine.modules())


# ---------------------------------------------------------------------- it works


def accuracies(module: nn.Module, data: gp.TaskStream, plug: gp.GateON | None) -> list[float]:
    module.eval()
    right: dict[int, list[Tensor]] = {}
    lengths = [t for t, n in data.eval_lengths("test") for _ in range(n)]
    with torch.no_grad():
        for task, batch in zip(lengths, data.test_dataloader(), strict=True):
            if plug is not None:
                plug.show(module, task)
            right.setdefault(task, []).append(module(batch["pixel_values"]).argmax(-1) == batch["labels"])
    return [float(torch.cat(r).float().mean()) for _, r in sorted(right.items())]


@pytest.mark.parametrize("relevance", ["neuron", "parameter"])
def test_it_forgets_less(relevance: Any, tmp_path: Path) -> None:
    """Measured: without .21, .40, .93 on the three tasks; n-GateON .73, .83, .91; p-GateON .83, .88, .93."""

    def run(plug: gp.GateON | None) -> list[float]:
        data = gp.TaskStream(base=gp.Digits(batch_size=32, val_fraction=0.01), kind="permuted", num_tasks=3, steps_per_task=100)
        module = seeded(lambda: Learner(dense(hidden=96, second=96)))
        train([] if plug is None else [plug], tmp_path, module, data)
        data.setup("test")
        return accuracies(module, data, plug)

    with_it, without = run(gp.GateON(relevance)), run(None)
    mean = [sum(a) / 3 for a in (with_it, without)]
    assert mean[0] > mean[1] + 0.25, (with_it, without)
    assert with_it[0] > without[0] + 0.4, (with_it, without)


def test_a_stream_of_more_tasks_than_contexts_is_refused_before_it_begins(tmp_path: Path) -> None:
    module = seeded(Learner)
    names = list(module.state_dict())
    with pytest.raises(gp.PlugError, match="the stream has 3 tasks, each of which needs a context"):
        train([gp.GateON(contexts=2)], tmp_path, module, stream(3, 2))
    assert list(module.state_dict()) == names
    train([gp.GateON(contexts=2)], tmp_path, module, stream(3, 2, order=[0, 1, 0]))

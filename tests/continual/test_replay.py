"""Replay: what is kept, what is drawn, and the loss of it, against a loop that is written out."""

from __future__ import annotations

import copy
import random
from collections import Counter, namedtuple
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
from torchmetrics import MeanMetric

import gateplug as gp
from gateplug.continual import functional as C
from gateplug.continual.entries import Column, filled, leaves, outline
from gateplug.continual.replay import Replay, apart
from gateplug.continual.reservoir import Reservoir
from tests.continual.stream import SIZES, Digits, PermutedDigits, fit
from tests.ddp import two_processes
from tests.modules import UserModule, loader, trainer

KINDS = ("er", "der++")


def start(optimizer: str = "sgd", **kwargs: Any) -> Digits:
    torch.manual_seed(0)
    return Digits(16, optimizer, 0.1 if optimizer == "sgd" else 0.01, **kwargs)


def equal(a: nn.Module, b: nn.Module, atol: float = 0.0) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=0, atol=atol), name


def buffer(plug: Replay) -> dict[str, Tensor]:
    held = plug.memory.buffer
    return {name: column.values[: held.held] for name, column in held.columns.items()}


# ---------------------------------------------------------------------- the reservoir


@given(st.integers(1, 9), st.lists(st.integers(1, 7), max_size=8), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_slots_are_those_of_algorithm_r_however_samples_are_batched(capacity: int, batches: list[int], seed: int) -> None:
    whole, parts = Reservoir(capacity, seed), Reservoir(capacity, seed)
    items = torch.arange(sum(batches))
    if len(items):
        slots = whole.slots(len(items))
        whole.put(list(slots), {"x": items[list(slots.values())]})
        whole.seen = len(items)
    for batch in items.split(batches):
        slots = parts.slots(len(batch))
        parts.put(list(slots), {"x": batch[list(slots.values())]})
        parts.seen += len(batch)
    held = parts.held
    assert held == min(capacity, len(items))
    if held:
        assert torch.equal(whole.columns["x"].values, parts.columns["x"].values)
        kept = parts.columns["x"].values[:held].tolist()
        assert len(set(kept)) == held, "no sample is there twice"
        if len(items) <= capacity:
            assert kept == items.tolist(), "while there is room all stay, in order"


def test_each_sample_stays_with_the_same_probability() -> None:
    counts: Counter[int] = Counter()
    for seed in range(400):
        reservoir = Reservoir(5, seed)
        slots = reservoir.slots(20)
        reservoir.put(list(slots), {"x": torch.tensor(list(slots.values()))})
        counts.update(reservoir.columns["x"].values.tolist())
    # 400 seeds × 5 / 20 = 100 each, standard deviation 8.7
    assert all(60 < counts[i] < 140 for i in range(20)), counts


def test_draws_are_without_repetition_and_functions_of_seed_moment_and_number() -> None:
    def drawn(seed: int = 0, seen: int = 40, number: int = 0) -> list[int]:
        reservoir = Reservoir(30, seed)
        reservoir.seen = seen
        return reservoir.draw(8, number).tolist()

    assert len(set(drawn())) == 8
    assert drawn() == drawn()
    assert len({tuple(drawn()), tuple(drawn(1)), tuple(drawn(seen=41)), tuple(drawn(number=1))}) == 4
    assert sorted(drawn(seen=3)) == [0, 1, 2]


def test_longer_samples_widen_a_column_and_a_draw_is_as_wide_as_it_needs_to_be() -> None:
    column = Column(4, torch.zeros(0, 3, dtype=torch.int32))
    column.put([0, 1], torch.ones(2, 3, dtype=torch.int64))
    column.put([3], torch.full((1, 5), 2))
    column.put([2], torch.full((1, 1), 3))
    assert column.values.dtype == torch.int32
    assert column.values.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [3, 0, 0, 0, 0], [2] * 5]
    assert column.take(torch.tensor([0, 2])).tolist() == [[1, 1, 1], [3, 0, 0]]
    assert column.take(torch.tensor([2])).tolist() == [[3]]
    tokens = Column(2, torch.zeros(0, 2, dtype=torch.int64), labels=True)
    tokens.put([0], torch.tensor([[7, 8]]))
    tokens.put([1], torch.tensor([[9, 9, 9]]))
    assert tokens.take(torch.tensor([0, 1])).tolist() == [[7, 8, -100], [9, 9, 9]]
    with pytest.raises(gp.PlugError, match="number of axes"):
        column.put([0], torch.ones(1))


def test_a_batch_of_any_form_is_taken_apart_and_put_together() -> None:
    Pair = namedtuple("Pair", "x y")
    x, y = torch.rand(2, 3), torch.tensor([0, 1])
    for batch in (x, (x, y), [x, y], {"a": x, "labels": {"left": y, "right": y}}, Pair(x, y), {"a": x, "b": None}):
        parts = leaves(batch)
        assert all(len(t) == 2 for t in parts.values())
        again = filled(outline(batch), parts)
        assert type(again) is type(batch)
        assert str(again) == str(batch)
    for odd in ({"x": x, "task": 3}, (x, ["a", "b"]), {"x": x, "loss": torch.tensor(1.0)}):
        with pytest.raises(gp.PlugError, match="a row for each sample"):
            leaves(odd)


def test_the_distance_of_logits_is_a_mean_and_masked_classes_are_left_out() -> None:
    now, then = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 4.0]])
    assert float(apart(now, then)) == pytest.approx((0 + 4) / 2)
    inf = float("inf")
    now = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    assert float(apart(now, torch.tensor([[0.0, -inf, 3.0]])).detach()) == pytest.approx(1 / 3)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    whole = C.der_loss(logits, logits + 1, logits, labels, 0.3, 0.5)
    assert float(0.3 * apart(logits, logits + 1) + 0.5 * F.cross_entropy(logits, labels)) == pytest.approx(float(whole))


# ---------------------------------------------------------------------- the loss


def written_out(kind: str, module: Digits, data: PermutedDigits, samples: int, size: int | None, accumulate: int) -> Digits:
    """ER and DER++ in float64, the buffer a list."""
    module = copy.deepcopy(module).double()
    optimizer, draws = module.configure_optimizers(), Reservoir(samples, 0)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, (x, y) in enumerate(data.train_dataloader()):
        x = x.double()  # noqa: PLW2901
        logits = module(x)
        loss = F.cross_entropy(logits, y)
        if kept:
            a, b = ([kept[j] for j in draws.draw(size or len(x), number).tolist()] for number in (0, 1))
            xa, ya, za = (torch.stack(part) for part in zip(*a, strict=True))
            xb, yb, _ = (torch.stack(part) for part in zip(*b, strict=True))
            if kind == "er":
                loss = loss + F.cross_entropy(module(xa), ya)
            else:
                loss = loss + 0.3 * ((module(xa) - za) ** 2).mean() + 0.5 * F.cross_entropy(module(xb), yb)
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        for slot, j in draws.slots(len(x)).items():
            entry = (x[j], y[j], logits[j].detach())
            if slot < len(kept):
                kept[slot] = entry
            else:
                kept.append(entry)
        draws.seen += len(x)
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("samples", "size"), [(20, None), (20, 5), (1000, 12)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_written_out_one(kind: str, samples: int, size: int | None, accumulate: int, tmp_path: Path) -> None:
    data, module = PermutedDigits(**SIZES), start()
    expected = written_out(kind, module, data, samples, size, accumulate)
    plug = Replay(samples, size, kind)
    fit([plug], tmp_path, data, module, precision="64-true", accumulate_grad_batches=accumulate)
    equal(module, expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_trained_as_without_the_plug_and_the_second_is_not(kind: str, tmp_path: Path) -> None:
    for steps, same in ((1, True), (2, False)):
        with_plug, without = start(), start()
        fit([Replay(kind=kind)], tmp_path, None, with_plug, max_steps=steps)
        fit([], tmp_path, None, without, max_steps=steps)
        assert all(torch.equal(a, b) for a, b in zip(with_plug.parameters(), without.parameters(), strict=True)) == same


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_is_as_in_a_trainer(kind: str, tmp_path: Path) -> None:
    data, plug, byhand, module = PermutedDigits(**SIZES), Replay(20, kind=kind), Replay(20, kind=kind), start("adam")
    net = copy.deepcopy(module.net)
    fit([plug], tmp_path, data, module)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for x, y in data.train_dataloader():
        optimizer.zero_grad()
        logits = net(x)
        byhand.total_loss(net, F.cross_entropy(logits, y)).backward()
        optimizer.step()
        byhand.remember((x, y), logits)
    equal(module.net, net, 1e-6)
    if kind == "der++":
        with pytest.raises(ValueError, match=r"remember\(batch, logits\)"):
            byhand.remember((x, y))


class Batches(list[Any]):
    """Batches of which a resumed run has had the first ones."""

    def __init__(self, batches: list[Any], first: int) -> None:
        super().__init__(batches)
        self.first = first

    def __iter__(self) -> Any:
        return iter(self[self.first :])

    def state_dict(self) -> dict[str, Any]:
        return {"none": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The place is given by hand."""


class Texts(L.LightningDataModule):
    """Two tasks of token sequences, padded to the longest of each batch; the first `first` batches have been given."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first = first

    def train_lengths(self) -> list[int]:
        return [6, 6]

    def train_tasks(self) -> list[int]:
        return [0, 1]

    def eval_lengths(self, stage: Any) -> list[tuple[int, int]]:
        return []

    def task_batches(self, task: int) -> Any:
        return list(self.batches())[task * 6 : task * 6 + 6]

    def batches(self) -> Any:
        g = torch.Generator().manual_seed(0)
        for _ in range(12):
            lengths = torch.randint(1, 9, (4,), generator=g)
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            ids = torch.randint(1, 30, mask.shape, generator=g) * mask
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}

    def train_dataloader(self) -> Any:
        return Batches(list(self.batches()), self.first)


class Reader(L.LightningModule):
    """A mean over the tokens that are no padding; its step takes the labels out of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mean()

    def training_step(self, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(self.net(**batch), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(30, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None]
        return self.read((self.embed(input_ids) * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_different_lengths_are_kept_as_they_are_but_for_padding(kind: str, tmp_path: Path) -> None:
    plug = Replay(100, kind=kind)
    trainer(tmp_path, callbacks=[plug], max_epochs=1).fit(Reader(), datamodule=Texts())
    came = [{k: v[i] for k, v in batch.items()} for batch in Texts().batches() for i in range(4)]
    kept = plug.memory.buffer.take(torch.arange(48))
    for i, sample in enumerate(came):
        n = int(sample["attention_mask"].sum())
        assert kept["input_ids"][i, :n].tolist() == sample["input_ids"][:n].tolist()
        assert kept["attention_mask"][i].sum() == n
        assert kept["labels"][i] == sample["labels"]
    assert kept["input_ids"].dtype == torch.int64


# ---------------------------------------------------------------------- in a Trainer


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_step_and_resumed_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    def run(*more: Any, **kwargs: Any) -> tuple[Any, Replay]:
        L.seed_everything(1, verbose=False)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))
        module, plug = Digits(optimizer="adam", lr=0.01, net=net), Replay(20, kind=kind)
        t = trainer(tmp_path, callbacks=[plug, gp.ExactResume(), *more], max_epochs=1, enable_checkpointing=bool(more))
        t.fit(module, datamodule=PermutedDigits(**SIZES), **kwargs)
        return module, plug

    whole, kept = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    for step in sorted({1, 6, *random.Random(kind).sample(range(2, 18), 8)}):
        resumed, plug = run(ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        equal(whole, resumed)
        assert all(torch.equal(t, buffer(plug)[name]) for name, t in buffer(kept).items()), step
    with pytest.raises(gp.PlugError, match="is for 20 samples, and samples=30: resume with"):
        Replay(30).load_state_dict(kept.state_dict())


def test_a_checkpoint_of_texts_resumes_with_the_same_bits(tmp_path: Path) -> None:
    def run(*more: Any, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        module = Reader()
        t = trainer(tmp_path, callbacks=[Replay(10, kind="der++"), *more], max_epochs=1, enable_checkpointing=bool(more))
        t.fit(module, **kwargs)
        return module

    whole = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1), datamodule=Texts())
    for step in (2, 6, 9):
        resumed = run(datamodule=Texts(step), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        equal(whole, resumed)


def run_ddp(folder: Path, devices: int) -> None:
    for kind in KINDS:
        plug, module = Replay(40, kind=kind), start()
        settings = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
        fit([plug], folder, PermutedDigits(**{**SIZES, "batch_size": 16 // devices}), module, **settings)
        rank = torch.distributed.get_rank() if devices == 2 else 0
        torch.save({"weights": module.state_dict(), "buffer": buffer(plug)}, folder / f"{kind}_{devices}_{rank}.pt")


def test_two_processes_hold_one_buffer_and_equal_one_process(tmp_path: Path) -> None:
    two_processes(run_ddp, tmp_path)
    run_ddp(tmp_path, 1)
    for kind in KINDS:
        one, first, second = (torch.load(tmp_path / f"{kind}_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
        for name, t in one["buffer"].items():
            assert torch.equal(first["buffer"][name], second["buffer"][name]), "processes hold different samples"
            assert torch.allclose(first["buffer"][name], t, rtol=0, atol=1e-5)  # logits are of weights that differ by rounding
        for name, t in one["weights"].items():
            assert torch.allclose(t, first["weights"][name], rtol=0, atol=1e-6), (kind, name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grad_scaler_changes_nothing(kind: str, tmp_path: Path) -> None:
    found = []
    for scale in (2.0**10, 1.0):
        scaler, module = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6), start()
        fit([Replay(20, kind=kind)], tmp_path, None, module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        found.append(module)
    equal(*found, 2e-3)  # gradients in float16


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_keep_their_dtype_in_lower_precision(kind: str, precision: str, tmp_path: Path) -> None:
    plug = Replay(20, kind=kind)
    fit([plug], tmp_path, None, start(), precision=precision)
    assert buffer(plug)["0"].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert buffer(plug)["1"].dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_replay_logs_nothing_again_and_leaves_metrics_alone(kind: str, tmp_path: Path) -> None:
    class Counts(Digits):
        def __init__(self) -> None:
            super().__init__(16)
            self.seen = MeanMetric()
            self.logged = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.update(torch.ones(len(batch[0])))
            return super().training_step(batch, batch_idx)

        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            self.logged += name == "loss"
            super().log(name, *args, **kwargs)

    module = Counts()
    fit([Replay(20, kind=kind)], tmp_path, None, module)
    assert module.logged == 18
    assert float(module.seen.weight) == 18 * 8


def test_a_step_that_leaves_a_batch_out_leaves_it_out_of_the_buffer(tmp_path: Path) -> None:
    class Leaves(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (
                None
                if batch_idx % 2 and batch_idx == self.trainer.fit_loop.epoch_loop.batch_idx
                else super().training_step(batch, batch_idx)
            )

    plug = Replay(1000)
    fit([plug], tmp_path, None, Leaves(16))
    assert plug.memory.buffer.seen == 9 * 8


def test_batch_norm_follows_what_is_replayed(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    module = Digits(net=net)
    fit([Replay(20)], tmp_path, None, module)
    assert int(net[1].num_batches_tracked) == 18 + 17


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_exception_nothing_listens(kind: str, tmp_path: Path) -> None:
    class Fails(Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module, plug = Fails(16), Replay(20, kind=kind)
    with pytest.raises(ZeroDivisionError):
        fit([plug], tmp_path, None, module)
    assert not any(m._forward_hooks for m in module.modules())
    assert not {"training_step", "log"} & set(module.__dict__)
    assert plug.memory.buffer.seen == 3 * 8


def test_memory_and_the_term_are_logged_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger, plug = TensorBoardLogger(tmp_path, name="run"), Replay(30, kind="der++")
    fit([plug], tmp_path, None, start(), logger=logger, log_every_n_steps=1)
    found, size = EventAccumulator(logger.log_dir).Reload(), 30 * (64 * 4 + 8 + 10 * 4)
    assert [e.value for e in found.Scalars("continual/replay/bytes")] == [size] * 3
    assert [e.value for e in found.Scalars("continual/replay/samples")] == [30] * 3
    assert len(found.Scalars("continual/replay")) == len(found.Scalars("continual/replay_logits")) == 17
    text = capsys.readouterr().out
    assert "30 of 144 samples" in text
    assert "7,680" in text


def test_without_a_stream_nothing_happens_and_it_is_said(tmp_path: Path) -> None:
    plug, module, other = Replay(), UserModule(), UserModule()
    other.load_state_dict(module.state_dict())
    with pytest.warns(UserWarning, match="Replay: the data are no stream"):
        trainer(tmp_path, callbacks=[plug]).fit(module, loader())
    trainer(tmp_path).fit(other, loader())
    equal(module, other)
    assert not plug.memory.buffer.seen


# ---------------------------------------------------------------------- what is refused


def test_a_buffer_smaller_than_a_batch_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    module = start()
    before = copy.deepcopy(module)
    with pytest.raises(gp.PlugError, match=r"Replay\(samples=7\) is smaller than the batch of 8 samples"):
        fit([Replay(7)], tmp_path, None, module)
    equal(module, before)
    fit([Replay(7, batch_size=4)], tmp_path, None, module)


def test_parts_that_are_missing_in_another_task_are_named(tmp_path: Path) -> None:
    plug = Replay(10)
    plug.remember({"x": torch.rand(4, 3), "labels": torch.zeros(4)})
    with pytest.raises(gp.PlugError, match="with the parts labels, x, and a batch of this stream has labels, mask, x"):
        plug.remember({"x": torch.rand(4, 3), "mask": torch.ones(4, 3), "labels": torch.zeros(4)})
    with pytest.raises(gp.PlugError, match="another number of rows"):
        plug.remember({"x": torch.rand(4, 3), "labels": torch.zeros(5)})


def test_early_exits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(gp.PlugError, match="Replay cannot be used with EarlyExit"):
        fit([Replay(), gp.EarlyExit(latency=())], tmp_path, None, UserModule())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Replay(0), ValueError, "samples=0 must be ≥ 1"),
        (lambda: Replay(2.5), TypeError, "whole number"),  # type: ignore[arg-type]
        (lambda: Replay(10, batch_size=11), ValueError, "batch_size=11 must lie in 1 … samples=10"),
        (lambda: Replay(10, batch_size=0), ValueError, "batch_size=0"),
        (lambda: Replay(10, batch_size=2.0), TypeError, "whole number"),  # type: ignore[arg-type]
        (lambda: Replay(kind="der"), ValueError, "Did you mean"),
        (lambda: Replay(alpha=-0.1), ValueError, "alpha=-0.1 must be a finite number ≥ 0"),
        (lambda: Replay(beta=float("inf")), ValueError, "beta=inf"),
        (lambda: Replay(beta="half"), TypeError, "must be a number"),  # type: ignore[arg-type]
        (lambda: Replay(seed=None), TypeError, "whole number"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_say_what_is_allowed(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)

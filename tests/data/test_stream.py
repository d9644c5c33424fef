"""TaskStream: what its tasks are, in which order they come, what is refused."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset, WeightedRandomSampler

import gateplug as gp
from gateplug.core.stream import Stream, eval_task, permutation, place_in
from gateplug.data.imagebatch import ToPixels
from gateplug.data.stream import TaskStream
from gateplug.data.stream_kinds import Permute, Rotate, class_groups
from gateplug.data.stream_labels import dataset_labels
from gateplug.data.stream_loader import StreamLoader

QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu", "max_epochs": 1,
}  # fmt: skip


class Few(gp.Digits):
    """72 digits to train in batches of 16, 90 to validate, the rest to test."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 16, "val_fraction": 0.05, "test_fraction": 0.91, **kwargs})


class Users(LightningDataModule):
    """A user's data module: images and labels in tuples."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int = 8, shuffle: bool = True, **kwargs: Any) -> None:
        super().__init__()
        self.data, self.batch_size, self.shuffle, self.kwargs = TensorDataset(x, y), batch_size, shuffle, kwargs
        self.calls: list[Any] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str | None = None) -> None:
        self.calls.append(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.batch_size, shuffle=self.shuffle, **self.kwargs)


def users(n: int = 24, classes: int = 4, **kwargs: Any) -> Users:
    """`n` images 4×4 whose pixels and labels count up, so that every sample can be told."""
    return Users(torch.arange(n * 16.0).reshape(n, 1, 4, 4), torch.arange(n) % classes, **kwargs)


class Watch(L.LightningModule):
    """Trains nothing worth it and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.train_seen: list[Any] = []
        self.val_seen: list[list[Any]] = []
        self.test_seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.train_seen.append(batch)
        return self.weight * 1.0

    def on_validation_start(self) -> None:
        self.val_seen.append([])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_seen[-1].append((eval_task(self.trainer.datamodule, "val", batch_idx), batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.test_seen.append((eval_task(self.trainer.datamodule, "test", batch_idx), batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Masking(Callback):
    """Stands for HeadMask, which a stream knows by its class's name."""


# ---------------------------------------------------------------------- what the tasks are


def test_permuted_tasks_permute_the_pixels_of_all_channels_alike() -> None:
    x = torch.rand(3, 2, 4, 5)
    assert torch.equal(Permute(7, 0)(x), x)
    order = permutation(7, 2, 20)
    assert torch.equal(Permute(7, 2)(x).flatten(2), x.flatten(2)[:, :, order])
    assert torch.equal(Permute(7, 2)(x[:, 0]), Permute(7, 2)(x)[:, 0])
    assert torch.equal(Permute(7, 2)(x[:, 0].flatten(1)), Permute(7, 2)(x[:, 0]).flatten(1))


def test_rotated_tasks_turn_counterclockwise() -> None:
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(Rotate(0)(x), x)
    # bilinear weights are 0 and 1 up to float32
    assert torch.allclose(Rotate(90)(x), x.rot90(1, (-2, -1)), atol=1e-5)
    assert torch.allclose(Rotate(180)(x), x.rot90(2, (-2, -1)), atol=1e-5)
    assert torch.allclose(Rotate(30)(x[:, 0]), Rotate(30)(x)[:, 0])


def test_an_oblong_image_keeps_its_shape_when_it_is_turned() -> None:
    x = torch.zeros(1, 1, 9, 21)
    x[..., 4, 8:13] = 1  # a bar of 5 pixels through the centre lies upright after 90°
    expected = torch.zeros(1, 1, 9, 21)
    expected[..., 2:7, 10] = 1
    assert torch.allclose(Rotate(90)(x), expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(degrees=st.floats(0, 180), seed=st.integers(0, 100))
def test_rotation_is_bilinear_reading_at_the_turned_place(degrees: float, seed: int) -> None:
    """The formula itself, pixel by pixel, in float64."""
    x = torch.rand(1, 1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    expected = torch.zeros_like(x)
    for row in range(5):
        for column in range(7):
            v, u = row - 2.0, column - 3.0  # from the centre, in pixels, down and to the right
            r, c = 2 + sin * u + cos * v, 3 + cos * u - sin * v
            for i in (math.floor(r), math.floor(r) + 1):
                for j in (math.floor(c), math.floor(c) + 1):
                    if 0 <= i < 5 and 0 <= j < 7:
                        expected[0, 0, row, column] += (1 - abs(r - i)) * (1 - abs(c - j)) * x[0, 0, i, j]
    assert torch.allclose(Rotate(degrees)(x), expected, atol=1e-12)


def test_what_comes_in_from_outside_is_black_also_after_normalisation() -> None:
    mean, std = [0.3, 0.6, 0.1], [0.2, 0.5, 0.9]
    images = torch.rand(4, 3, 6, 6)
    normalise = ToPixels(None, mean, std)
    before = normalise({"pixel_values": Rotate(40)(images)}, torch.zeros(4))["pixel_values"]
    after = Rotate(40, mean, std)(normalise({"pixel_values": images}, torch.zeros(4))["pixel_values"])
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.allclose(after[:, :, 0, 0], -torch.tensor(mean) / torch.tensor(std))


@given(classes=st.integers(1, 40), tasks=st.integers(1, 40), seed=st.none() | st.integers(0, 9))
def test_groups_of_classes_are_a_partition(classes: int, tasks: int, seed: int | None) -> None:
    if classes < tasks:
        with pytest.raises(ValueError, match="does not cut"):
            class_groups(classes, tasks, seed, uneven=True)
        return
    groups = class_groups(classes, tasks, seed, uneven=True)
    assert sorted(c for g in groups for c in g) == list(range(classes))
    assert {len(g) for g in groups} <= {classes // tasks, -(-classes // tasks)}
    if seed is None:
        assert [c for g in groups for c in g] == list(range(classes))
    if classes % tasks:
        with pytest.raises(ValueError, match="groups of one size"):
            class_groups(classes, tasks, seed)


@pytest.mark.parametrize("head", ["domain", "task", "class"])
def test_labels_and_outputs_of_a_class_split(head: Any) -> None:
    stream = TaskStream(base=Few(), kind="class_split", num_tasks=5, epochs_per_task=1, head=head, seed=3)
    groups = class_groups(10, 5, 3)
    images, labels = Few().dataset("train").columns.values() if Few().setup() else _columns()
    assert stream.num_classes == (2 if head == "domain" else 10)
    batches = list(stream.train_dataloader())
    for place, batch in zip((place_in(stream, i) for i in range(len(batches))), batches, strict=True):
        assert place is not None
        group = groups[place.task]
        assert stream.classes(place.task) == ([0, 1] if head == "domain" else group)
        for image, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
            true = int(labels[(images == image).flatten(1).all(1).nonzero()[0, 0]])
            assert true in group
            assert label == (group.index(true) if head == "domain" else true)
    assert sum(len(b["labels"]) for b in batches) == 72


def _columns() -> tuple[Tensor, Tensor]:
    data = Few()
    data.setup()
    columns = data.dataset("train").columns
    return columns["pixel_values"], columns["labels"]


@pytest.mark.parametrize("head", ["task", "class"])
def test_heads_of_tasks_with_all_classes_lie_one_behind_the_other(head: Any) -> None:
    stream = TaskStream(base=Few(), kind="permuted", num_tasks=3, epochs_per_task=1, head=head)
    assert stream.num_classes == 30
    assert [stream.classes(t) for t in range(3)] == [list(range(10 * t, 10 * t + 10)) for t in range(3)]
    for i, batch in enumerate(stream.train_dataloader()):
        assert {*batch["labels"].tolist()} <= {*stream.classes(i // 5)}
    domains = TaskStream(tasks=[users(classes=3), users(classes=4)], epochs_per_task=1, head=head)
    assert domains.num_classes == 7
    assert domains.classes(1) == [3, 4, 5, 6]
    assert {y for _, labels in domains.test_dataloader() or list(domains.train_dataloader())[3:] for y in labels.tolist()} == {
        3, 4, 5, 6,
    }  # fmt: skip


def test_a_stream_over_a_users_tuples_and_flat_vectors() -> None:
    flat = Users(torch.rand(12, 6), torch.arange(12) % 2)
    stream = TaskStream(base=flat, kind="permuted", num_tasks=2, epochs_per_task=1, seed=5)
    rows = {tuple(x[permutation(5, 1, 6)].tolist()) for x in flat.data.tensors[0]}
    second = list(stream.train_dataloader())[2:]
    assert {tuple(x.tolist()) for batch in second for x in batch[0]} == rows
    assert type(second[0]) is list  # as torch's default collate makes them
    assert isinstance(stream, Stream)


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_a_batch_names_its_task_only_when_asked(form: str) -> None:
    base: Any = Few() if form == "mapping" else users()
    plain = next(iter(TaskStream(base=base, kind="permuted", num_tasks=2, epochs_per_task=1).train_dataloader()))
    named = list(TaskStream(base=base, kind="permuted", num_tasks=2, epochs_per_task=1, task_in_batch=True).train_dataloader())
    if form == "mapping":
        assert set(plain) == {"pixel_values", "labels"}
        assert torch.equal(named[-1]["task"], torch.ones(len(named[-1]["labels"]), dtype=torch.int64))
    else:
        assert len(plain) == 2
        assert torch.equal(named[-1][2], torch.ones(8, dtype=torch.int64))


def test_measuring_gives_all_samples_in_one_order_without_augmentation() -> None:
    stream = TaskStream(base=Few(augment="crop"), kind="class_split", num_tasks=2, steps_per_task=3, seed=None)
    images, labels = _columns()
    first = list(stream.task_batches(1))
    whole = list(stream.train_dataloader())
    running = iter(stream.train_dataloader())
    next(running)
    again = list(stream.task_batches(1))  # in the middle of the training
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, again, strict=True))
    seen = torch.cat([b["pixel_values"] for b in first])
    expected = images[labels >= 5]
    assert len(seen) == len(expected)
    assert {tuple(i.flatten().tolist()) for i in seen} == {tuple(i.flatten().tolist()) for i in expected}
    assert len(stream.task_batches(1)) == len(first)
    rest = list(running)
    assert len(rest) == 5
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(whole[1:], rest, strict=True))


# ---------------------------------------------------------------------- the order of things


def test_lengths_follow_steps_or_epochs_and_a_task_may_come_again() -> None:
    assert TaskStream(base=Few(), kind="permuted", num_tasks=2, epochs_per_task=3).train_lengths() == [15, 15]
    stream = TaskStream(base=Few(), kind="rotated", num_tasks=3, steps_per_task=7, order=[0, 1, 0, 2])
    assert stream.train_lengths() == [7] * 4
    assert stream.train_tasks() == [0, 1, 0, 2]
    loader = stream.train_dataloader()
    assert len(loader) == len(list(loader)) == 28


def test_each_pass_has_all_samples_and_an_order_of_its_own() -> None:
    stream = TaskStream(base=users(), kind="permuted", num_tasks=2, epochs_per_task=2, order=[0, 1, 0])
    loader = stream.train_dataloader()
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        for start in range(0, len(batches), 3):
            orders.append(torch.cat([y + x.sum((1, 2, 3)) for x, y in batches[start : start + 3]]))
    assert len(orders) == 12
    for order in orders:
        assert torch.equal(order.sort()[0], orders[0].sort()[0])  # every sample once; a permutation keeps the sum of its pixels
    assert len({tuple(o.tolist()) for o in orders}) == 12
    loader.set_epoch(1)
    assert torch.equal(torch.cat([y + x.sum((1, 2, 3)) for x, y in list(loader)[:3]]), orders[6])


@settings(max_examples=20, deadline=None)
@given(
    steps=st.integers(1, 9), order=st.lists(st.integers(0, 2), min_size=1, max_size=4), at=st.integers(0, 40), epoch=st.integers(0, 2),
    kind=st.sampled_from(["permuted", "class_split", "domains"]),
)  # fmt: skip
def test_a_loader_that_is_resumed_goes_on_as_if_it_had_never_stopped(
    steps: int, order: list[int], at: int, epoch: int, kind: Any
) -> None:
    def loader() -> StreamLoader:
        made: dict[str, Any] = {"base": users(classes=3), "kind": kind, "num_tasks": 3}
        if kind == "domains":
            made = {"tasks": [users(12), users(24), users(9)]}
        return TaskStream(**made, steps_per_task=steps, order=order).train_dataloader()

    whole = loader()
    whole.set_epoch(epoch)
    expected = list(whole)
    at = min(at, len(expected))
    left = loader()
    left.set_epoch(epoch)
    iterator = iter(left)
    for _ in range(at):
        next(iterator)
    rest = loader()
    rest.load_state_dict(left.state_dict())
    rest.set_epoch(epoch)
    found = list(rest)
    if at == len(expected):  # then it is the next epoch's turn
        whole.set_epoch(epoch + 1)
        expected, at = list(whole), 0
    assert len(found) == len(expected) - at
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(expected[at:], found, strict=True))


def test_resuming_reads_nothing_of_what_came_before() -> None:
    read: list[int] = []

    class Counting(Dataset[Any]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return torch.zeros(1, 4, 4), index % 2

    data = users()
    data.data = Counting()  # type: ignore[assignment]
    state = {
        **TaskStream(base=data, kind="permuted", num_tasks=9, epochs_per_task=5).train_dataloader().state_dict(),
        "batch": 100,
    }
    loader = TaskStream(base=data, kind="permuted", num_tasks=9, epochs_per_task=5).train_dataloader()
    loader.load_state_dict(state)
    next(iter(loader))
    assert len(read) == 8


def test_a_checkpoint_of_another_stream_is_refused() -> None:
    def loader(steps: int = 4, tasks: int = 2, **kwargs: Any) -> StreamLoader:
        return TaskStream(base=users(), kind="permuted", num_tasks=tasks, steps_per_task=steps, **kwargs).train_dataloader()

    state = {**loader().state_dict(), "batch": 6}
    with pytest.raises(ValueError, match=r"batch 6 of a stream with .* \[\[0, 4\], \[1, 4\]\], and this one has \[\[0, 5\]"):
        loader(5).load_state_dict(state)
    with pytest.raises(ValueError, match="not written by a TaskStream"):
        loader().load_state_dict({"epoch": 0, "position": 3})
    with pytest.warns(UserWarning, match="has seed=0, this one has seed=1"):
        loader(seed=1).load_state_dict(state)
    longer = loader(tasks=3)  # a stream to which tasks were added
    longer.load_state_dict(state)
    assert len(list(longer)) == 6


# ---------------------------------------------------------------------- in a Trainer


@pytest.mark.parametrize("forward", [False, True])
def test_validation_gives_the_tasks_that_have_begun_and_test_gives_all(forward: bool) -> None:
    stream = TaskStream(base=Few(), kind="rotated", num_tasks=3, epochs_per_task=1, order=[1, 0, 2], forward=forward)
    watch = Watch()
    trainer = L.Trainer(**QUIET, val_check_interval=5)
    trainer.fit(watch, stream)
    assert len(watch.train_seen) == 15
    tasks = [[task for task, _ in run] for run in watch.val_seen]
    every = [0] * 6 + [1] * 6 + [2] * 6
    assert tasks[0] == (every[:2] if forward else [1, 1])  # the sanity check
    assert tasks[1:] == ([every] * 3 if forward else [[1] * 6, [0] * 6 + [1] * 6, every])
    angle = Rotate(60)
    assert torch.equal(watch.val_seen[3][6][1]["pixel_values"], angle(watch.val_seen[3][0][1]["pixel_values"]))
    trainer.validate(watch, stream, verbose=False)
    assert [task for task, _ in watch.val_seen[-1]] == every
    trainer.test(watch, stream, verbose=False)
    assert [task for task, _ in watch.test_seen] == [t for t in range(3) for _ in range(103)]
    assert stream.eval_lengths("test") == [(0, 103), (1, 103), (2, 103)]
    assert len(trainer.predict(_Predict(), stream)) == 309


class _Predict(L.LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> int:
        return len(batch["labels"])


def test_a_task_without_a_validation_set_is_left_out_of_validation() -> None:
    stream = TaskStream(tasks=[users(), Few()], epochs_per_task=1)
    with pytest.warns(UserWarning, match="no val set for some tasks, which are left out there: 0"):
        stream.val_dataloader()
    assert [task for task, _ in stream.eval_lengths("val")] == [1]
    assert len(list(stream.val_dataloader())) == stream.eval_lengths("val")[0][1]


def test_a_second_epoch_passes_the_stream_again_with_other_orders_and_all_tasks_are_known() -> None:
    stream = TaskStream(base=users(), kind="permuted", num_tasks=2, epochs_per_task=1)
    watch = Watch()
    with pytest.warns(UserWarning, match="would be passed 2 times"):
        L.Trainer(**{**QUIET, "max_epochs": 2}).fit(watch, stream)
    first, second = (torch.cat([y for _, y in watch.train_seen[s : s + 3]]) for s in (0, 6))
    assert len(watch.train_seen) == 12
    assert not torch.equal(first, second)


def test_a_data_module_is_prepared_and_set_up_once() -> None:
    a, b = users(), users()
    stream = TaskStream(tasks=[a, b, a], epochs_per_task=1)
    trainer = L.Trainer(**QUIET)
    trainer.fit(Watch(), stream)
    trainer.fit(Watch(), stream)
    assert a.calls == ["prepare", "fit"] * 2
    assert a.trainer is trainer
    assert stream.val_dataloader() == stream.test_dataloader() == []


def test_a_task_that_is_over_gives_up_its_workers() -> None:
    tasks = [Few(num_workers=1, seed=s) for s in range(3)]
    stream = TaskStream(tasks=tasks, epochs_per_task=2)  # type: ignore[arg-type]
    alive: list[int] = []

    class Count(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            alive.append(len(multiprocessing.active_children()))

    L.Trainer(**QUIET, callbacks=[Count()], num_sanity_val_steps=0).fit(Watch(), stream)
    assert set(alive) == {1}
    assert not multiprocessing.active_children()


def test_what_a_data_module_keeps_is_in_the_checkpoint_and_it_may_clean_up(tmp_path: Path) -> None:
    class Keeps(Users):
        kept = 0

        def state_dict(self) -> dict[str, Any]:
            return {"kept": self.kept}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.kept = state["kept"]

        def teardown(self, stage: str) -> None:
            self.calls.append(f"end of {stage}")

    def stream() -> tuple[Keeps, TaskStream]:
        keeps = Keeps(torch.rand(8, 6), torch.ones(8).long())
        return keeps, TaskStream(tasks=[users(), keeps], epochs_per_task=1)

    keeps, data = stream()
    keeps.kept = 7
    trainer = L.Trainer(**QUIET)
    trainer.fit(Watch(), data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert keeps.calls[-1] == f"end of {TrainerFn.FITTING}"
    keeps, data = stream()
    L.Trainer(**QUIET).fit(Watch(), data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert keeps.kept == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_matter(workers: int) -> None:
    def batches(num_workers: int) -> list[Any]:
        stream = TaskStream(
            base=Few(num_workers=num_workers, augment="affine"), kind="class_split", num_tasks=5, steps_per_task=3
        )
        return list(stream.train_dataloader())

    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(batches(0), batches(workers), strict=True))


def test_accumulation_must_not_mix_tasks() -> None:
    stream = TaskStream(base=Few(), kind="permuted", num_tasks=2, steps_per_task=5)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 does not divide the 5 training batches of task 0"):
        L.Trainer(**QUIET, accumulate_grad_batches=2).fit(Watch(), stream)
    with pytest.raises(ValueError, match="accumulate_grad_batches=3 does not divide"):
        L.Trainer(**QUIET, callbacks=[GradientAccumulationScheduler({0: 1, 4: 3})]).fit(Watch(), stream)
    L.Trainer(**QUIET, accumulate_grad_batches=5).fit(Watch(), stream)


def test_a_few_batches_of_a_loader_are_no_stream() -> None:
    with pytest.raises(ValueError, match="overfit_batches=2"):
        L.Trainer(**QUIET, overfit_batches=2).fit(Watch(), TaskStream(base=Few(), kind="permuted", num_tasks=2, steps_per_task=5))


@pytest.mark.parametrize("head", ["task", "class"])
def test_several_heads_need_a_head_mask(head: Any) -> None:
    stream = TaskStream(base=Few(), kind="permuted", num_tasks=2, steps_per_task=2, head=head)
    with pytest.raises(gp.PlugError, match=r"Add gp.HeadMask\(\) to the Trainer's callbacks"):
        L.Trainer(**QUIET).fit(Watch(), stream)
    Masking.__name__ = "HeadMask"  # for a moment: two classes of one name confuse the command line
    try:
        L.Trainer(**QUIET, callbacks=[Masking()]).fit(Watch(), stream)
    finally:
        Masking.__name__ = "Masking"


# ---------------------------------------------------------------------- what is refused


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "neither is given"),
    ({"tasks": [Few()], "base": Few()}, ValueError, "both is given"),
    ({"tasks": []}, ValueError, "at least one task"),
    ({"tasks": [3]}, TypeError, "LightningDataModule"),
    ({"base": Few(), "kind": "permutd", "num_tasks": 2}, ValueError, "Did you mean 'permuted'"),
    ({"base": Few(), "kind": "permuted"}, ValueError, "base needs num_tasks"),
    ({"base": Few(), "num_tasks": 2}, ValueError, "base needs num_tasks, and a kind"),
    ({"base": Few(), "kind": "domains", "num_tasks": 2}, ValueError, "list of data modules"),
    ({"tasks": [Few()], "kind": "rotated"}, ValueError, "says both by itself"),
    ({"tasks": [Few()], "num_tasks": 2}, ValueError, "says both by itself"),
    ({"num_tasks": 0}, ValueError, "at least one task"),
    ({"num_tasks": 2.0}, TypeError, "whole number"),
    ({"steps_per_task": 3}, ValueError, "exactly one"),
    ({"epochs_per_task": None}, ValueError, "exactly one"),
    ({"epochs_per_task": 0}, ValueError, "at least 1"),
    ({"epochs_per_task": None, "steps_per_task": 0}, ValueError, "at least 1"),
    ({"epochs_per_task": 1.5}, TypeError, "whole number"),
    ({"head": "tasks"}, ValueError, "Did you mean 'task'"),
    ({"order": [0, 2]}, ValueError, r"each of 0 … 1"),
    ({"order": []}, ValueError, "at least one task"),
    ({"uneven": True}, ValueError, "how classes are cut"),
    ({"seed": None}, ValueError, "class_split"),
    ({"seed": "0"}, TypeError, "whole number"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_wrong_arguments_are_refused_with_their_reason(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    whole = {"base": Few(), "kind": "permuted", "num_tasks": 2}
    given = arguments if not arguments or {"tasks", "base"} & set(arguments) else {**whole, **arguments}
    with pytest.raises(error, match=text):
        TaskStream(**{"epochs_per_task": 1, **given})


def test_wrong_data_are_refused_with_their_reason() -> None:
    with pytest.raises(ValueError, match="does not cut 10 classes into groups of one size; these do: .2, 5, 10."):
        TaskStream(base=Few(), kind="class_split", num_tasks=3, epochs_per_task=1).setup("fit")
    TaskStream(base=Few(), kind="class_split", num_tasks=3, epochs_per_task=1, uneven=True).setup("fit")
    other = users(classes=3)
    other.num_classes = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"have \[3, 10\] classes"):
        TaskStream(tasks=[Few(), other], epochs_per_task=1).setup("fit")
    TaskStream(tasks=[Few(), users(classes=3)], epochs_per_task=1).setup("fit")  # only where both say it
    lacking = users(classes=3)
    lacking.num_classes = 4  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="task 3 .Users. has no training data"):
        TaskStream(base=lacking, kind="class_split", num_tasks=4, epochs_per_task=1, seed=None).setup("fit")
    with pytest.raises(ValueError, match="a vector has no rows to turn"):
        next(
            iter(
                TaskStream(
                    base=Users(torch.rand(8, 6), torch.ones(8).long()), kind="rotated", num_tasks=2, epochs_per_task=1
                ).train_dataloader()
            )
        )
    with pytest.raises(ValueError, match="text has no pixels"):
        next(
            iter(
                TaskStream(
                    base=Users(torch.ones(8, 6).long(), torch.ones(8).long()), kind="permuted", num_tasks=2, epochs_per_task=1
                ).train_dataloader()
            )
        )
    text = gp.TextData("python-stdlib", task="causal_lm", max_bytes=3000, block_size=32, val_fraction=0.0)
    with pytest.raises(ValueError, match=r"under 'pixel_values'; this batch has \['attention_mask', 'input_ids', 'labels'\]"):
        next(iter(TaskStream(base=text, kind="permuted", num_tasks=2, epochs_per_task=1).train_dataloader()))
    with pytest.raises(ValueError, match="needs one class a sample"):
        TaskStream(base=Users(torch.rand(8, 6), torch.rand(8)), kind="class_split", num_tasks=1, epochs_per_task=1).setup("fit")

    class Moves(Users):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    with pytest.raises(ValueError, match="Moves has on_after_batch_transfer, which Lightning would not call"):
        TaskStream(base=Moves(torch.rand(8, 6), torch.rand(8)), kind="permuted", num_tasks=1, epochs_per_task=1)


class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


def _loaders() -> list[tuple[Any, str]]:
    data = users().data
    weights = WeightedRandomSampler([1.0] * 24, 24)
    return [
        (DataLoader(_Endless(), 2), "reads an iterable-style data set (_Endless)"),
        (DataLoader(data, sampler=weights, batch_size=2), "has a sampler of its own (WeightedRandomSampler)"),
        (DataLoader(data, batch_sampler=[[0], [1]]), "has a batch_sampler of its own"),
        (DataLoader(data, batch_size=None), "has a batch_sampler of its own, or makes no batches"),
        (DataLoader(data, 2, sampler=RandomSampler(data, replacement=True)), "draws with replacement"),
        ([DataLoader(data, 2), DataLoader(data, 2)], "is a list"),
        (range(3), "is a range"),
    ]


@pytest.mark.parametrize(("loader", "reason"), _loaders(), ids=lambda v: v if isinstance(v, str) else "")
def test_loaders_that_cannot_be_placed_are_refused(loader: Any, reason: str) -> None:
    data = users()
    data.train_dataloader = lambda: loader  # type: ignore[method-assign]
    with pytest.raises(TypeError) as error:
        TaskStream(base=data, kind="permuted", num_tasks=2, epochs_per_task=1).setup("fit")
    assert f"Users's loader {reason}" in str(error.value)
    assert "gp.exact_loader" in str(error.value)


def test_labels_are_found_where_data_sets_keep_them() -> None:
    x, y = torch.rand(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])

    class Torchvision(Dataset[Any]):
        def __init__(self, targets: Any, shift: int = 0, name: str = "targets") -> None:
            setattr(self, name, targets)
            self.shift = shift

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return x[index], int(y[index]) + self.shift

    for dataset in (
        TensorDataset(x, y),
        Torchvision(y.tolist()),
        Torchvision(y.numpy(), name="labels"),
        Torchvision(["cat", "dog"], name="labels"),
    ):
        assert torch.equal(dataset_labels(dataset, "X"), y)
    assert torch.equal(dataset_labels(Subset(TensorDataset(x, y), [5, 1]), "X"), y[[5, 1]])
    # what a target_transform makes of them counts
    assert torch.equal(dataset_labels(Torchvision(y, shift=1), "X"), y + 1)
    assert dataset_labels(gp.exact_loader(TensorDataset(x, y), 2).dataset, "X").tolist() == y.tolist()


def test_it_is_built_from_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    text = """
    class_path: gateplug.data.stream.TaskStream
    init_args:
      tasks: [{class_path: gateplug.Digits, init_args: {batch_size: 5}}, {class_path: gateplug.Digits, init_args: {seed: 1}}]
      epochs_per_task: 2
    """
    import yaml

    config = parser.parse_object({"data": yaml.safe_load(text)})
    stream = parser.instantiate_classes(config).data
    assert isinstance(stream, TaskStream)
    assert [task.seed for task in stream.tasks] == [0, 1]
    based = {"class_path": "gateplug.data.stream.TaskStream", "init_args": {"base": {"class_path": "gateplug.Digits"}, "kind": "class_split", "num_tasks": 5, "steps_per_task": 3, "seed": None}}  # fmt: skip
    stream = parser.instantiate_classes(parser.parse_object({"data": based})).data
    assert stream.train_lengths() == [3] * 5
    assert stream.classes(1) == [0, 1]


def test_the_digits_of_the_tests_are_what_they_are_said_to_be() -> None:
    images, labels = _columns()
    assert len(images) == 72
    assert {*labels.tolist()} == set(range(10))

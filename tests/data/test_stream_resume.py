"""A stream that is killed at any batch and resumed, or shared by two processes, trains the same weights."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import gateplug as gp
from gateplug.data.stream import TaskStream
from tests.ddp import two_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Trainer.max_epochs"),
]

STREAMS: dict[str, dict[str, Any]] = {
    "permuted": {"kind": "permuted", "num_tasks": 3, "steps_per_task": 7},  # 5 batches are a pass
    "class_split": {"kind": "class_split", "num_tasks": 5, "epochs_per_task": 3},
    "rotated, again": {"kind": "rotated", "num_tasks": 2, "steps_per_task": 6, "order": [0, 1, 0]},
}


def digits(**kwargs: Any) -> gp.Digits:
    """72 digits to train, in batches of 16, the last of 8."""
    return gp.Digits(**{"batch_size": 16, "val_fraction": 0.05, "test_fraction": 0.91, "augment": "affine", **kwargs})


class Even(gp.Digits):
    """6 digits of each class to train: two processes, and batches of 10, 15 or 30, share them without a rest."""

    def read(self, split: Any) -> Any:
        rows = super().read(split)
        if rows is not None and split == "train":
            labels = rows.columns["labels"]
            kept = torch.cat([(labels == c).nonzero()[:6, 0] for c in range(10)]).sort()[0]
            rows.columns = {name: column[kept] for name, column in rows.columns.items()}
        return rows


def stream(name: str, **kwargs: Any) -> TaskStream:
    return TaskStream(base=digits(**kwargs), **STREAMS[name])


class Killed(RuntimeError):
    pass


class Kill(Callback):
    """Raises in the middle of a batch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            raise Killed


def run(folder: Path, data: Any, resume: Path | None = None, kill: int | None = None, **kwargs: Any) -> dict[str, Tensor] | None:
    """An unmodified Classifier under SGD with momentum."""
    L.seed_everything(4, verbose=False)
    outputs = max(2, data.num_classes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, outputs))
    module = gp.Classifier(net, outputs, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=1, monitor=None)
    callbacks = [gp.ExactResume(seed=4), saver, *([Kill(kill)] if kill is not None else [])]
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(callbacks=callbacks, **{**options, **kwargs})
    if resume is not None:
        torch.manual_seed(999)  # a new process has other random states
    try:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    except Killed:
        return None
    return module.state_dict()


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    assert a is not None
    assert b is not None
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: Any) -> Any:
    @functools.cache
    def whole(name: str) -> Any:
        return run(tmp_path_factory.mktemp("unbroken"), stream(name), val_check_interval=4)

    return whole


def _steps(name: str, n: int) -> list[int]:
    total = sum(stream(name).train_lengths())
    return sorted(random.Random(name).sample(range(1, total), n))


CASES = [(name, step) for name, n in (("permuted", 10), ("class_split", 10), ("rotated, again", 2)) for step in _steps(name, n)]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_killed_at_any_batch(unbroken: Any, tmp_path: Path, name: str, at: int) -> None:
    assert run(tmp_path, stream(name), kill=at, val_check_interval=4) is None
    assert same(unbroken(name), run(tmp_path, stream(name), resume=tmp_path / "last.ckpt", val_check_interval=4))


@pytest.mark.parametrize(("at", "workers"), [(3, (2, 2)), (6, (2, 0)), (7, (0, 2)), (13, (2, 2)), (14, (2, 2))])
def test_killed_with_workers_that_read_ahead(unbroken: Any, tmp_path: Path, at: int, workers: tuple[int, int]) -> None:
    options = {"val_check_interval": 4, "num_sanity_val_steps": 0}
    assert run(tmp_path, stream("permuted", num_workers=workers[0]), kill=at, **options) is None
    resumed = run(tmp_path, stream("permuted", num_workers=workers[1]), resume=tmp_path / "last.ckpt", **options)
    assert same(unbroken("permuted"), resumed)


def test_the_same_data_go_on_after_an_exception(unbroken: Any, tmp_path: Path) -> None:
    data = stream("permuted", num_workers=1)
    assert run(tmp_path, data, kill=9, val_check_interval=4) is None
    assert same(unbroken("permuted"), run(tmp_path, data, resume=tmp_path / "last.ckpt", val_check_interval=4))
    assert same(unbroken("permuted"), run(tmp_path / "anew", data, val_check_interval=4))


def test_killed_in_a_stream_of_data_modules(tmp_path: Path) -> None:
    def domains() -> TaskStream:
        return TaskStream(tasks=[digits(), digits(seed=1, num_workers=1), digits(seed=2)], steps_per_task=6)

    whole = run(tmp_path / "whole", domains())
    for at in (5, 6, 11, 13):
        folder = tmp_path / str(at)
        assert run(folder, domains(), kill=at) is None
        assert same(whole, run(folder, domains(), resume=folder / "last.ckpt"))


@pytest.mark.parametrize("at", [18, 21, 22, 30])
def test_killed_in_the_second_pass_over_the_stream_and_in_epochs_that_end_early(tmp_path: Path, at: int) -> None:
    cut = {"max_epochs": 2, "limit_train_batches": 18} if at < 30 else {"max_epochs": 2}
    whole = run(tmp_path / "whole", stream("permuted"), **cut)
    assert run(tmp_path, stream("permuted"), kill=at, **cut) is None
    assert same(whole, run(tmp_path, stream("permuted"), resume=tmp_path / "last.ckpt", **cut))


def test_killed_with_accumulation(tmp_path: Path) -> None:
    def data() -> TaskStream:
        return TaskStream(base=digits(), kind="permuted", num_tasks=3, steps_per_task=6)

    options = {"accumulate_grad_batches": 2}
    whole = run(tmp_path / "whole", data(), **options)
    for at in (6, 8, 14):
        folder = tmp_path / str(at)
        assert run(folder, data(), kill=at, **options) is None
        assert same(whole, run(folder, data(), resume=folder / "last.ckpt", **options))


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    def trained(batch_size: int, **kwargs: Any) -> Any:
        base = Even(batch_size=batch_size)
        torch.manual_seed(0)
        module = gp.Classifier(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        )
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        data = TaskStream(base=base, kind="permuted", num_tasks=2, epochs_per_task=1)
        L.Trainer(max_epochs=1, **quiet, **kwargs).fit(module, data)
        assert data.train_lengths() == [60 // batch_size] * 2
        return module.state_dict()

    one, parts = trained(30), trained(15, accumulate_grad_batches=2)
    # sums of float32 in another order
    assert all(torch.allclose(one[key], parts[key], atol=1e-6) for key in one)


def test_without_the_position_it_is_not_exact(unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    assert run(tmp_path, stream("permuted"), kill=9) is None
    monkeypatch.setattr("gateplug.data.stream_loader.StreamLoader.load_state_dict", lambda self, state: None)
    assert not same(unbroken("permuted"), run(tmp_path, stream("permuted"), resume=tmp_path / "last.ckpt"))


def train_shared(folder: Path, devices: int) -> None:
    """Permuted and class-split digits in a global batch of 20; each process writes what it has."""
    for name in ("permuted", "class_split"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        module = gp.Classifier(net, 10, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
        data = TaskStream(base=Even(batch_size=20 // devices, augment="affine"), **STREAMS[name])
        settings: dict[str, Any] = {"strategy": "ddp", "devices": 2} if devices == 2 else {"devices": 1}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[gp.ExactResume(0)], **settings, **quiet)
        trainer.fit(module, data)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}
        found = {
            "weights": module.state_dict(),
            "lengths": data.train_lengths(),
            "val": metrics,
            "loader": trainer.train_dataloader.state_dict(),
        }
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.save(found, folder / f"{devices}-{rank}-{name}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    two_processes(train_shared, tmp_path)
    train_shared(tmp_path, 1)
    for name in ("permuted", "class_split"):
        one, first, second = (torch.load(tmp_path / f"{who}-{name}.pt", weights_only=True) for who in ("1-0", "2-0", "2-1"))
        assert one["lengths"] == first["lengths"] == second["lengths"]
        assert one["loader"] == first["loader"] == second["loader"]
        for key, weight in one["weights"].items():
            if key.startswith("net."):
                # sums of float32 in another order
                assert torch.allclose(weight, first["weights"][key], atol=1e-6, rtol=0), (name, key)
                assert torch.equal(first["weights"][key], second["weights"][key])
        assert one["val"]["val/accuracy"] == pytest.approx(first["val"]["val/accuracy"])

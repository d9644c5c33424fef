"""Accuracy after every task: the metric by itself and in a Trainer."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

import gateplug as gp
from gateplug.continual.functional import permutation
from tests.ddp import two_processes
from tests.modules import UserModule, loader, trainer

NAN = float("nan")


def filled(R: list[list[float]], b: list[float] | None = None, **kwargs: Any) -> gp.AccuracyMatrix:
    """A metric that has seen a hundred samples for each entry that is not nan."""
    metric = gp.AccuracyMatrix(len(R[0]), None if len(R) == len(R[0]) else len(R), **kwargs)
    for row, values in zip(range(-1, len(R)), [b or [NAN] * len(R[0]), *R], strict=True):
        for task, value in enumerate(values):
            if value == value:
                labels = torch.zeros(100, dtype=torch.long)
                metric.update((torch.arange(100) >= round(100 * value)).long(), labels, task, row)
    return metric


def test_the_figures_are_those_of_the_formulas() -> None:
    R, b, joint = [[0.9, 0.2, 0.1], [0.8, 0.7, 0.3], [0.5, 0.6, 0.8]], [0.1, 0.1, 0.2], [0.95, 0.9, 0.9]
    found = {k: round(float(v), 6) for k, v in filled(R, b, joint=joint).compute().items()}
    assert found == {
        "average_accuracy": round((0.5 + 0.6 + 0.8) / 3, 6),
        "learning_accuracy": 0.8,
        "backward_transfer": round((0.5 - 0.9 + 0.6 - 0.7) / 2, 6),
        "forgetting": round((0.9 - 0.5 + 0.7 - 0.6) / 2, 6),
        "forward_transfer": round((0.2 - 0.1 + 0.3 - 0.2) / 2, 6),
        "intransigence": round((0.95 - 0.9 + 0.9 - 0.7 + 0.9 - 0.8) / 3, 6),
    }


def test_what_was_not_measured_is_left_out() -> None:
    found = filled([[0.9, NAN], [0.8, 0.7]]).compute()
    assert set(found) == {"average_accuracy", "learning_accuracy", "backward_transfer", "forgetting"}
    assert set(filled([[0.9, NAN], [NAN, NAN]]).compute()) == {"average_accuracy", "learning_accuracy"}
    assert gp.AccuracyMatrix(2).compute() == {}


def test_tasks_that_come_again_have_an_average_alone() -> None:
    found = filled([[0.9, NAN], [0.8, 0.7], [0.9, 0.5]]).compute()
    assert list(found) == ["average_accuracy"]
    assert found["average_accuracy"] == pytest.approx(0.7)


def test_a_row_that_is_measured_again_starts_anew_and_missing_labels_do_not_count() -> None:
    metric = filled([[0.5]])
    metric.restart(0)
    metric.update(torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.9, 0.1]]), torch.tensor([1, 1, -100]), 0, 0)
    assert metric.values[1, 0] == 0.5
    assert metric.total[1, 0] == 2


def test_bad_arguments() -> None:
    for arguments, text in (({"tasks": 0}, "at least one"), ({"tasks": 2, "stretches": 0}, "at least one"),
                            ({"tasks": 2, "joint": [0.5]}, "one for each")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            gp.AccuracyMatrix(**arguments)


# ---------------------------------------------------------------------- in a Trainer


def stream(**kwargs: Any) -> gp.TaskStream:
    settings: dict[str, Any] = {"kind": "permuted", "num_tasks": 3, "steps_per_task": 20}
    return gp.TaskStream(base=gp.Digits(batch_size=32), **{**settings, **kwargs})


def classifier() -> gp.Classifier:
    L.seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return gp.Classifier(net, 10, lambda p: torch.optim.Adam(p, lr=3e-3))


class Literal(L.Callback):
    """Measures after each task by hand."""

    def __init__(self, every: int, tasks: int) -> None:
        self.every, self.R = every, torch.full((tasks, tasks), NAN)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.every:
            return
        rows = gp.Digits().dataset("val")[:]
        done = (batch_idx + 1) // self.every
        for task in range(done):
            x = rows["pixel_values"].flatten(1)[:, permutation(0, task, 64)].reshape(-1, 1, 8, 8)
            with torch.no_grad():
                self.R[done - 1, task] = (module(x).argmax(1) == rows["labels"]).double().mean()


def test_the_matrix_is_what_one_measures_by_hand(tmp_path: Path) -> None:
    metrics, literal = gp.ContinualMetrics(), Literal(20, 3)
    logger = TensorBoardLogger(tmp_path, name="run")
    fit = trainer(tmp_path, callbacks=[metrics, literal], max_epochs=1, logger=logger)
    fit.fit(classifier(), stream())
    assert metrics.matrix is not None
    assert torch.allclose(metrics.matrix.values[1:], literal.R.double(), atol=1e-6, equal_nan=True)
    assert float(fit.callback_metrics["continual/average_accuracy"]) == pytest.approx(float(literal.R[-1].mean()), abs=1e-6)
    folder = Path(logger.log_dir)
    lines = list(csv.reader((folder / "accuracy_matrix.csv").open()))
    assert lines[0] == ["", "task 0", "task 1", "task 2"]
    assert lines[-1] == ["after task 2", *(f"{v:.4f}" for v in literal.R[-1].tolist())]
    assert {p.name for p in (folder / "figures").iterdir()} >= {"continual_accuracy_matrix.png", "continual_accuracy.png"}


def test_the_sanity_check_measures_the_untrained_network_and_forward_transfer_follows(tmp_path: Path) -> None:
    fit = trainer(tmp_path, callbacks=[gp.ContinualMetrics()], max_epochs=1, num_sanity_val_steps=-1)
    fit.fit(classifier(), stream(forward=True))
    plug = next(c for c in fit.callbacks if isinstance(c, gp.ContinualMetrics))
    assert plug.matrix is not None
    assert not plug.matrix.values.isnan().any()
    assert "continual/forward_transfer" in fit.callback_metrics


def test_every_second_boundary_and_the_last(tmp_path: Path) -> None:
    metrics = gp.ContinualMetrics(every_task=2)
    trainer(tmp_path, callbacks=[metrics], max_epochs=1).fit(classifier(), stream())
    assert metrics.matrix is not None
    assert (~metrics.matrix.values.isnan()).any(1).tolist() == [True, False, True, True]


def test_a_test_gives_the_accuracy_on_each_task(tmp_path: Path) -> None:
    fit = trainer(tmp_path, callbacks=[gp.ContinualMetrics()], max_epochs=1)
    module, data = classifier(), stream()
    fit.fit(module, data)
    found = fit.test(module, data, verbose=False)[0]
    each = [found[f"continual/test/task{t}/accuracy"] for t in range(3)]
    assert found["continual/test/average_accuracy"] == pytest.approx(sum(each) / 3, abs=1e-6)
    assert found["test/accuracy"] == pytest.approx(sum(each) / 3, abs=1e-6)


def test_a_resumed_run_has_the_same_matrix(tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = gp.ContinualMetrics()
    callbacks = [whole, gp.ExactResume(), steps]
    trainer(tmp_path, callbacks=callbacks, max_epochs=1, enable_checkpointing=True).fit(classifier(), stream())
    for step in (7, 20, 21, 40, 59):
        again = gp.ContinualMetrics()
        resumed = trainer(tmp_path, callbacks=[again, gp.ExactResume()], max_epochs=1)
        resumed.fit(classifier(), stream(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert whole.matrix is not None
        assert again.matrix is not None
        assert torch.equal(whole.matrix.values.nan_to_num(-1), again.matrix.values.nan_to_num(-1)), step


def test_without_a_stream_or_a_validation_set_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(gp.PlugError, match="the data are none"):
        trainer(tmp_path, callbacks=[gp.ContinualMetrics()]).fit(UserModule(), loader())
    data = gp.TaskStream(base=gp.Digits(val_fraction=0.0), kind="permuted", num_tasks=2, steps_per_task=2)
    with pytest.raises(gp.PlugError, match="validation"):
        trainer(tmp_path, callbacks=[gp.ContinualMetrics()], max_epochs=1).fit(classifier(), data)


class Apart(gp.Classifier):
    """Calls single layers in its steps, never the network as a whole."""

    def logits(self, batch: Any) -> Tensor:
        x = next(iter(batch.kwargs.values()))
        for layer in self.net.children():
            x = layer(x)
        return x


def test_a_network_that_is_never_called_as_a_whole_needs_a_function(tmp_path: Path) -> None:
    def apart() -> Apart:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        return Apart(net, 10)

    def predict(module: nn.Module, batch: Any) -> Tensor:
        return module.net(batch["pixel_values"])  # type: ignore[union-attr, operator, no-any-return]

    with pytest.raises(gp.PlugError, match="single layers"):
        trainer(tmp_path, callbacks=[gp.ContinualMetrics()], max_epochs=1).fit(apart(), stream())
    metrics = gp.ContinualMetrics(predict=predict)
    trainer(tmp_path, callbacks=[metrics], max_epochs=1).fit(apart(), stream())
    assert metrics.matrix is not None
    assert not metrics.matrix.values[3].isnan().any()


def measure(folder: Path, devices: int) -> None:
    """Train on one process or two with the same global batch, and write the matrix."""
    metrics = gp.ContinualMetrics()
    settings = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
    data = gp.TaskStream(base=gp.Digits(batch_size=32 // devices), kind="permuted", num_tasks=2, steps_per_task=10)
    fit = trainer(folder, callbacks=[metrics, gp.ExactResume()], max_epochs=1, **settings)
    fit.fit(classifier(), data)
    if fit.is_global_zero:
        assert metrics.matrix is not None
        torch.save({"seen": metrics.matrix.seen}, folder / f"{devices}.pt")


def test_two_processes_count_together(tmp_path: Path) -> None:
    two_processes(measure, tmp_path)
    measure(tmp_path, 1)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True)["seen"] for n in (1, 2))
    assert torch.allclose(one, two, atol=0.012, equal_nan=True)  # two samples of 180: sums in another order

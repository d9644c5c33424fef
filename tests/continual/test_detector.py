"""Contexts that nobody names: the state machine, and the plug in a Trainer."""

from __future__ import annotations

import copy
import csv
import math
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

import gateplug as gp
from gateplug.continual.detection import detection, detector_step, new_state, purity
from tests.ddp import two_processes
from tests.modules import UserModule, loader, trainer

# ---------------------------------------------------------------------- the state machine

losses = st.lists(st.floats(0.01, 10) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=40)


@given(losses, st.integers(2, 6), st.floats(1.1, 3), st.floats(0, 0.8))
@settings(max_examples=60, deadline=None)
def test_a_step_is_pure_and_its_state_stays_in_range(values: list[float], window: int, threshold: float, sure: float) -> None:
    state = new_state()
    for value in values:
        before = copy.deepcopy(state)
        after, event = detector_step(state, value, lambda c: 1.0, window, threshold, sure, 0.3)
        assert state == before
        assert all(0 <= q < 1 for q in after["confidence"])
        assert all(len(held) <= window and all(map(math.isfinite, held)) for held in after["losses"])
        assert (
            len(after["losses"]) == len(after["confidence"]) == len(state["losses"]) + (event is not None and event[0] == "new")
        )
        if not math.isfinite(value):
            assert (after, event) == (before, None)
        state = after


def test_after_an_alarm_the_most_usual_context_goes_on_and_keeps_its_own_loss() -> None:
    state = {"active": 2, "losses": [[1.0] * 5, [2.0] * 5, [0.1] * 5], "confidence": [0.95] * 3}
    after, event = detector_step(state, 5.0, {0: 1.4, 1: 2.1}.__getitem__)
    assert event == ("return", 2, 1)  # 1.05 times its mean, against 1.4
    assert after["losses"] == [[1.0] * 5, [2.0] * 5 + [2.1], [0.1] * 5]
    after, event = detector_step(state, 5.0, {0: 1.6, 1: 3.1}.__getitem__)
    assert event == ("new", 2, 3)
    assert after["losses"][3] == []
    assert after["confidence"][3] == 0


def test_alarms_against_the_truth() -> None:
    found = detection([100, 103, 260, 400], [100, 200, 300], tolerance=70)
    assert found == (2, 1, 2, 30.0)  # 100 at once, 260 sixty batches late; 103 and 400 are false
    assert math.isnan(detection([], [10]).delay)
    assert purity(torch.tensor([[90.0, 10.0], [0.0, 100.0]])) == pytest.approx(0.95)


# ---------------------------------------------------------------------- in a Trainer

SETTINGS: dict[str, Any] = {"threshold": 3.0, "rate": 0.1, "window": 15}


def stream(batch_size: int = 32, **kwargs: Any) -> gp.TaskStream:
    arguments: dict[str, Any] = {"num_tasks": 2, "order": [0, 1, 0], "steps_per_task": 60}
    return gp.TaskStream(base=gp.Digits(batch_size=batch_size), kind="permuted", **{**arguments, **kwargs})


def classifier(seed: int = 0, dropout: float = 0.0) -> gp.Classifier:
    L.seed_everything(seed, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 10))
    return gp.Classifier(net, 10, lambda p: torch.optim.Adam(p, lr=5e-3))


def plugs(**kwargs: Any) -> list[Any]:
    return [gp.GateON(open_share=0.3), gp.ContextDetector(**{**SETTINGS, **kwargs})]


def test_it_finds_a_new_task_and_one_that_comes_again(tmp_path: Path) -> None:
    gateon, detector = plugs()
    logger = TensorBoardLogger(tmp_path, name="run")
    fit = trainer(tmp_path, callbacks=[gateon, detector], max_epochs=1, logger=logger)
    module, data = classifier(), stream()
    fit.fit(module, data)
    assert [(e.step, e.before, e.to, e.kind) for e in detector.events.events] == [(60, 0, 1, "new"), (120, 1, 0, "return")]
    assert detector.events.switches == [60, 120]
    assert detector.events.table().tolist() == [[120, 0], [0, 60]]
    lines = list(csv.reader((Path(logger.log_dir) / "contexts.csv").open()))
    assert lines[0] == ["step", "from", "to", "kind", "loss", "mean", "ratio"]
    assert [line[:4] for line in lines[1:]] == [["60", "0", "1", "new"], ["120", "1", "0", "return"]]
    board = EventAccumulator(logger.log_dir)
    board.Reload()
    scalars = {name: board.Scalars(name)[-1].value for name in board.Tags()["scalars"] if name.startswith("continual/detector")}
    assert scalars == {
        "continual/detector/hits": 2, "continual/detector/misses": 0, "continual/detector/false_alarms": 0,
        "continual/detector/delay": 0, "continual/detector/purity": 1,
    }  # fmt: skip
    assert "continual/contexts/text_summary" in board.Tags()["tensors"]
    found = fit.test(module, data, verbose=False)[0]
    assert found["continual/test/context_accuracy"] == 1
    assert found["test/accuracy"] > 0.85
    named = gp.GateON(open_share=0.3)
    told = classifier()
    trainer(tmp_path, callbacks=[named], max_epochs=1).fit(told, stream())
    assert all(torch.equal(a, b) for a, b in zip(module.net.parameters(), told.net.parameters(), strict=True)), (
        "found at once, it trains as if it had been told"
    )


def test_trying_contexts_leaves_no_trace(tmp_path: Path) -> None:
    # with two optimizer steps a batch's metrics would count twice, and dropout would go on from elsewhere
    module = classifier(dropout=0.2)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(int(pl_module.train_accuracy._update_count))

    trainer(tmp_path, callbacks=[*plugs(), Watch(), gp.ExactResume()], max_epochs=1).fit(module, stream())
    assert seen == list(range(1, 181))


def test_weights_stand_still_while_patience_waits(tmp_path: Path) -> None:
    gateon, detector = plugs(patience=3)
    weights = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            weights[batch_idx] = {k: v.clone() for k, v in pl_module.state_dict().items() if k.startswith("net.")}

    trainer(tmp_path, callbacks=[gateon, detector, Watch()], max_epochs=1).fit(classifier(), stream(order=[0, 1]))
    assert [(e.step, e.kind) for e in detector.events.events] == [(62, "new")]
    assert all(torch.equal(weights[59][k], weights[61][k]) for k in weights[59])
    assert not all(torch.equal(weights[61][k], weights[62][k]) for k in weights[61])


def test_with_accumulation_a_window_is_decided_at_its_start(tmp_path: Path) -> None:
    gateon, detector = plugs()
    data = stream(16, order=[0, 1], steps_per_task=120)
    trainer(tmp_path, callbacks=[gateon, detector], max_epochs=1, accumulate_grad_batches=2).fit(classifier(), data)
    assert [(e.step, e.kind) for e in detector.events.events] == [(122, "new")]  # by the loss of the window before


def test_a_resumed_run_notices_the_same(tmp_path: Path) -> None:
    def run(extra: list[Any], **kwargs: Any) -> tuple[gp.Classifier, gp.ContextDetector]:
        module, (gateon, detector) = classifier(dropout=0.05), plugs()
        callbacks = [gateon, detector, gp.ExactResume(), *extra]
        trainer(tmp_path, callbacks=callbacks, max_epochs=1, enable_checkpointing=True).fit(module, stream(), **kwargs)
        return module, detector

    whole, heard = run([ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)])
    assert [e.kind for e in heard.events.events] == ["new", "return"]
    for step in (59, 60, 61, *random.Random(0).sample(range(1, 180), 4)):
        resumed, again = run([], ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert again.events.events == heard.events.events
        assert again.state == heard.state
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)), step


@pytest.mark.parametrize("how", [{"score": lambda logits: -logits.softmax(-1).amax(-1)}, {"labelled": 4}])
def test_other_ways_to_choose_at_test(how: dict[str, Any], tmp_path: Path) -> None:
    module, data = classifier(), stream()
    fit = trainer(tmp_path, callbacks=plugs(**how), max_epochs=1)
    fit.fit(module, data)
    assert fit.test(module, data, verbose=False)[0]["continual/test/context_accuracy"] == 1


def test_a_module_of_ones_own_and_one_context_too_many(tmp_path: Path) -> None:
    class Own(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["pixel_values"].squeeze(1)), batch["labels"])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    L.seed_everything(0, verbose=False)
    gateon, detector = gp.GateON(contexts=1), gp.ContextDetector(window=10, threshold=1.2, rate=0.9)
    with pytest.raises(gp.PlugError, match="context 1 would be one too many"):
        trainer(tmp_path, callbacks=[gateon, detector], max_epochs=1).fit(Own(), stream())


def test_it_needs_a_gateon_before_it(tmp_path: Path) -> None:
    for callbacks in ([gp.ContextDetector()], [gp.ContextDetector(), gp.GateON()]):
        with pytest.raises(gp.PlugError, match="put GateON before ContextDetector"):
            trainer(tmp_path, callbacks=callbacks).fit(UserModule(), loader())


def notice(folder: Path, devices: int) -> None:
    """Train on one process or two with the same global batch, and write what was noticed."""
    gateon, detector = plugs()
    strategy = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
    fit = trainer(folder, callbacks=[gateon, detector, gp.ExactResume()], max_epochs=1, **strategy)
    fit.fit(classifier(), stream(32 // devices))
    torch.save({"events": [list(e[:4]) for e in detector.events.events]}, folder / f"{devices}.{fit.global_rank}.pt")


def test_two_processes_notice_together(tmp_path: Path) -> None:
    two_processes(notice, tmp_path)
    notice(tmp_path, 1)
    found = [torch.load(tmp_path / f"{name}.pt", weights_only=True)["events"] for name in ("1.0", "2.0", "2.1")]
    assert found[0] == found[1] == found[2]
    assert [kind for *_, kind in found[0]] == ["new", "return"]


def test_a_step_that_takes_no_number_is_tried_as_well(tmp_path: Path) -> None:
    class Bare(gp.Classifier):
        def test_step(self, batch: Any) -> None:  # type: ignore[override]
            super().test_step(batch, 0)

    L.seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    module, data = Bare(net, 10, lambda p: torch.optim.Adam(p, lr=5e-3)), stream(order=[0, 1])
    fit = trainer(tmp_path, callbacks=plugs(), max_epochs=1)
    fit.fit(module, data)
    assert fit.test(module, data, verbose=False)[0]["continual/test/context_accuracy"] == 1

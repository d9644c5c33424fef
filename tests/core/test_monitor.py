"""GateMonitor: what it writes, when, and that it is right."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import gateplug as gp
from gateplug.core.figure import heat_map
from gateplug.core.gate import Gate, Openness
from tests.modules import UserModule, digits, loader, trainer
from tests.plugs import ToyPlug, UnitGate


def board(tmp_path: Path, *plugs: gp.Plug, **settings: object) -> tuple[UserModule, EventAccumulator]:
    logger = TensorBoardLogger(tmp_path, name="run")
    module = UserModule(lr=0.0)
    trainer(tmp_path, callbacks=list(plugs), logger=logger, log_every_n_steps=1, **settings).fit(module, loader(shuffle=False))
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    return module, events


def test_scalars_histograms_and_heat_maps_stand_under_room_and_layer(tmp_path: Path) -> None:
    _, events = board(tmp_path, gp.ReplaceFFN("swiglu"), ToyPlug(), gp.GateMonitor(3))
    tags = events.Tags()
    for quantity in ("openness_mean", "openness_min", "openness_max", "saturation"):
        assert f"glu/net.blocks.0.fc1/{quantity}" in tags["scalars"]
        assert f"toy/net.blocks.1.fc2.gate/{quantity}" in tags["scalars"]
    assert "glu/net.blocks.0.fc1/openness" in tags["histograms"]
    assert {"glu/glu_gates", "toy/toy_gates"} <= set(tags["images"])
    steps = [e.step for e in events.Scalars("glu/net.blocks.0.fc1/openness_mean")]
    assert steps == [2, 5, 8, 11, 14], "every third of 16 batches, counted as Lightning counts"
    assert set(steps) <= {e.step for e in events.Scalars("loss")}
    assert {e.step for e in events.Images("glu/glu_gates")} == {5, 14}, "after epochs 1 and 2, of the last look"
    assert (tmp_path / "run/version_0/figures/glu_gates.png").stat().st_size > 5000


def test_an_epoch_shorter_than_the_interval_is_looked_at_on_its_last_batch(tmp_path: Path) -> None:
    _, events = board(tmp_path, gp.ReplaceFFN("swiglu"), gp.GateMonitor(1000))
    assert [e.step for e in events.Scalars("glu/net.blocks.0.fc1/openness_mean")] == [7, 15]


def test_a_run_that_max_steps_ends_is_looked_at_on_its_last_batch(tmp_path: Path) -> None:
    _, events = board(tmp_path, gp.ReplaceFFN("swiglu"), gp.GateMonitor(1000), max_steps=3)
    assert [e.step for e in events.Scalars("glu/net.blocks.0.fc1/openness_mean")] == [2]
    assert (tmp_path / "run/version_0/figures/glu_gates.png").exists()


def test_values_are_the_means_over_the_batch(tmp_path: Path) -> None:
    # lr 0: the gates of the last batch can be computed afterwards
    module, events = board(tmp_path, gp.ReplaceFFN("swiglu"), gp.GateMonitor(1), max_epochs=1)
    x = digits(64)[56:64][0]
    block = module.net.blocks[0]
    z = block.fc1.gate(block.norm(module.net.embed(x)))
    share = torch.sigmoid(z).flatten(0, 1).mean(0)
    last = {q: events.Scalars(f"glu/net.blocks.0.fc1/{q}")[-1].value for q in ("openness_mean", "openness_min", "openness_max")}
    assert last["openness_mean"] == pytest.approx(float(share.mean()), abs=1e-5)
    assert last["openness_min"] == pytest.approx(float(share.min()), abs=1e-5)
    assert last["openness_max"] == pytest.approx(float(share.max()), abs=1e-5)


def test_a_bilinear_layer_has_no_gate_and_no_gates_are_warned_of(tmp_path: Path) -> None:
    _, events = board(tmp_path, gp.ReplaceFFN("bilinear"), gp.GateMonitor(2))
    assert not [t for t in events.Tags()["scalars"] if t.startswith("glu/")]
    with pytest.warns(UserWarning, match="finds no gates"):
        trainer(tmp_path, callbacks=[gp.GateMonitor()], max_steps=1).fit(UserModule(), loader())


def test_a_fast_dev_run_writes_no_figure(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[gp.ReplaceFFN(), gp.GateMonitor(1)], fast_dev_run=True).fit(UserModule(), loader())
    assert not list(tmp_path.rglob("*.png"))


class Experts(Gate):
    """A gate with two axes, tasks by experts."""

    room = "toy"
    axes = ("task", "expert")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recording:
            self.record(torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]).expand(len(x), 2, 3))
        return x


def test_a_gate_with_two_axes_gets_a_heat_map_of_its_own(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    module = UserModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Experts()))
    trainer(tmp_path, callbacks=[gp.GateMonitor(2)], logger=logger, max_epochs=1).fit(module, loader())
    assert (tmp_path / "run/version_0/figures/toy_net.2.png").exists()


def test_a_recording_gate_is_averaged_until_it_is_reset() -> None:
    gate = UnitGate(3, 0.0)
    assert gate.openness() is None
    gate.record(torch.tensor([[0.0, 0.5, 1.0]]))
    gate.record(torch.tensor([[1.0, 0.5, 1.0]]))
    openness = gate.openness()
    assert isinstance(openness, Openness)
    assert openness.values.tolist() == [0.5, 0.5, 1.0]
    gate.reset()
    assert gate.openness() is None


class Known(Gate):
    """A gate whose openness is known."""

    room = "toy"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recording:
            self.record(torch.tensor([0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0, 0.3]).expand(len(x), -1))
        return x


def test_saturation_is_the_share_of_units_near_an_end(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    module = UserModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Known()))
    trainer(tmp_path, callbacks=[gp.GateMonitor(2)], logger=logger, max_epochs=1).fit(module, loader())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Scalars("toy/net.2/saturation")[-1].value == 0.5
    assert events.Scalars("toy/net.2/openness_mean")[-1].value == pytest.approx(3.8 / 8)


@pytest.mark.parametrize("kind", ["reentrant", "nonreentrant"])
def test_a_layer_that_is_recomputed_is_seen_once(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    logger = TensorBoardLogger(tmp_path / "b", name="run")
    module = UserModule(lr=0.0, checkpointing=kind)
    rows: list[int] = []

    class Count(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            rows.append(pl_module.net.blocks[0].fc1._rows)

    plugs = [gp.ReplaceFFN("swiglu"), Count(), gp.GateMonitor(1)]
    trainer(tmp_path, callbacks=plugs, logger=logger).fit(module, loader(shuffle=False))
    assert set(rows) == {8 * 8}, "8 samples of 8 tokens"


def test_heat_map_shows_rows_of_different_length() -> None:
    figure = heat_map({"a": torch.rand(5), "b": torch.rand(3)}, "title", "unit")
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (2, 5)
    assert image.mask[1].tolist() == [False, False, False, True, True]

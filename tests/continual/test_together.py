"""EWC, SI, MAS and replay beside the other plugs, on a stream, where they have something to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

import gateplug as gp
from gateplug.continual.ewc import EWC
from gateplug.continual.mas import MAS
from gateplug.continual.replay import Replay
from gateplug.continual.synaptic_intelligence import SynapticIntelligence
from tests.continual.stream import SIZES, PermutedDigits
from tests.continual.test_per_sample import bert
from tests.continual.test_replay import Texts
from tests.modules import BACKEND, UserModule, answers, digits, trainer
from tests.plugs import ToyPlug

OURS: dict[str, Callable[[], list[Any]]] = {
    "EWC": lambda: [EWC(10.0, samples=20)],
    "SI": lambda: [SynapticIntelligence(1.0)],
    "MAS": lambda: [MAS(1.0, samples=20)],
    "ER": lambda: [Replay(20)],
    "DER++": lambda: [Replay(20, kind="der++")],
    "MAS+SI+DER++": lambda: [MAS(1.0, samples=20), SynapticIntelligence(1.0), Replay(20, kind="der++")],
}
OTHERS: dict[str, Callable[[], list[Any]]] = {
    "ReplaceFFN+GateMonitor": lambda: [gp.ReplaceFFN("geglu"), gp.GateMonitor(every_n_steps=1)],
    "ReplaceActivation": lambda: [gp.ReplaceActivation(nn.ReLU, gp.TemperedSigmoid(trainable=True))],
    "Upcycle": lambda: [gp.Upcycle(experts=4, k=2)],
    "RegulateRouters+ExpertMonitor": lambda: [
        gp.Upcycle(experts=4, k=2),
        gp.RegulateRouters(load_balance=0.05, z_loss=0.05),
        gp.ExpertMonitor(every_n_steps=1),
    ],
    "EarlyExit": lambda: [gp.EarlyExit(cost_weight=0.1, freeze_backbone=False, warmup_epochs=0, every=1, latency=())],
    "ToyPlug": lambda: [ToyPlug()],
}
SINGLE = [name for name in OURS if "+" not in name.rstrip("+")]
PAIRS = [(a, b) for a in SINGLE for b in OTHERS if not (b == "EarlyExit" and "ER" in a)]
PAIRS += [("MAS+SI+DER++", "ToyPlug"), ("MAS+SI+DER++", "RegulateRouters+ExpertMonitor")]


class Rows(UserModule):
    """Takes the stream's flat digits as rows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return super().training_step((x.view(-1, 8, 8), y), batch_idx)


def run(plugs: list[Any], tmp: Path, logger: Any = False, **kwargs: Any) -> Rows:
    L.seed_everything(1, verbose=False)
    module = Rows(lr=0.05, dropout=0.1)
    steps = ModelCheckpoint(tmp, "{step}", every_n_train_steps=9, save_top_k=-1)
    t = trainer(tmp, callbacks=[*plugs, gp.ExactResume(), steps], enable_checkpointing=True, max_epochs=1, logger=logger)
    t.fit(module, datamodule=PermutedDigits(**SIZES), **kwargs)
    return module


@pytest.mark.parametrize(("ours", "others"), PAIRS, ids=["+".join(p) for p in PAIRS])
def test_together_they_train_resume_load_and_fold(ours: str, others: str, tmp_path: Path) -> None:
    first = PAIRS.index((ours, others)) % 2 == 0

    def plugs() -> list[Any]:
        mine, rest = OURS[ours](), OTHERS[others]()
        return [*mine, *rest] if first else [*rest, *mine]

    whole = run(plugs(), tmp_path)
    resumed = run(plugs(), tmp_path, ckpt_path=tmp_path / "step=9.ckpt", weights_only=True)
    for name, t in whole.state_dict().items():
        assert torch.equal(t, resumed.state_dict()[name]), name
    x = digits(4)[:][0]
    loaded = gp.load(tmp_path / "step=18.ckpt", Rows(dropout=0.1), register=[ToyPlug])
    with torch.no_grad():
        expected: Tensor = whole.eval()(x)
        assert torch.equal(loaded(x), expected)
        assert torch.allclose(answers(gp.fold(whole), x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["reentrant", "nonreentrant"])
@pytest.mark.parametrize("ours", ["ER", "MAS+SI+DER++"])
def test_activation_checkpointing_gives_the_same_weights(ours: str, kind: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (None, kind):
        L.seed_everything(1, verbose=False)
        module = Rows(lr=0.05, checkpointing=checkpointing)
        trainer(tmp_path, callbacks=OURS[ours](), max_epochs=1).fit(module, datamodule=PermutedDigits(**SIZES))
        found.append(module.state_dict())
    assert all(torch.allclose(t, found[1][name], rtol=0, atol=1e-6) for name, t in found[0].items())


def test_a_compiled_network_trains_and_is_measured(tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        L.seed_everything(1, verbose=False)
        module = Rows(lr=0.05)
        if compiled:
            module.net.compile(backend=BACKEND)
        plugs = OURS["MAS+SI+DER++"]()
        data = PermutedDigits(**{**SIZES, "steps": 2, "tasks": 2})
        trainer(tmp_path, callbacks=plugs, max_epochs=1).fit(module, datamodule=data)
        found.append(module.state_dict() | {f"importance of {n}": t for n, t in plugs[0].penalty.importance.items()})
    assert all(torch.allclose(t, found[1][name], rtol=1e-4, atol=1e-5) for name, t in found[0].items())


class Book(Logger):
    """Writes down what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int | None, str, float]] = []

    @property
    def name(self) -> str:
        return "book"

    version = name

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.written += [(step, k, float(v)) for k, v in metrics.items() if not k.startswith(("continual", "epoch"))]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """None."""


@pytest.mark.parametrize("others", OTHERS)
def test_measuring_disturbs_nobody(others: str, tmp_path: Path) -> None:
    """With weight 0 importance is measured, and weights and all that others log are those of a run without it."""
    found = []
    for ours in ([], [EWC(0.0, samples=20), MAS(0.0, samples=20), SynapticIntelligence(0.0)]):
        book = Book()
        module = run([*ours, *OTHERS[others]()], tmp_path, logger=book)
        found.append((module, book.written))
    for name, t in found[0][0].state_dict().items():
        assert torch.equal(t, found[1][0].state_dict()[name]), name
    assert found[0][1] == found[1][1]
    assert ours[0].penalty.tasks == 3


class Reads(L.LightningModule):
    """A Hugging Face classifier of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bert()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("ours", ["EWC", "ER", "DER++"])
def test_padded_texts_and_routers(ours: str, tmp_path: Path) -> None:
    """Replayed texts are of other lengths than the running ones: routers leave out the padding of each."""
    regulate = gp.RegulateRouters(load_balance=0.05, z_loss=0.05)
    plugs = [gp.Upcycle(experts=4, k=2), regulate, *OURS[ours]()]
    module = Reads()
    trainer(tmp_path, callbacks=plugs, max_epochs=1).fit(module, datamodule=Texts())
    assert all(p.isfinite().all() for p in module.parameters())

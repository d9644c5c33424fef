"""Every pair of plugs trains together, or is refused with an error that says why."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import gateplug as gp
from tests.composition import CELLS, TOGETHER
from tests.conformance import CASES
from tests.continual.streamed import Streamed
from tests.modules import UserModule, answers, digits, loader, trainer
from tests.plugs import ToyPlug

ROUTED = {"RegulateRouters", "ExpertMonitor"}
"""Plugs that need a router in the model."""
STREAM = {"ContinualMetrics", "HeadMask", "EWC", "SynapticIntelligence", "MAS", "Replay"}
"""Plugs that follow a stream of tasks."""
GATED = {"ReplaceFFN", "Upcycle", "ToyPlug", "GateON", "ContextDetector", "EarlyExit", "HeadMask", *ROUTED}
"""Plugs that bring gates, or come with one that does."""
PAIRS = [tuple(sorted(pair)) for pair in combinations(CASES, 2)]


def make(pair: tuple[str, str]) -> list[Any]:
    """Both plugs under test, last; before them what they need in order to have something to do."""
    before: list[Any] = []
    if STREAM & set(pair):
        before.append(Streamed(validate="ContinualMetrics" in pair))
    if "ContextDetector" in pair and not set(pair) & {"GateON", *gp.GateON.refuses}:
        before.append(gp.GateON(contexts=3, layers="net.embed", others="free"))
    if "GateMonitor" in pair and not GATED & set(pair):
        before.append(ToyPlug())
    return [*before, *(CASES[name].plug() for name in pair)]


def module(pair: tuple[str, str], **kwargs: Any) -> UserModule:
    """A user's module, with a mixture in it where a plug looks for routers."""
    return UserModule(mixture=bool(ROUTED & set(pair)) and "Upcycle" not in pair, **kwargs)


def test_every_pair_has_a_cell() -> None:
    assert {frozenset(p) for p in PAIRS} == set(CELLS), "declare the new plug's cells in tests/composition.py"


def orders(pair: tuple[str, str]) -> dict[tuple[str, str], str]:
    """Both orders of a pair, and what the cell says of each: together, wrong order, or refused.

    Where one of two plugs that go together changes nothing in the model, one order stands for both.
    """
    cell = CELLS[frozenset(pair)]
    if cell == TOGETHER:
        both = all(CASES[name].plug().attaches for name in pair)
        return {pair: TOGETHER, **({pair[::-1]: TOGETHER} if both else {})}
    if cell.startswith(TOGETHER):
        first = cell.removeprefix(f"{TOGETHER}, ").removesuffix(" first")
        return {p: TOGETHER if p[0] == first else "wrong order" for p in (pair, pair[::-1])}
    return {pair: "refused", pair[::-1]: "refused"}


ORDERS = {p: cell for pair in PAIRS for p, cell in orders(pair).items()}


@pytest.mark.parametrize("pair", [p for p, cell in ORDERS.items() if cell == TOGETHER], ids="+".join)
def test_together_they_train_resume_and_fold(pair: tuple[str, str], tmp_path: Path) -> None:
    def run(**kwargs: Any) -> UserModule:
        L.seed_everything(1, verbose=False)
        trained = module(pair, lr=0.05, dropout=0.1)
        steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        plugs = [*make(pair), gp.ExactResume(), steps]
        trainer(tmp_path, callbacks=plugs, enable_checkpointing=True).fit(trained, loader(), **kwargs)
        return trained

    whole = run()
    resumed = run(ckpt_path=tmp_path / "step=5.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    x = digits(4)[:][0]
    with torch.no_grad():
        assert torch.allclose(answers(gp.fold(whole), x), whole.eval()(x), atol=1e-6)


@pytest.mark.parametrize("pair", [p for p, cell in ORDERS.items() if cell != TOGETHER], ids="+".join)
def test_refused_pairs_and_orders_say_why_and_lose_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    user = module(pair)
    names = list(user.state_dict())
    *before, first, second = make(pair)
    with pytest.raises(gp.PlugError) as caught:
        trainer(tmp_path, callbacks=[*before, first, second]).fit(user, loader())
    assert type(first).__name__ in str(caught.value)
    assert type(second).__name__ in str(caught.value)
    if ORDERS[pair] == "wrong order":
        assert f"put {pair[1]} before {pair[0]}" in str(caught.value)
    first.detach(user)
    assert list(user.state_dict()) == names


def test_the_two_replacing_plugs_go_together_on_different_layers(tmp_path: Path) -> None:
    module = UserModule()
    module.net.embed = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    plugs = [gp.ReplaceFFN("swiglu"), gp.ReplaceActivation(nn.ReLU, layers="net.embed")]
    trainer(tmp_path, callbacks=plugs).fit(module, loader())
    assert list(plugs[1].describe(module)) == ["net.embed.1"]


def test_the_same_plug_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ReplaceFFN`"):
        trainer(tmp_path, callbacks=[gp.ReplaceFFN("swiglu"), gp.ReplaceFFN("geglu")]).fit(UserModule(), loader())


def test_a_run_that_fails_before_its_first_batch_leaves_the_model_bare(tmp_path: Path) -> None:
    module = UserModule()
    attributes = set(module.__dict__)
    with pytest.raises(gp.PlugError):
        trainer(tmp_path, callbacks=[gp.ReplaceFFN("swiglu"), gp.ReplaceActivation(nn.GELU)]).fit(module, loader())
    assert list(module.state_dict()) == list(UserModule().state_dict())
    assert not (set(module.__dict__) - attributes) & {"on_save_checkpoint", "on_load_checkpoint", "training_step"}
    trainer(tmp_path, callbacks=[gp.ReplaceFFN("geglu")], max_steps=1).fit(module, loader())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("copies", [StochasticWeightAveraging, EMAWeightAveraging])
def test_averaged_copies_of_the_model_have_the_plugs(copies: Any, late: bool, tmp_path: Path) -> None:
    class Metrics(UserModule):
        def setup(self, stage: str) -> None:
            self.ready = True

    def made() -> Any:
        return copies(swa_lrs=0.01) if copies is StochasticWeightAveraging else copies()

    module = Metrics() if late else UserModule()
    trainer(tmp_path, callbacks=[gp.ReplaceFFN("swiglu"), made()]).fit(module, loader())
    assert "net.blocks.0.fc1.gate.weight" in module.state_dict()
    with pytest.raises(gp.PlugError, match="put ReplaceFFN before it"):
        trainer(tmp_path, callbacks=[made(), gp.ReplaceFFN("swiglu")]).fit(UserModule(), loader())


def test_a_plug_that_refuses_another_says_why(tmp_path: Path) -> None:
    class Shy(ToyPlug):
        refuses = {"GateMonitor": "it does not like to be looked at"}  # noqa: RUF012

    with pytest.raises(gp.PlugError, match="Shy cannot be used with GateMonitor: it does not like"):
        trainer(tmp_path, callbacks=[Shy(), gp.GateMonitor()]).fit(UserModule(), loader())


def test_two_plugs_of_a_kind_on_different_layers(tmp_path: Path) -> None:
    plugs = [gp.ReplaceFFN("swiglu", layers="net.blocks.0"), gp.ReplaceFFN("geglu", layers="net.blocks.1")]
    module = UserModule()
    t = trainer(tmp_path, callbacks=plugs)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "two.ckpt")
    assert [m.activation for m in module.modules() if hasattr(m, "activation")] == ["silu", "gelu"]
    loaded = gp.load(tmp_path / "two.ckpt", UserModule())
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), loaded.state_dict().values(), strict=True))

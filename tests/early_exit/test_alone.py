"""A folded network with exits, and the programs that it becomes: both answer as the runner does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.errors import PlugError
from gateplug.early_exit.branch import ExitBranch
from tests.early_exit.nets import NETS, Stacked, run
from tests.early_exit.test_runner import with_exits
from tests.modules import UserModule, vit


def call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), batch) if isinstance(batch, dict) else (batch, {})


def mixed(name: str) -> tuple[nn.Module, gp.ExitRunner, float]:
    """A network whose samples leave at several exits, and the threshold at which they do."""
    net = with_exits(name, seed=1)
    scores = torch.cat([gp.ExitRunner(net).everything(*call(NETS[name][1](6))[0], **call(NETS[name][1](6))[1])[1].flatten()])
    threshold = float(scores.quantile(0.6)) + 1e-4
    return net, gp.ExitRunner(net, threshold=threshold), threshold


@pytest.mark.parametrize("name", NETS)
def test_a_folded_network_is_a_runner_without_hooks(name: str) -> None:
    net, runner, threshold = mixed(name)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    plain = gp.fold(net)
    assert isinstance(plain, gp.ExitRunner)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert not any(isinstance(m, ExitBranch) for m in plain.net.modules()), "the exits stand beside the network"
    assert plain.threshold == 0.5, "as it was trained"
    plain = gp.ExitRunner(plain, threshold=threshold)
    for rows in (6, 1):
        batch = NETS[name][1](rows)
        got, want = run(plain, batch), run(runner, batch)
        assert torch.equal(got.exit, want.exit)
        assert torch.allclose(got.logits, want.logits, atol=1e-6)
    again = run(copy.deepcopy(plain), batch)
    assert torch.equal(again.logits, got.logits)
    assert len(list(plain.parameters())) == len(list(net.parameters()))
    same = (torch.allclose(before[k], v, equal_nan=True) for k, v in net.state_dict().items())
    assert all(same), "what is folded stays as it is"


def test_exits_are_folded_with_the_module_around_the_network_or_without_it() -> None:
    class Around(UserModule):
        """A buffer beside the network, so that the forward of the module stays."""

        def __init__(self) -> None:
            super().__init__(vit())
            self.register_buffer("mean", torch.tensor(0.25))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x - self.mean).logits

    x = torch.randn(5, 1, 8, 8)
    for module in (UserModule(vit()), Around()):
        gp.EarlyExit(threshold=0.52).attach(module)
        module.eval()
        got = gp.fold(module)(x if type(module) is UserModule else x - 0.25)
        assert torch.allclose(got.logits, gp.ExitRunner(module)(x if type(module) is UserModule else x - 0.25).logits, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_programs_of_stages_answer_as_the_runner(name: str, tmp_path: Path) -> None:
    net, runner, _ = mixed(name)
    runner.export(tmp_path / "stages", *call(NETS[name][1](4)))
    programs = gp.ExitPrograms(tmp_path / "stages")
    torch.manual_seed(3)
    for rows in (7, 1, 4):
        batch = NETS[name][1](rows)
        got, want = run(programs, batch), run(runner, batch)
        assert torch.equal(got.exit, want.exit)
        assert torch.allclose(got.logits, want.logits, atol=1e-5)
    last = run(gp.ExitPrograms(tmp_path / "stages", threshold=float("inf")), batch)
    assert torch.allclose(last.logits, run(gp.ExitRunner(net, threshold=2.0), batch).logits, atol=1e-5)


def test_no_program_is_run_that_nobody_needs_and_none_holds_weights_of_another(tmp_path: Path) -> None:
    net, runner, _ = mixed("bert")
    batch = NETS["bert"][1](4)
    runner.export(tmp_path, kwargs=batch)
    programs = gp.ExitPrograms(tmp_path, threshold=0.0)
    for name in ("exit1", "end"):
        programs.programs[name] = None  # type: ignore[assignment]
    assert programs(**batch).exit.tolist() == [0] * 4
    weights = [set(torch.export.load(tmp_path / f"{name}.pt2").state_dict) for name in ("start", "exit0", "exit1", "end")]
    numbers = [sum(v.numel() for v in torch.export.load(p).state_dict.values()) for p in sorted(tmp_path.glob("*.pt2"))]
    assert all(weights)
    assert sum(numbers) <= sum(p.numel() for p in net.parameters()) + 100
    told = json.loads((tmp_path / "exits.json").read_text())
    assert told["gate"] == "jei"
    assert told["threshold"] == runner.threshold


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "stacked"])
def test_programs_in_onnx(name: str, tmp_path: Path) -> None:
    _, runner, _ = mixed(name)
    args, kwargs = call(NETS[name][1](4))
    runner.export(tmp_path / "stages", args, kwargs, form="onnx")
    programs = gp.ExitPrograms(tmp_path / "stages")
    for rows in (6, 1):
        batch = NETS[name][1](rows)
        got, want = run(programs, batch), run(runner, batch)
        assert torch.equal(got.exit, want.exit)
        assert torch.allclose(got.logits, want.logits, atol=1e-4)


def test_what_cannot_be_exported_is_told(tmp_path: Path) -> None:
    net = with_exits("stacked")
    runner = gp.ExitRunner(net)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="holds something already"):
        runner.export(tmp_path / "full", NETS["stacked"][1](4))
    with pytest.raises(ValueError, match="must be one of pt2, onnx"):
        runner.export(tmp_path / "a", NETS["stacked"][1](4), form="tflite")
    with pytest.raises(ValueError, match="two samples or more"):
        runner.export(tmp_path / "b", NETS["stacked"][1](1))
    with pytest.raises(FileNotFoundError, match=r"holds no exits\.json"):
        gp.ExitPrograms(tmp_path)

    class Asks(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x) * (1.0 if x.sum().item() > 0 else 2.0)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    asks = Asks()
    gp.EarlyExit().attach(asks)
    with pytest.raises(PlugError, match="start does not export"):
        gp.ExitRunner(asks).export(tmp_path / "c", NETS["stacked"][1](4))
    assert not (tmp_path / "c").exists(), "nothing half written stays"
    runner.export(tmp_path / "d", NETS["stacked"][1](4))
    with pytest.raises(ValueError, match="call them as in the export's example"):
        gp.ExitPrograms(tmp_path / "d")(x=torch.randn(2, 5, 6))

"""Attached parameters in a group of their own, under every scheduler, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler as schedules

import gateplug as gp
from gateplug.core.optim import Claim, GroupOptions, check_trained, grouping, split_group
from tests.modules import UserModule, loader, trainer
from tests.plugs import ToyPlug

STEPS = 16
SCHEDULES = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda s: 1 / (1 + s)),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=STEPS),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, STEPS),
    "SequentialLR": lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o, 0.5, 4), schedules.ExponentialLR(o, 0.9)], [4]),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


class Scheduled(UserModule):
    def __init__(self, name: str, optimizer: Any = torch.optim.AdamW, interval: str = "step") -> None:
        super().__init__()
        self.name, self.optimizer, self.interval = name, optimizer, interval

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=0.01)
        schedule = SCHEDULES[self.name](optimizer)
        plateau = {"monitor": "loss" if self.interval == "step" else "val_loss", "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **plateau}}


class Updates(L.Callback):
    """Notes base lr of both groups, and the lr that the update itself used."""

    def __init__(self) -> None:
        self.base: list[list[float]] = []
        self.used: list[list[float]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = trainer.optimizers[0]
        inner = optimizer._optimizer_step_post_hooks
        note = lambda o, a, k: self.used.append([g["lr"] for g in o.param_groups])  # noqa: E731
        optimizer.register_step_post_hook(note)
        inner.move_to_end(next(reversed(inner)), last=False)  # before the factor is taken back

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.base.append([g["lr"] for g in optimizer.param_groups])


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_scheduler_drives_the_group_and_the_factor_acts_on_the_update_alone(name: str, tmp_path: Path) -> None:
    seen = Updates()
    t = trainer(tmp_path, callbacks=[ToyPlug(lr_scale=0.5), seen])
    t.fit(Scheduled(name, interval="step"), loader(), loader(shuffle=False))
    assert len(seen.used) == STEPS
    assert all(a == b for a, b in seen.base)
    assert all(b == pytest.approx(0.5 * a) for a, b in seen.used)
    assert len({a for a, _ in seen.used}) > 3, "the scheduler did not move"
    own = t.optimizers[0].param_groups[1]
    assert own["weight_decay"] == 0.0
    assert t.optimizers[0].param_groups[0]["weight_decay"] == 0.01
    assert {tuple(p.shape) for p in own["params"]} == {(16,)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_group_and_scheduler_resume_bit_exact(name: str, tmp_path: Path) -> None:
    def run(**kwargs: Any) -> nn.Module:
        L.seed_everything(1, verbose=False)
        # Lightning steps a plateau scheduler of interval "step" after checkpoints are written: by epochs it can be exact
        module = Scheduled(name, interval="epoch" if name == "ReduceLROnPlateau" else "step")
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        t = trainer(tmp_path, callbacks=[ToyPlug(lr_scale=3.0), gp.ExactResume(), keep], enable_checkpointing=True)
        t.fit(module, loader(), loader(shuffle=False), **kwargs)
        return module

    a, b = run(), run(ckpt_path=tmp_path / "step=5.ckpt", weights_only=True)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
def test_several_kinds_of_optimizers(optimizer: Any, tmp_path: Path) -> None:
    t = trainer(tmp_path, callbacks=[ToyPlug()], max_epochs=1)
    t.fit(Scheduled("LambdaLR", optimizer), loader())
    assert len(t.optimizers[0].param_groups) == 2


def test_a_list_of_the_users_length_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Lists(UserModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [schedules.LambdaLR(optimizer, [lambda s: 1.0])]

    with pytest.raises(gp.PlugError, match="one value more"):
        trainer(tmp_path, callbacks=[ToyPlug()]).fit(Lists(), loader())


def test_groups_as_lists_pairs_and_dicts_are_split() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    claims = [Claim("Toy", GroupOptions(0.5, 0.0), {"b": b})]
    for params in ([a, b], [("a", a), ("b", b)]):
        with grouping(claims):
            optimizer = torch.optim.AdamW([{"params": params, "lr": 0.3}], lr=0.1, weight_decay=0.2)
        (one, two) = optimizer.param_groups
        assert [p is a for p in one["params"]] == [True]
        assert [p is b for p in two["params"]] == [True]
        assert (two["lr"], two["weight_decay"], one["weight_decay"]) == (0.3, 0.0, 0.2)
    with grouping(claims):
        alone = torch.optim.SGD([b], lr=0.1)
    assert len(alone.param_groups) == 1
    assert split_group({"params": [a]}, claims) == [{"params": [a]}]


def test_a_parameter_in_no_optimizer_is_named(tmp_path: Path) -> None:
    class Early(UserModule):
        def __init__(self) -> None:
            super().__init__()
            self.made = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> Any:
            return self.made

    module = Early()
    with pytest.raises(gp.PlugError, match=r"net\.blocks\.0\.fc2\.gate\.logit"):
        trainer(tmp_path, callbacks=[ToyPlug()]).fit(module, loader())
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    check_trained([], {"frozen": frozen}, "Toy")


class Decayed(UserModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)


def test_groups_do_not_depend_on_the_order_of_the_callbacks(tmp_path: Path) -> None:
    def run(turn: int, **kwargs: Any) -> nn.Module:
        L.seed_everything(1, verbose=False)
        module = Decayed()
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1, enable_version_counter=False)
        toys = [ToyPlug("blocks.0.fc2", lr_scale=0.25), ToyPlug("blocks.1.fc2", lr_scale=1.5)]
        t = trainer(tmp_path, callbacks=[*toys[::turn], gp.ExactResume(), keep], enable_checkpointing=True)
        t.fit(module, loader(), **kwargs)
        return module

    whole = run(1).state_dict()
    turned = run(-1, ckpt_path=tmp_path / "step=5.ckpt", weights_only=True).state_dict()
    assert all(torch.equal(whole[k], turned[k]) for k in whole)


def test_a_gate_in_a_layer_that_another_plug_brought_is_in_its_own_group(tmp_path: Path) -> None:
    module = Decayed()
    replace, toy = gp.ReplaceFFN("swiglu", lr_scale=0.5), ToyPlug("blocks.*.fc1", lr_scale=0.25)
    t = trainer(tmp_path, callbacks=[replace, toy], max_steps=1)
    t.fit(module, loader())
    groups = {g.get("gateplug"): g for g in t.optimizers[0].param_groups}
    assert (groups["ToyPlug"]["weight_decay"], groups["ToyPlug"]["gateplug_lr_scale"], len(groups["ToyPlug"]["params"])) == (
        0,
        0.25,
        2,
    )
    assert (groups["ReplaceFFN"]["weight_decay"], groups["ReplaceFFN"]["gateplug_lr_scale"]) == (0.3, 0.5)
    assert not [name for name in replace.parameters(module) if "logit" in name]


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    class Two(UserModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)["loss"]
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.blocks.parameters(), lr=0.1), torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    t = trainer(tmp_path, callbacks=[gp.ReplaceFFN("swiglu", lr_scale=0.5)], max_steps=2)
    t.fit(Two(), loader())
    assert [len(o.param_groups) for o in t.optimizers] == [2, 1]


def test_a_failing_step_that_is_caught_leaves_the_learning_rate_whole() -> None:
    p = nn.Parameter(torch.ones(1))
    with grouping([Claim("Toy", GroupOptions(0.1), {"p": p})]):
        optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (1,))
    optimizer.param_groups[0]["maximize"] = True
    optimizer.param_groups[0]["differentiable"] = True
    optimizer.param_groups[0].pop("nesterov")
    with pytest.raises(KeyError):
        optimizer.step()
    optimizer.param_groups[0].update(nesterov=False, maximize=False, differentiable=False)
    p.grad = torch.ones(1)
    optimizer.step()
    assert float(p.detach()) == pytest.approx(0.9)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_failing_closure_leaves_the_learning_rate_whole() -> None:
    p = nn.Parameter(torch.ones(1))
    with grouping([Claim("Toy", GroupOptions(0.1), {"p": p})]):
        optimizer = torch.optim.SGD([p], lr=1.0)

    def closure() -> float:
        assert optimizer.param_groups[0]["lr"] == 1.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 1.0
    p.grad = torch.ones(1)
    optimizer.step()
    assert float(p.detach()) == pytest.approx(0.9)


@pytest.mark.parametrize("options", [{"lr_scale": -1}, {"lr_scale": float("inf")}, {"weight_decay": -0.1}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="≥ 0"):
        GroupOptions(**options)

"""Schedules learn the length of the training, and step when they should."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import SGD
from torch.optim import lr_scheduler as torch_schedules

from gateplug.tasks import Classifier, WarmupCosineLR
from tests.tasks.nets import as_tuples, loader, mlp, trainer

DATA = loader(as_tuples(torch.randn(12, 4), torch.arange(12) % 3), 2)  # 6 batches an epoch


def run(tmp_path, scheduler, epochs=2, **kwargs):
    task = Classifier(mlp(), 3, optimizer=partial(SGD, lr=0.1), scheduler=scheduler)
    rates = []
    task.on_train_batch_start = lambda *_: rates.append(task.optimizers().param_groups[0]["lr"]) or 0
    fit = trainer(tmp_path, max_epochs=epochs, **kwargs)
    fit.fit(task, DATA, DATA)
    return fit, rates


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("make", "length"),
    [
        (partial(torch_schedules.OneCycleLR, max_lr=0.3), "total_steps"),
        (partial(torch_schedules.CosineAnnealingLR), "T_max"),
        (torch_schedules.CosineAnnealingLR, "T_max"),
        (partial(torch_schedules.CosineAnnealingLR, T_max=-1), "T_max"),
        (WarmupCosineLR, "total_steps"),
    ],
)
def test_the_length_is_filled_in_steps_of_the_optimizer(make, length, accumulate, tmp_path):
    fit, rates = run(tmp_path, make, accumulate_grad_batches=accumulate)
    config = fit.lr_scheduler_configs[0]
    assert config.interval == "step"
    assert getattr(config.scheduler, length, 12 // accumulate) == fit.global_step == 12 // accumulate
    assert rates[-1] < 0.35 * max(rates)  # four steps of a cosine end at 0.15 of it, twelve at 0.02


def test_a_given_length_is_kept(tmp_path):
    fit, _ = run(tmp_path, partial(torch_schedules.CosineAnnealingLR, T_max=7))
    assert (fit.lr_scheduler_configs[0].scheduler.T_max, fit.lr_scheduler_configs[0].interval) == (7, "epoch")
    fit, _ = run(tmp_path, partial(torch_schedules.OneCycleLR, max_lr=0.3, epochs=2, steps_per_epoch=10))
    assert (fit.lr_scheduler_configs[0].scheduler.total_steps, fit.lr_scheduler_configs[0].interval) == (20, "step")


def test_other_schedules_step_once_an_epoch(tmp_path):
    fit, rates = run(tmp_path, partial(torch_schedules.StepLR, step_size=1, gamma=0.5), epochs=3)
    assert fit.lr_scheduler_configs[0].interval == "epoch"
    assert rates[::6] == [0.1, 0.05, 0.025]


def test_a_function_of_the_user_is_called_with_the_optimizer_alone(tmp_path):
    fit, _ = run(tmp_path, lambda optimizer: torch_schedules.LambdaLR(optimizer, lambda step: 1.0))
    assert isinstance(fit.lr_scheduler_configs[0].scheduler, torch_schedules.LambdaLR)


@pytest.mark.parametrize(
    ("make", "monitor"),
    [
        (torch_schedules.ReduceLROnPlateau, "val/loss"),
        (partial(ReduceLROnPlateau, monitor="val/accuracy", mode="max"), "val/accuracy"),
    ],
)
def test_plateau_watches_its_monitor(make, monitor, tmp_path):
    fit, _ = run(tmp_path, make)
    assert (fit.lr_scheduler_configs[0].monitor, fit.lr_scheduler_configs[0].interval) == (monitor, "epoch")


def test_a_training_without_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"OneCycleLR needs the number of training steps.*max_epochs=-1"):
        run(tmp_path, partial(torch_schedules.OneCycleLR, max_lr=0.3), epochs=-1)


def test_warmup_cosine_is_its_formula():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosineLR(optimizer, total_steps=20, warmup=0.2, final=0.1)
    for t in range(21):
        expected = (t + 1) / 4 if t < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * (t - 4) / 16)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * expected)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


@pytest.mark.parametrize("kwargs", [{"total_steps": 0}, {"warmup": 1.0}, {"final": 1.5}])
def test_warmup_cosine_refuses(kwargs):
    with pytest.raises(ValueError, match="WarmupCosineLR needs"):
        WarmupCosineLR(SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **{"total_steps": 9, **kwargs})

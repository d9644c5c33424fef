"""ExactResume: what a training step draws depends on (seed, rank, batch) alone."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gateplug.core.resume import ExactResume, step_seed
from gateplug.data import exact_loader

integers = st.integers(-(2**70), 2**70)


def test_step_seed_is_the_published_splitmix64():
    # splitmix64 of state 1234567, first output: 6457827717110365317 (Vigna's reference, prng.di.unimi.it/splitmix64.c)
    assert step_seed(1234567) == 6457827717110365317 & (2**63 - 1)


def test_step_seed_does_not_change_between_versions():
    assert [step_seed(0), step_seed(0, 0), step_seed(0, 1), step_seed(1, 0)] == FROZEN


FROZEN = [7070836379803831727, 2812178212566171247, 3069472533636442495, 6791897765849424158]


@given(integers, st.lists(integers, max_size=4))
def test_step_seed_is_a_63_bit_integer_that_torch_takes(seed, numbers):
    value = step_seed(seed, *numbers)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_step_seed_tells_the_order_of_its_numbers(a, b):
    assert (step_seed(a, b) == step_seed(b, a)) == (a == b)


def test_step_seed_has_no_collisions_on_a_grid():
    grid = [step_seed(s, e, i) for s in range(10) for e in range(30) for i in range(100)]
    assert len(set(grid)) == len(grid)


class Draws(L.LightningModule):
    """Notes what the three global generators give in each step, and before it."""

    def __init__(self, noise_in_validation=0):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.steps, self.transfers, self.noise = [], [], noise_in_validation

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.transfers.append(torch.rand(()).item())
        return batch

    def training_step(self, batch, batch_idx):
        self.steps.append((torch.rand(()).item(), random.random(), float(np.random.rand())))
        return self.layer(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        for _ in range(self.noise):
            torch.rand(7), random.random(), np.random.rand()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data(n=12):
    return torch.utils.data.TensorDataset(torch.arange(n, dtype=torch.float32)[:, None])


def fit(module, callback, loader=None, **kwargs):
    kwargs = {"max_epochs": 2, "num_sanity_val_steps": 0, **kwargs}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback], **quiet, **kwargs)
    trainer.fit(module, loader or exact_loader(data(), 4), DataLoader(data(), 4))
    return module


def test_validation_and_the_state_before_do_not_reach_the_steps():
    torch.manual_seed(1)
    plain = fit(Draws(), ExactResume(seed=5), limit_val_batches=0)
    torch.manual_seed(2), random.seed(3), np.random.seed(4)
    noisy = fit(Draws(noise_in_validation=3), ExactResume(seed=5), val_check_interval=1, num_sanity_val_steps=2)
    assert plain.steps == noisy.steps
    assert plain.transfers == noisy.transfers


def test_every_batch_and_every_seed_draw_differently():
    first, second = (fit(Draws(), ExactResume(seed)).steps for seed in (0, 1))
    values = [x for step in first + second for x in step]
    assert len(set(values)) == len(values) == 2 * 6 * 3


def test_batches_are_counted_and_not_optimizer_steps():
    steps = fit(Draws(), ExactResume(0), accumulate_grad_batches=3).steps
    assert len(set(steps)) == 6
    assert steps == fit(Draws(), ExactResume(0)).steps


def test_a_step_draws_what_step_seed_says():
    module = fit(Draws(), ExactResume(seed=9), max_epochs=1)
    for batch, drawn in enumerate(module.steps):
        torch.manual_seed(step_seed(9, 0, batch, 0))
        assert drawn[0] == torch.rand(()).item()


def test_default_seed_is_that_of_seed_everything(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "31")
    assert ExactResume().state_dict() == {"seed": 31}
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert ExactResume().state_dict() == {"seed": 0}


def test_the_seed_of_the_checkpoint_wins_with_a_warning():
    callback = ExactResume(seed=1)
    with pytest.warns(UserWarning, match=r"ExactResume\(seed=1\): the checkpoint was trained with seed 2"):
        callback.load_state_dict({"seed": 2})
    assert callback.state_dict() == {"seed": 2}


def test_a_loader_without_state_is_named_once(recwarn):
    callback = ExactResume()
    fit(Draws(), callback, DataLoader(data(), 4), max_epochs=1)
    fit(Draws(), callback, DataLoader(data(), 4), max_epochs=1)
    texts = [str(w.message) for w in recwarn if "gateplug.exact_loader" in str(w.message)]
    assert len(texts) == 1
    assert "(DataLoader) keeps no state" in texts[0]


def test_a_loader_with_state_is_not(recwarn):
    fit(Draws(), ExactResume(), max_epochs=1)
    assert not [w for w in recwarn if "gateplug.exact_loader" in str(w.message)]


@pytest.mark.parametrize("seed", ["1", 1.0, True])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(TypeError, match="must be an integer"):
        ExactResume(seed)

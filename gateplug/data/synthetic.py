"""Many small regression tasks of which it is known which experts each needs."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from gateplug.core.resume import step_seed
from gateplug.data.module import ExactDataModule, Split, TaskRows
from gateplug.data.randomness import permutation

_EXPERTS, _PAIRS, _WEIGHTS, _SAMPLES = range(0x5E1, 0x5E5)  # what is drawn, each by random numbers of its own
_NUMBER: dict[Split, int] = {"train": 0, "val": 1, "test": 2}
_CALIBRATION = 1 << 16  # points from which an expert's variance is measured: its standard error is some 1 %
_LEAST_STD = 0.05  # an expert that varies less has units that hardly ever open; scaled up it would be a few spikes


class SyntheticTasks(ExactDataModule):
    """Tasks in groups; the tasks of a group mix the same two of some true experts, so a router can be seen to find them.

    Inputs are x ~ N(0, I). A true expert is f_j(x) = relu(A_j x + a_j)·v_j with A, a, v ~ N(0, 1), scaled to variance 1.
    Group g has two experts (a, b), no two groups the same two, and each of its tasks has a weight u ~ U(0.3, 0.7):
    y = u f_a(x) + (1 - u) f_b(x) + noise·N(0, 1). The best mean squared error that a model can reach is noise².

    Batches are ``{"x": float (batch, dim), "labels": {"y": float (batch, tasks)}}``. Experts, groups, weights and samples are
    functions of the seed. Made for gateplug after the idea of the DSelect-k paper's synthetic data (Hazimeh et al. 2021,
    arXiv 2106.03760); the construction is not theirs.

    Args:
        tasks: Number of tasks, a multiple of ``groups``; those of a group follow each other.
        groups: Number of groups, from 1 to experts·(experts - 1)/2.
        experts: Number of true experts, ≥ 2.
        dim: Size of x, ≥ 1.
        hidden: Hidden units of an expert, ≥ 1.
        noise: Standard deviation of the noise, ≥ 0.
        missing: Share of the training labels that are NaN, drawn by seed, in [0, 1).
        train_samples: Number of training samples, ≥ 1.
        val_samples: Number of validation samples, ≥ 0.
        test_samples: Number of test samples, ≥ 1.
        batch_size: Samples per process and step, ≥ 1.
        seed: Of everything random here.
        num_workers: Processes that read, ≥ 0; 0 is fastest here.

    Attributes:
        groups: Group of every task: int64 ``(tasks,)``.
        pairs: The two true experts of every group, ascending: int64 ``(groups, 2)``.
        weights: u, the weight of the first of the two in every task: float64 ``(tasks,)``.

    Raises:
        ValueError: For an argument outside its range.
    """

    def __init__(
        self,
        tasks: int = 128,
        groups: int = 16,
        experts: int = 16,
        dim: int = 10,
        hidden: int = 4,
        noise: float = 0.1,
        missing: float = 0.0,
        train_samples: int = 50_000,
        val_samples: int = 5_000,
        test_samples: int = 10_000,
        batch_size: int = 512,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        least = {"tasks": 1, "groups": 1, "experts": 2, "dim": 1, "hidden": 1, "train_samples": 1, "val_samples": 0}
        given = (tasks, groups, experts, dim, hidden, train_samples, val_samples, test_samples)
        for (what, low), value in zip({**least, "test_samples": 1}.items(), given, strict=True):
            if value < low:
                raise ValueError(f"SyntheticTasks({what}={value}): it must be at least {low}.")
        if groups > (most := math.comb(experts, 2)):
            raise ValueError(
                f"SyntheticTasks(groups={groups}): {experts} experts make {most} different pairs, and every group has its "
                "own; give more experts or fewer groups."
            )
        if tasks % groups:
            raise ValueError(f"SyntheticTasks(tasks={tasks}): it must be a multiple of groups={groups}; all have one size.")
        if not (math.isfinite(noise) and noise >= 0):
            raise ValueError(f"SyntheticTasks(noise={noise}): a standard deviation, 0 or more.")
        if not 0 <= missing < 1:
            raise ValueError(f"SyntheticTasks(missing={missing}): a share of the labels, in [0, 1).")
        self.tasks, self.experts, self.dim, self.hidden, self.noise, self.missing = tasks, experts, dim, hidden, noise, missing
        self.samples: dict[Split, int] = {"train": train_samples, "val": val_samples, "test": test_samples}
        self.groups = torch.arange(groups).repeat_interleave(tasks // groups)
        self.pairs = torch.combinations(torch.arange(experts))[permutation(most, seed, _PAIRS)[:groups]]
        draw = torch.rand(tasks, dtype=torch.float64, generator=_generator(seed, _WEIGHTS))
        self.weights = 0.3 + 0.4 * draw

    @functools.cached_property
    def truth(self) -> TrueExperts:
        """The true experts."""
        return draw_experts(self.experts, self.dim, self.hidden, self.seed)

    def signal(self, x: Tensor) -> Tensor:
        """The labels without noise: ``(samples, dim)`` to float64 ``(samples, tasks)``."""
        first, second = self.truth(x)[:, self.pairs[self.groups]].unbind(-1)
        return self.weights * first + (1 - self.weights) * second

    def read(self, split: Split) -> TaskRows | None:
        """Draw a split's samples."""
        n, number = self.samples[split], _NUMBER[split]
        if not n:
            return None
        generator = _generator(self.seed, _SAMPLES, number)
        x = torch.randn(n, self.dim, generator=generator)
        y = (self.signal(x) + self.noise * torch.randn(n, self.tasks, generator=generator)).float()
        if split == "train" and self.missing:  # drawn last, so that it changes nothing else
            y[torch.rand(n, self.tasks, generator=generator) < self.missing] = math.nan
        return TaskRows({"y": y}, x=x)


class TrueExperts(NamedTuple):
    """Networks of one hidden layer, side by side: f_j(x) = relu(A_j x + a_j)·v_j.

    Attributes:
        inner: A, float64 ``(experts, hidden, dim)``.
        bias: a, float64 ``(experts, hidden)``.
        outer: v, float64 ``(experts, hidden)``.
    """

    inner: Tensor
    bias: Tensor
    outer: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """``(samples, dim)`` to float64 ``(samples, experts)``."""
        # in float64, so that after rounding to float32 the number of threads of the product does not show
        units = torch.einsum("sd,ehd->seh", x.double(), self.inner) + self.bias
        return (units.relu() * self.outer).sum(-1)


def draw_experts(experts: int, dim: int, hidden: int, seed: int) -> TrueExperts:
    """True experts by seed, scaled to variance 1 over x ~ N(0, I), as measured on 65,536 points.

    One whose standard deviation is below 0.05 before that is drawn again; with the default sizes it does not happen.
    """
    x = torch.randn(_CALIBRATION, dim, dtype=torch.float64, generator=_generator(seed, _EXPERTS))
    made: list[TrueExperts] = []
    for number in range(experts):
        generator = _generator(seed, _EXPERTS, number)
        std = 0.0
        while std < _LEAST_STD:
            inner, bias, outer = (
                torch.randn(1, hidden, *size, dtype=torch.float64, generator=generator) for size in ((dim,), (), ())
            )
            # rounded, because the last bits of a sum over so many points depend on the number of threads
            std = float(TrueExperts(inner, bias, outer)(x).std().float())
        made.append(TrueExperts(inner, bias, outer / std))
    return TrueExperts(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def _generator(seed: int, *numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(step_seed(seed, *numbers))

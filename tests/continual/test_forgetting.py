"""Each method forgets less than plain training: three permuted digit tasks, seeds 0 and 1, a network of 64-100-100-10."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gateplug.continual.ewc import EWC
from gateplug.continual.mas import MAS
from gateplug.continual.replay import Replay
from gateplug.continual.synaptic_intelligence import SynapticIntelligence
from tests.continual.stream import Digits, PermutedDigits, fit

METHODS: dict[str, tuple[Callable[[], Any], float]] = {
    "ewc": (lambda: EWC(1000.0), 0.1),
    "online": (lambda: EWC(1000.0, online=True), 0.1),
    "sampled": (lambda: EWC(1000.0, fisher="sampled"), 0.1),
    "si": (lambda: SynapticIntelligence(10.0, xi=1e-3), 0.1),
    "mas": (lambda: MAS(5.0), 0.1),
    "er": (lambda: Replay(200), 0.15),
    "der++": (lambda: Replay(200, kind="der++"), 0.15),
}
"""What trains, and by how much it must be better on the tasks before the last one."""


def remembered(plugs: list[Any], seed: int, folder: Path) -> float:
    """Mean accuracy on the first two tasks after the third."""
    torch.manual_seed(seed)
    data, module = PermutedDigits(seed=seed), Digits(100, "adam", 1e-3)
    fit(plugs, folder, data, module)
    return sum(data.accuracies(module)[:-1]) / 2


@cache
def fine_tuned(seed: int, folder: Path) -> float:
    return remembered([], seed, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forgetting")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_old_tasks_are_remembered_better_than_by_plain_training(method: str, seed: int, folder: Path) -> None:
    make, margin = METHODS[method]
    kept, lost = remembered([make()], seed, folder), fine_tuned(seed, folder)
    print(f"{method} seed {seed}: {kept:.3f}, plain {lost:.3f}")
    assert kept > lost + margin

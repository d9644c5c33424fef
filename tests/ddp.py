"""One case of the battery on one process or two: `python -m tests.ddp NAME FOLDER` is what the two processes run.

So is `python -m tests.ddp --call MODULE:FUNCTION FOLDER` for a test of its own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch

import gateplug as gp
from tests.conformance import CASES
from tests.modules import UserModule, loader, trainer


def run_case(name: str, folder: Path, devices: int) -> UserModule:
    """Train a case with a global batch of 16, on one process or on two gloo processes."""
    L.seed_everything(1, verbose=False)
    module = UserModule(lr=0.05)
    settings = {"strategy": "ddp", "devices": 2} if devices == 2 else {}
    callbacks = [*CASES[name].make(), gp.ExactResume()]
    trainer(folder, callbacks=callbacks, **settings).fit(module, loader(16 // devices))
    return module


def run_two_processes(name: str, folder: Path) -> None:
    """Run a case on two processes; the first writes `NAME.pt` into `folder`."""
    _launch(name, str(folder))


def two_processes(train: Callable[[Path, int], None], folder: Path) -> None:
    """Run `train(folder, 2)`, a function of a test module, on two processes; it writes what it has found into `folder`."""
    _launch("--call", f"{train.__module__}:{train.__name__}", str(folder))


def _launch(*arguments: str) -> None:
    root = Path(__file__).parent.parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.ddp", *arguments]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--call":
        module, _, function = sys.argv[2].partition(":")
        getattr(importlib.import_module(module), function)(Path(sys.argv[3]), 2)
        sys.exit()
    model = run_case(sys.argv[1], Path(sys.argv[2]), devices=2)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        torch.save(model.state_dict(), Path(sys.argv[2]) / f"{sys.argv[1]}.pt")

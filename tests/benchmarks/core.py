"""Benchmarks of the core: `python tests/benchmarks/core.py [--quick]`.

`idle_plug`: a training step in a Lightning Trainer with a plug that changes nothing ÷ the same step without it. The plug is
`gp.ReplaceActivation` with the very function that the model has, so both sides do the same arithmetic and all that is left is
the machinery: an attached layer, a wrapped `training_step`, the checks at the start, the hooks.
`monitor`: training steps of a model with SwiGLU feed-forwards and a GateMonitor(every_n_steps=50) ÷ the same without the
monitor, both with a TensorBoard logger. The heat map, drawn after epochs 1, 2, 4, 8 … and not per step, is not in it.
`import`: `import gateplug` ÷ `import lightning`, each in a fresh process.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rounds import Line, arguments, compare, line, report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


def child_seconds(statement: str) -> float:
    """CPU seconds of a fresh process that runs one statement."""
    child = subprocess.Popen([sys.executable, "-c", statement])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{statement!r} ended with status {status}")
    return usage.ru_utime + usage.ru_stime


def imports(rounds: int) -> Line:
    """Both imports in alternating processes."""
    import gateplug  # noqa: F401

    return compare(
        "import",
        "import gateplug vs import lightning",
        lambda: child_seconds("import gateplug"),
        lambda: child_seconds("import lightning"),
        rounds,
        "≤ 1.1",
        warm_up=0,  # the files are in the page cache: this process has read them
    )


class Baton:
    """Lets two trainings run step by step in turns, so that both sides of a ratio are measured within milliseconds."""

    def __init__(self) -> None:
        self.turns = (threading.Semaphore(1), threading.Semaphore(0))

    def take(self, side: int) -> None:
        """Wait for this side's turn."""
        self.turns[side].acquire()

    def give(self, side: int) -> None:
        """Let the other side go on."""
        self.turns[1 - side].release()


Callbacks = Callable[[], Sequence[Any]]
"""Makes the callbacks of one training."""


Training = Callable[[], tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]]
"""Makes what is trained: network, batch, and the loss of both."""


def vision() -> tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]:
    """A small vision transformer on random digits."""
    import gateplug as gp

    config = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 4, "intermediate_size": 192}
    batch = (torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,)))
    return gp.hf_model("vit", num_labels=10, config=config), batch, lambda net, b: F.cross_entropy(net(b[0]).logits, b[1])


def fit(baton: Baton, side: int, callbacks: Sequence[Any], logger: Any, steps: int, training: Training) -> list[float]:
    """Train; the CPU seconds of each step, from batch start to batch start."""
    import lightning as L

    times: list[float] = []

    class Own(L.LightningModule):
        """A person's own module; this hook comes after those of all callbacks."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.start = 0.0

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx:
                times.append(time.thread_time() - self.start)
            baton.give(side)
            baton.take(side)
            self.start = time.thread_time()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss(self.net, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    baton.take(side)
    try:
        torch.manual_seed(0)
        net, batch, loss = training()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=list(callbacks),
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Own(), DataLoader([batch] * (steps + 1), batch_size=None))
    finally:
        baton.give(side)
    return times


def in_turns(
    ours: Callbacks, peer: Callbacks, logger: Callable[[], Any], steps: int, training: Training = vision
) -> tuple[float, float]:
    """One round: mean seconds of a step of (ours, peer), from two pairs of trainings with the sides exchanged.

    Two equal trainings differ by up to 3 % as long as they live, by where their memory lies and by who comes first; the exchange
    takes out the one half of it, many rounds the other.
    """
    total = [0.0, 0.0]
    for order in ((0, 1), (1, 0)):
        baton = Baton()
        with ThreadPoolExecutor(2) as threads:
            made = [(ours, peer)[which]() for which in order]
            sides = [threads.submit(fit, baton, i, callbacks, logger(), steps + 2, training) for i, callbacks in enumerate(made)]
            for which, side in zip(order, sides, strict=True):
                total[which] += sum(side.result()[2:]) / steps / 2
    return total[0], total[1]


def idle(rounds: int) -> Line:
    """Plug machinery alone."""
    from transformers.activations import GELUActivation

    import gateplug as gp

    pairs = [in_turns(lambda: [gp.ReplaceActivation("gelu", GELUActivation)], list, lambda: False, 15) for _ in range(rounds)]
    return line("idle_plug", "step with an idle plug vs without, ViT d=64", pairs, "≤ 1.01")


def monitor(rounds: int) -> Line:
    """What looking at the gates costs: one look in fifty steps."""
    from lightning.pytorch.loggers import TensorBoardLogger

    import gateplug as gp

    def ours() -> list[Any]:
        return [gp.ReplaceFFN("swiglu"), gp.GateMonitor(every_n_steps=50)]

    with tempfile.TemporaryDirectory() as folder:
        every = [in_turns(ours, lambda: [gp.ReplaceFFN("swiglu")], lambda: TensorBoardLogger(folder), 50) for _ in range(rounds)]
    return line("monitor", "step with GateMonitor(50) vs without, 4 SwiGLU", every, "≤ 1.03")


def main() -> None:
    """Run what was asked for."""
    args = arguments("Benchmarks of the core.")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    every = {
        "idle_plug": lambda: idle(6 if args.quick else 60),
        "monitor": lambda: monitor(2 if args.quick else 15),
        "import": lambda: imports(1 if args.quick else 7),
    }
    sys.stdout, shown = open(os.devnull, "w"), sys.stdout  # noqa: SIM115  # plugs print tables at the start of each fit
    lines = [measure() for key, measure in every.items() if not args.only or key in args.only]
    sys.stdout = shown
    report(lines)


if __name__ == "__main__":
    main()

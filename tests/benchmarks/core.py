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
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rounds import Line, arguments, compare, report
from torch import Tensor
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


def fitted(callbacks: Callable[[], Sequence[Any]], steps: int, logger: Callable[[], Any]) -> float:
    """CPU seconds per step of a fit of a small vision transformer; the first steps are not counted."""
    import lightning as L

    import gateplug as gp

    skipped = 3
    config = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 4, "intermediate_size": 192}

    class Own(L.LightningModule):
        """A person's own module; it reads the time at the start of a step, after all callbacks' hooks."""

        def __init__(self) -> None:
            super().__init__()
            self.net = gp.hf_model("vit", num_labels=10, config=config)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.now = time.process_time()
            if batch_idx == skipped:
                self.start = self.now

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]).logits, batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    torch.manual_seed(0)
    module = Own()
    batch = (torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,)))
    loader = DataLoader([batch] * (steps + skipped + 1), batch_size=None)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks()),
        logger=logger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return (module.now - module.start) / steps


def idle(rounds: int) -> Line:
    """Plug machinery alone."""
    from transformers.activations import GELUActivation

    import gateplug as gp

    def side(callbacks: Callable[[], Sequence[Any]]) -> Callable[[], float]:
        return lambda: fitted(callbacks, 20, lambda: False)

    ours = side(lambda: [gp.ReplaceActivation("gelu", GELUActivation)])
    return compare("idle_plug", "step with an idle plug vs without, ViT d=64", ours, side(list), rounds, "≤ 1.01")


def monitor(rounds: int) -> Line:
    """What looking at the gates costs."""
    from lightning.pytorch.loggers import TensorBoardLogger

    import gateplug as gp

    with tempfile.TemporaryDirectory() as folder:

        def side(more: Callable[[], Sequence[Any]]) -> Callable[[], float]:
            return lambda: fitted(lambda: [gp.ReplaceFFN("swiglu"), *more()], 100, lambda: TensorBoardLogger(folder))

        ours = side(lambda: [gp.GateMonitor(every_n_steps=50)])
        return compare("monitor", "step with GateMonitor(50) vs without, 4 SwiGLU", ours, side(list), rounds, "≤ 1.03")


def main() -> None:
    """Run what was asked for."""
    args = arguments("Benchmarks of the core.")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    every = {
        "idle_plug": lambda: idle(8 if args.quick else 80),
        "monitor": lambda: monitor(2 if args.quick else 15),
        "import": lambda: imports(2 if args.quick else 7),
    }
    sys.stdout, shown = open(os.devnull, "w"), sys.stdout  # noqa: SIM115  # plugs print tables at the start of each fit
    lines = [measure() for key, measure in every.items() if not args.only or key in args.only]
    sys.stdout = shown
    report(lines)


if __name__ == "__main__":
    main()

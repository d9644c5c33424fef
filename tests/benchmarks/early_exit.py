"""Benchmarks of the early_exit room: `python tests/benchmarks/early_exit.py [--quick] [--only KEY …] [--runs EXITS WHOLE] [--figure PNG]`.

`runner_b…_speedup`: a network that was trained without exits and runs whole ÷ `gp.ExitRunner` on the same test batches, at the
cheapest threshold that is at most half a point behind the whole network on validation samples; `confidence_b…_speedup`: the same
exits left by a plain threshold on the confidence, fitted in the same way. Without `--runs` both networks are vision transformers
of eight blocks that are trained here on scikit-learn's digits. With it they are the folders of two runs of a recipe, e.g. of
`early_exit_text.yaml`, with the plug and with `--trainer.callbacks=[]`: how long a batch takes is then that of MiniLM.
`programs_b…_speedup`: the same network exported by stages, and its driver, against the whole network exported as one program.
`nobody_exits`: a runner from which nobody leaves ÷ the network without exits. `training_step`: a step with exits on three of four
blocks ÷ the same without the plug.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from core import in_turns
from rounds import Line, line, report
from torch import Tensor, nn

import gateplug as gp
from gateplug.early_exit.latency import taken

BATCHES = (1, 16, 64, 256)
ROOT = Path(__file__).parent.parent.parent


def fitted(recipe: str, folder: str, *options: str) -> Path:
    """Fit a recipe through the command line; the folder of the run."""
    from gateplug.cli import main

    if main(["fit", "-c", str(ROOT / "recipes" / recipe), f"--trainer.default_root_dir={folder}", *options]):
        raise RuntimeError(f"{recipe} did not train")
    return next(Path(folder).glob("*/version_0"))


def trained(quick: bool, folder: str) -> tuple[Path, Path]:
    """A vision transformer of eight blocks on digits, with exits after the second and the fourth, and without."""
    config = {"num_hidden_layers": 8, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384}
    network = [f"--model.net.config.{name}={value}" for name, value in config.items()]
    network.append(f"--trainer.max_epochs={16 if quick else 60}")
    plug = ["at=[net.vit.layers.1, net.vit.layers.3]", "mode=hazard", f"warmup_epochs={8 if quick else 20}", "latency=[]"]
    exits = [f"--trainer.callbacks.{option}" for option in plug]
    return (
        fitted("early_exit_digits.yaml", f"{folder}/exits", *network, *exits),
        fitted("early_exit_digits.yaml", f"{folder}/whole", *network, "--trainer.callbacks=[]"),
    )


class Side:
    """Two networks on the data of a run."""

    def __init__(self, exits: Path, whole: Path) -> None:
        settings = yaml.safe_load((exits / "config.yaml").read_text())["data"]
        self.data = getattr(gp, settings["class_path"].rsplit(".", 1)[-1])(**settings["init_args"])
        self.data.prepare_data()
        for stage in ("fit", "test"):
            self.data.setup(stage)
        self.whole: nn.Module = gp.fold(gp.load(whole / "checkpoints" / "last.ckpt"))
        folded = gp.fold(gp.load(exits / "checkpoints" / "last.ckpt"))
        assert isinstance(folded, gp.ExitRunner)
        self.runner = folded
        self.validation, self.test = list(self.data.val_dataloader()), list(self.data.test_dataloader())
        # a short training may leave the network with exits behind the other one, whatever the threshold
        accuracy = min(self.accuracy(net, self.validation) for net in (self.whole, self.runner.net))
        self.runners = {
            rule: gp.ExitRunner(folded, rule, operating_point={"accuracy": accuracy - 0.005}, validation=self.validation)
            for rule in (folded.gate, "confidence")
        }

    @staticmethod
    def call(batch: Any) -> dict[str, Tensor]:
        """What a network is called with."""
        return {key: value for key, value in batch.items() if key != "labels"}

    @torch.inference_mode()
    def accuracy(self, net: nn.Module, batches: list[Any]) -> float:
        """Share of right answers."""
        right = [(net(**self.call(batch)).logits.argmax(-1) == batch["labels"]) for batch in batches]
        return float(torch.cat(right).double().mean())

    def calls(self, batch: int) -> Iterator[dict[str, Tensor]]:
        """Test batches of a size, over and over: other samples in each. A batch of the data is padded by its own longest text."""
        while True:
            for given in self.test:
                samples = len(given["labels"])
                for start in range(0, samples, batch):
                    yield taken(((), self.call(given)), samples, batch, start)[1]


@torch.inference_mode()
def seconds(work: Callable[..., object], call: dict[str, Tensor]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work(**call)
    return time.process_time() - start


def speedup(side: Side, rule: str, batch: int, rounds: int) -> Line:
    """Whole network against runner; a round is some batches, each run by both in turn."""
    runner, calls = side.runners[rule], side.calls(batch)
    each = max(1, 32 // batch)
    pairs, ours, theirs = [], [], []
    for number in range(rounds + 1):
        times = []
        for _ in range(each):
            call = next(calls)
            order = (runner, side.whole) if len(times) % 2 else (side.whole, runner)
            found = {id(net): seconds(net, call) for net in order}
            times.append((found[id(runner)], found[id(side.whole)]))
        if number:
            pairs.append((sum(a for a, _ in times), sum(b for _, b in times)))
            ours += [a for a, _ in times]
            theirs += [b for _, b in times]
    name = "runner" if rule != "confidence" else "confidence"
    p = " vs ".join(f"{1e3 * statistics.median(t):.2f}/{1e3 * torch.tensor(t).quantile(0.95):.2f}" for t in (ours, theirs))
    return line(f"{name}_b{batch}_speedup", f"batch {batch}: p50/p95 ms {p}", pairs, "≥ 2.0" if batch in (1, 64) else "")


def programs(side: Side, batch: int, rounds: int) -> Line:
    """Programs of stages and their driver against the whole network as one program, both exported."""
    runner, calls = next(iter(side.runners.values())), side.calls(batch)
    example = next(side.calls(4))
    with tempfile.TemporaryDirectory() as folder:
        runner.export(f"{folder}/stages", kwargs=example)
        driver = gp.ExitPrograms(f"{folder}/stages")
    free = {name: {0: torch.export.Dim("batch", min=1)} for name in example}
    whole = torch.export.export(side.whole, (), example, dynamic_shapes=free).module()
    pairs = []
    for number in range(rounds + 2):
        group = [next(calls) for _ in range(max(1, 32 // batch))]
        group = [call for call in group if all(call[k].shape[1:] == example[k].shape[1:] for k in call)]  # a text may be shorter
        times = [(seconds(driver, call), seconds(whole, call)) for call in group]
        if number > 1 and times:
            pairs.append((sum(a for a, _ in times), sum(b for _, b in times)))
    return line(f"programs_b{batch}_speedup", f"batch {batch}: programs of stages vs the whole as a program", pairs, "")


def nobody(side: Side, batch: int, rounds: int) -> Line:
    """A runner without a single exit taken."""
    runner, calls = gp.ExitRunner(side.runner, threshold=float("inf")), side.calls(batch)
    pairs = []
    for number in range(rounds + 3):
        call = next(calls)
        order = (runner, side.runner.net) if number % 2 else (side.runner.net, runner)
        found = {id(net): seconds(net, call) for net in order}
        pairs.append((found[id(runner)], found[id(side.runner.net)]))
    key = "nobody_exits" if batch == 64 else f"nobody_exits_b{batch}"
    return line(key, f"batch {batch}, nobody leaves, vs the network without exits", pairs[3:], "≤ 1.05")


def training_step(exits: int, rounds: int) -> Line:
    """A step of a ViT of four blocks with exits, against the same without."""
    names = [f"net.vit.layers.{i}" for i in range(exits)]

    def ours() -> list[Any]:
        return [gp.EarlyExit(at=names, freeze_backbone=False, warmup_epochs=0, every=1, latency=())]

    pairs = [in_turns(ours, list, lambda: False, 15) for _ in range(rounds)]
    return line(
        "training_step" if exits == 3 else f"training_step_{exits}", f"step with {exits} exits vs without, ViT d=64", pairs, ""
    )


def figure(path: Path, rounds: int) -> None:
    """The ratio of a training step against the number of exits."""
    from matplotlib.figure import Figure

    lines = [training_step(exits, rounds) for exits in (1, 2, 3)]
    picture = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = picture.subplots()
    for exits, entry in enumerate(lines, 1):
        axes.plot([exits] * len(entry.ratios), entry.ratios, ".", color="#8c8c8c")
    axes.plot([1, 2, 3], [entry.ratio for entry in lines], "o-", color="#2166ac")
    axes.set(xlabel="exits on a ViT of four blocks, d = 64", ylabel="step with exits ÷ without", xticks=[1, 2, 3])
    axes.set_title(f"Training step, one thread (torch {torch.__version__})", fontsize=10)
    axes.grid(alpha=0.3)
    picture.savefig(path, dpi=110)
    report(lines)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="Benchmarks of the early_exit room.")
    parser.add_argument(
        "--quick", action="store_true", help="a shorter training and fewer rounds: about a minute on two free cores"
    )
    parser.add_argument("--runs", nargs=2, type=Path, metavar=("EXITS", "WHOLE"), help="folders of two runs, see above")
    parser.add_argument("--only", nargs="*", help="these keys alone")
    parser.add_argument("--figure", type=Path, help="draw a training step against the number of exits into this file instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    sys.stdout, shown = open(os.devnull, "w"), sys.stdout  # noqa: SIM115  # fits print tables
    few = args.quick
    if args.figure:
        figure(args.figure, 2 if few else 12)
        return
    with tempfile.TemporaryDirectory() as folder:
        side = Side(*(args.runs or trained(few, folder)))
    rounds = {1: 40, 16: 30, 64: 20, 256: 8}
    every: dict[str, Callable[[], Line]] = {}
    for rule in side.runners:
        name = "confidence" if rule == "confidence" else "runner"
        for batch in BATCHES:
            every[f"{name}_b{batch}_speedup"] = partial(speedup, side, rule, batch, 8 if few else rounds[batch])
    for batch in (1, 64):
        every[f"programs_b{batch}_speedup"] = partial(programs, side, batch, 8 if few else rounds[batch] // 2)
    every["nobody_exits"] = partial(nobody, side, 64, 30 if few else 100)
    every["nobody_exits_b1"] = partial(nobody, side, 1, 30 if few else 100)
    every["training_step"] = partial(training_step, 3, 2 if few else 20)
    lines = [measure() for key, measure in every.items() if not args.only or key in args.only]
    sys.stdout = shown
    tests = {"whole": side.accuracy(side.whole, side.test), **{r: side.accuracy(n, side.test) for r, n in side.runners.items()}}
    spent = {}
    for rule, runner in side.runners.items():
        costs = [runner(**side.call(batch)).cost for batch in side.test]
        spent[rule] = float(torch.cat([cost for cost in costs if cost is not None]).mean())
    print("test accuracy:", ", ".join(f"{name} {value:.4f}" for name, value in tests.items()))
    print("share of the multiply-adds:", ", ".join(f"{name} {value:.3f}" for name, value in spent.items()))
    report(lines)


if __name__ == "__main__":
    main()

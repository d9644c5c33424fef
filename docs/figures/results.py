"""The measurements of docs/results.md: run them through the command line, store them, draw them.

    python docs/figures/results.py run text --seeds 0 1 2      # all variants, recipes/glu_text.yaml
    python docs/figures/results.py run digits --seeds 0 1 2    # recipes/glu_digits.yaml
    python docs/figures/results.py run fashion --seeds 0 1 2   # recipes/activation_fashion.yaml
    python docs/figures/results.py table                       # prints the tables in Markdown
    python docs/figures/results.py draw                        # results_glu.png, results_activation.png

Run from the root of the repository. A run that is stored already is not repeated, so an interrupted series goes on where it
stopped. All arms of a seed start from the same weights outside of the feed-forwards and see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STORE = HERE / "results_glu.json"
GLU = ("ffn_relu", "ffn_gelu", "ffn_silu", "glu", "bilinear", "reglu", "geglu", "swiglu")
NAMES = {"ffn_relu": "ReLU", "ffn_gelu": "GELU", "ffn_silu": "SiLU (Swish)", "glu": "GLU", "bilinear": "Bilinear"}
NAMES |= {"reglu": "ReGLU", "geglu": "GEGLU", "swiglu": "SwiGLU", "relu": "ReLU", "tempered": "tempered sigmoid"}
PLAIN_OF = {"reglu": "ffn_relu", "geglu": "ffn_gelu", "swiglu": "ffn_silu"}
"""The variants whose own activation is among the plain blocks."""
PAPER = dict(zip(GLU, (1.677, 1.679, 1.683, 1.663, 1.648, 1.645, 1.633, 1.636), strict=True))
"""Held-out log-perplexity after 524,288 steps, T5-base on C4: arXiv 2002.05202, table 1."""
TIED = "lm_head.weight"
"""Of GPT-2: the same parameter as its embedding."""
Run = dict[str, Any]


def variant(name: str) -> list[str]:
    """The option that chooses an arm of the GLU comparison."""
    return [f"--trainer.callbacks.variant={name}"]


def activation(name: str) -> list[str]:
    """The option that chooses an arm of the activation comparison."""
    return ["--trainer.callbacks.new=torch.nn.ReLU"] if name == "relu" else []


TASKS: dict[str, tuple[str, Sequence[str], Callable[[str], list[str]], bool]] = {
    "text": ("glu_text", GLU, variant, False),
    "digits": ("glu_digits", GLU, variant, True),
    "fashion": ("activation_fashion", ("relu", "tempered"), activation, False),
}
"""Task -> recipe, arms, options of an arm, whether the seed draws the split as well."""


def measure(task: str, arm: str, seed: int) -> Run:
    """Train one arm with one seed; its test metrics, parameters and seconds."""
    import torch

    from gateplug.cli import main as gateplug

    recipe, _, options, split = TASKS[task]
    with tempfile.TemporaryDirectory() as folder:
        args = ["fit", "-c", f"recipes/{recipe}.yaml", "--seed_everything", str(seed), "--trainer.default_root_dir", folder]
        args += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", *options(arm)]
        start = time.perf_counter()
        if gateplug([*args, *([f"--data.seed={seed}"] if split else [])]):
            raise SystemExit(f"{task}, {arm}, seed {seed}: the run failed")
        seconds = time.perf_counter() - start
        (table,) = Path(folder).rglob("metrics.csv")
        with table.open(encoding="utf-8") as file:
            tested = [{k: v for k, v in row.items() if v and k.startswith("test/")} for row in csv.DictReader(file)]
        (saved,) = Path(folder).rglob("last.ckpt")
        weights = torch.load(saved, weights_only=True)["state_dict"]
    metrics = {name.removeprefix("test/"): round(float(v), 5) for row in tested for name, v in row.items()}
    parameters = sum(tensor.numel() for name, tensor in weights.items() if name.startswith("net.") and not name.endswith(TIED))
    return {"arm": arm, "seed": seed, "parameters": parameters, "seconds": round(seconds, 1), **metrics}


def stored(new: tuple[str, Run] | None = None, store: Path = STORE) -> dict[str, list[Run]]:
    """All stored runs, with a new one added; two series may run at once."""
    with store.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        runs: dict[str, list[Run]] = json.loads(file.read() or "{}")
        if new is not None:
            runs.setdefault(new[0], []).append(new[1])
            file.truncate(0)
            lines = (f'"{task}": [\n  ' + ",\n  ".join(map(json.dumps, runs[task])) + "\n]" for task in sorted(runs))
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
    return runs


def series(task: str, seeds: Sequence[int]) -> None:
    """Run all arms for all seeds, a seed after the other."""
    for seed in seeds:
        for arm in TASKS[task][1]:
            if not any(r["arm"] == arm and r["seed"] == seed for r in stored().get(task, [])):
                run = measure(task, arm, seed)
                stored((task, run))
                print(task, run, flush=True)


def values(runs: Sequence[Run], arm: str, quantity: str) -> dict[int, float]:
    """A quantity of an arm by seed."""
    return {r["seed"]: r[quantity] for r in runs if r["arm"] == arm}


def differences(runs: Sequence[Run], arm: str, other: str, quantity: str) -> list[float]:
    """Arm minus other, seed by seed."""
    a, b = values(runs, arm, quantity), values(runs, other, quantity)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def spread(numbers: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for a single run."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def cell(numbers: Sequence[float], digits: int, signed: bool = False) -> str:
    """Mean ± standard deviation."""
    sign = "+" if signed else ""
    return f"{statistics.mean(numbers):{sign}.{digits}f} ± {spread(numbers):.{digits}f}"


def complete(runs: Sequence[Run], arms: Sequence[str]) -> list[Run]:
    """The runs of seeds for which all arms were run: the comparison is paired."""
    seeds = {r["seed"] for r in runs}
    full = {s for s in seeds if {r["arm"] for r in runs if r["seed"] == s} >= set(arms)}
    return [r for r in runs if r["seed"] in full]


def glu_table(runs: Sequence[Run], quantities: dict[str, str]) -> str:
    """The GLU comparison in Markdown: `quantities` are named in the head of the table."""
    runs = complete(runs, GLU)
    seeds = sorted({r["seed"] for r in runs})
    head = ["variant", "parameters", *quantities.values(), "loss - loss(ReLU)", "better seeds", "paper: log-perplexity"]
    rows = [head, ["---"] * len(head)]
    for arm in GLU:
        change = differences(runs, arm, "ffn_relu", "loss")
        cells = [cell(list(values(runs, arm, q).values()), 4 if q != "perplexity" else 2) for q in quantities]
        beside = ["", ""] if arm == "ffn_relu" else [cell(change, 4, True), f"{sum(c < 0 for c in change)} of {len(seeds)}"]
        parameters = next(r["parameters"] for r in runs if r["arm"] == arm)
        rows.append([NAMES[arm], f"{parameters:,}", *cells, *beside, f"{PAPER[arm]:.3f}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "| gated against its own activation, plain | loss difference | better seeds |", "|---|---|---|"]
    for gated, plain in PLAIN_OF.items():
        change = differences(runs, gated, plain, "loss")
        lines.append(
            f"| {NAMES[gated]} - {NAMES[plain]} | {cell(change, 4, True)} | {sum(c < 0 for c in change)} of {len(seeds)} |"
        )
    took = [r["seconds"] for r in runs]
    lines += ["", f"Seeds {seeds}; seconds of a run: median {statistics.median(took):.0f} [{min(took):.0f} … {max(took):.0f}]."]
    return "\n".join(lines)


def activation_table(runs: Sequence[Run]) -> str:
    """The activation comparison in Markdown."""
    arms = TASKS["fashion"][1]
    runs = complete(runs, arms)
    lines = ["| activation | test accuracy | test loss | calibration error |", "|---|---|---|---|"]
    for arm in arms:
        cells = [cell(list(values(runs, arm, q).values()), 4) for q in ("accuracy", "loss", "calibration_error")]
        lines.append("| " + " | ".join([NAMES[arm], *cells]) + " |")
    change = differences(runs, "tempered", "relu", "accuracy")
    took = [r["seconds"] for r in runs]
    lines += [
        "",
        f"Paired difference in accuracy: {cell(change, 4, True)}, seeds {sorted({r['seed'] for r in runs})}; seconds of a",
    ]
    lines[-1] += f" run: median {statistics.median(took):.0f} [{min(took):.0f} … {max(took):.0f}]."
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]]) -> None:
    """One picture a comparison."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plain, gated = "#8c8c8c", "#2166ac"
    panels = [("text", "GPT-2, bytes of Python's sources (nats a byte)"), ("digits", "ViT, digits (nats)")]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, (task, title) in zip(axes, panels, strict=False):
        paired = complete(runs.get(task, []), GLU)
        for place, arm in enumerate(GLU):
            numbers = differences(paired, arm, "ffn_relu", "loss")
            color = plain if arm.startswith("ffn") else gated
            axis.plot(numbers, [place] * len(numbers), "o", color=color, alpha=0.45, markersize=5)
            axis.plot([statistics.mean(numbers)] * 2, [place - 0.32, place + 0.32], color=color, linewidth=3)
        axis.set_title(f"{title},\n{len({r['seed'] for r in paired})} seeds", fontsize=10)
        axis.set_xlabel("test loss minus ReLU's of the same seed")
    paper = [PAPER[arm] - PAPER["ffn_relu"] for arm in GLU]
    axes[2].scatter(paper, range(len(GLU)), c=[plain if a.startswith("ffn") else gated for a in GLU], marker="D")
    axes[2].set_title("the paper: T5-base, C4, 524,288 steps\n(arXiv 2002.05202, table 1)", fontsize=10)
    axes[2].set_xlabel("held-out log-perplexity minus ReLU's")
    for axis in axes:
        axis.locator_params(axis="x", nbins=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(GLU)), [NAMES[arm] for arm in GLU])
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    title = "Feed-forwards at equal parameters: plain (grey), gated (blue); a dot is a seed, a bar the mean; left is better"
    figure.suptitle(title, fontsize=11)
    figure.savefig(HERE / "results_glu.png", dpi=110)

    arms = TASKS["fashion"][1]
    paired = complete(runs.get("fashion", []), arms)
    figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
    for place, arm in enumerate(arms):
        numbers = [100 * v for v in values(paired, arm, "accuracy").values()]
        axis.plot(numbers, [place] * len(numbers), "o", color=gated, alpha=0.45)
        axis.plot([statistics.mean(numbers)] * 2, [place - 0.25, place + 0.25], color=gated, linewidth=3)
    axis.set_yticks(range(len(arms)), [NAMES[arm] for arm in arms])
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("test accuracy in %, a dot is a seed, a bar the mean")
    axis.set_title("Fashion-MNIST, network of arXiv 2007.14191, not private", fontsize=10)
    figure.savefig(HERE / "results_activation.png", dpi=110)


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("task", choices=TASKS)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.add_parser("table")
    commands.add_parser("draw")
    args = parser.parse_args()
    if args.command == "run":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two series then share two cores
        series(args.task, args.seeds)
    elif args.command == "draw":
        draw(stored())
    else:
        runs = stored()
        print(glu_table(runs["text"], {"loss": "test loss, nats a byte", "perplexity": "perplexity"}), end="\n\n")
        print(glu_table(runs["digits"], {"loss": "test loss, nats", "accuracy": "test accuracy"}), end="\n\n")
        print(activation_table(runs["fashion"]))


if __name__ == "__main__":
    main()

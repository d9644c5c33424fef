"""The measurements of early exits in docs/results.md: run them through the command line, store them, draw them.

    python docs/figures/results_early_exit.py run digits --seeds 0 1 2 3 4    # recipes/early_exit_digits.yaml
    python docs/figures/results_early_exit.py run text --seeds 0 1 2          # recipes/early_exit_text.yaml
    python docs/figures/results_early_exit.py run cifar10 --seeds 0           # recipes/early_exit_cifar10.yaml
    python docs/figures/results_early_exit.py table                           # prints the tables in Markdown
    python docs/figures/results_early_exit.py draw                            # results_early_exit.png
    python docs/figures/results_early_exit.py cost    # early_exit_training_step.png, by tests/benchmarks/early_exit.py

Run from the root of the repository, with the data sets in the folder that GATEPLUG_DATA names; `--pretrained FOLDER` takes the
checkpoint of the text from a folder, `--image-column NAME` is for a copy of CIFAR-10 whose column is not the hub's. `--arms`
chooses arms. A run that is stored already is not repeated.

An arm is a training; on its exits each rule is judged. Its threshold is fitted on the validation set, so that the mean of the
multiply-adds comes as near to a target as it can from below, and then used on the test set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from results import Run, cell, differences, stored, values

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
STORE = HERE / "results_early_exit.json"
RECIPES = {"digits": "early_exit_digits", "text": "early_exit_text", "cifar10": "early_exit_cifar10"}
SETTINGS: dict[str, dict[str, Any]] = {
    "jei": {},
    "heads": {"gate": "confidence"},
    "hazard": {"mode": "hazard"},
    "uniform": {"weighting": "uniform"},
    "only_confidence": {"features": ["confidence"]},
    "only_entropy": {"features": ["entropy"]},
    "only_margin": {"features": ["margin"]},
}
"""Arm -> what it changes of the recipe's EarlyExit."""
CDF = "cdf"
"""The first arm's network with its gates read otherwise: both modes have one P, and so one training."""
PLAIN = "plain"
"""The network without exits."""
ARMS = {"digits": (*SETTINGS, PLAIN), "text": ("jei", "heads"), "cifar10": ("jei", "heads")}
RULES = ("jei", "confidence", "entropy", "patience")
TARGETS = ("own", 0.3, 0.5, 0.7)
"""Shares of the network's multiply-adds; own: what the trained gates spend on the validation set at their threshold of .5."""
GRID = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Targets of the picture."""
NAMES = {
    "jei": "official, exit_prob, four features",
    "heads": "heads trained alone",
    "cdf": "mode cdf",
    "hazard": "mode hazard",
    "uniform": "weighting uniform",
    "only_confidence": "gates see the confidence alone",
    "only_entropy": "gates see the entropy alone",
    "only_margin": "gates see the margin alone",
}
ALPHA = 0.05


class Heard(NamedTuple):
    """What a network with exits says of a set of N samples."""

    logits: Tensor
    """(N, L, C), the last exit is the network's own head."""
    gates: Tensor
    """(N, K) in (0, 1)."""
    labels: Tensor
    """(N,)."""


def measure(task: str, arm: str, seed: int, pretrained: str | None, image_column: str | None = None) -> list[Run]:
    """Train one arm with one seed; what each rule comes to on the test set, seconds. The first arm is judged in two modes."""
    import json

    import yaml

    import gateplug as gp
    from gateplug.cli import main as gateplug

    recipe = yaml.safe_load(Path(f"recipes/{RECIPES[task]}.yaml").read_text())
    (plug,) = recipe["trainer"]["callbacks"]
    plug["init_args"] |= SETTINGS.get(arm, {})
    with tempfile.TemporaryDirectory() as folder:
        args = ["fit", "-c", f"recipes/{RECIPES[task]}.yaml", "--seed_everything", str(seed), f"--data.seed={seed}"]
        args += [f"--trainer.callbacks={json.dumps([] if arm == PLAIN else [plug])}", "--trainer.default_root_dir", folder]
        args += ["--trainer.enable_progress_bar=false"]
        if pretrained is not None and task == "text":
            args += [f"--model.net.pretrained={pretrained}", f"--data.tokenizer={pretrained}"]
        if image_column is not None and task == "cifar10":
            args.append(f"--data.image_column={image_column}")
        start = time.perf_counter()
        if gateplug(args):
            raise SystemExit(f"{task}, {arm}, seed {seed}: the run failed")
        seconds = time.perf_counter() - start
        (saved,) = Path(folder).rglob("last.ckpt")
        module = gp.load(saved).eval()
    told = recipe["data"]["init_args"] | {"seed": seed}
    if "tokenizer" in told and pretrained is not None:
        told["tokenizer"] = pretrained
    if "image_column" in told and image_column is not None:
        told["image_column"] = image_column
    data = getattr(gp, recipe["data"]["class_path"])(**told)
    data.setup("fit")
    data.setup("test")
    test = hear(module, data.test_dataloader())
    head = {"arm": arm, "seed": seed, "seconds": round(seconds, 1)}
    if arm == PLAIN:
        right = test.logits[:, -1].argmax(-1) == test.labels
        return [head | {"exits": [round(float(right.double().mean()), 5)]}]
    val = hear(module, data.val_dataloader())
    runs = [head | judge(module, val, test, plug["init_args"])]
    if arm == "jei":
        runs.append(head | {"arm": CDF} | judge(module, val, test, plug["init_args"] | {"mode": CDF}))
    return runs


def hear(module: Any, loader: Any) -> Heard:
    """Run the whole network on a set and listen to every exit."""
    import torch

    from gateplug.early_exit.branch import ExitBranch

    branches = [m for m in module.modules() if isinstance(m, ExitBranch)]
    parts = []
    for batch in loader:
        for branch in branches:
            branch.listening = True
        with torch.no_grad():
            last = module.predict_step(batch, 0)["probabilities"].log()  # logits up to a constant of each sample
            logits: list[Any] = [branch.logits for branch in branches]
            gates = [branch.gate(z).sigmoid() for branch, z in zip(branches, logits, strict=True)]
        gated = torch.stack(gates, 1) if gates else last[:, :0]
        parts.append((torch.stack([*logits, last.clamp_min(-100)], 1), gated, batch["labels"]))
        for branch in branches:
            branch.listening = False
            branch.forget()
    return Heard(*(torch.cat(part) for part in zip(*parts, strict=True)))


def judge(module: Any, val: Heard, test: Heard, settings: dict[str, Any]) -> dict[str, Any]:
    """Each rule at each target, fitted on validation samples and judged on test samples; and what each exit can."""
    import torch

    from gateplug.early_exit.branch import ExitBranch
    from gateplug.early_exit.functional import first_exit, fit_threshold
    from gateplug.early_exit.validation import scores_of

    mode = settings.get("mode", "official")
    cost = torch.tensor([*(float(m.cost) for m in module.modules() if isinstance(m, ExitBranch)), 1.0]).double()
    scores = {rule: [scores_of(rule, mode, s.gates, s.logits[:, :-1]) for s in (val, test)] for rule in RULES}
    right = test.logits.argmax(-1) == test.labels[:, None]
    out: dict[str, Any] = {"costs": [round(c, 4) for c in cost.tolist()]}
    out["exits"] = [round(a, 5) for a in right.double().mean(0).tolist()]
    own = float(cost[first_exit(scores["jei"][0], 0.5)].mean())
    answers: dict[tuple[str, Any], Tensor] = {}
    for rule in RULES:
        if rule == "jei" and settings.get("gate", "jei") != "jei":
            continue
        for target in TARGETS:
            most = max(own if target == "own" else float(target), float(cost[0]))
            if rule == "jei" and target == "own":
                threshold = 0.5
            elif target == "own" and settings.get("gate", "jei") != "jei":
                continue
            else:
                threshold = fit_threshold(scores[rule][0], cost, target_cost=most)
            exits = [first_exit(s, threshold) for s in scores[rule]]
            out |= {f"{rule}/{target}/{name}": round(v, 5) for name, v in quality(val, test, exits, cost).items()}
            answers[rule, target] = right.gather(1, exits[1][:, None])[:, 0].double()
        out[f"{rule}/curve"] = []
        for most in GRID:
            threshold = fit_threshold(scores[rule][0], cost, target_cost=max(most, float(cost[0])))
            at = first_exit(scores[rule][1], threshold)
            accuracy = float(right.gather(1, at[:, None]).double().mean())
            out[f"{rule}/curve"].append([round(float(cost[at].mean()), 4), round(accuracy, 5)])
    for (rule, target), answer in answers.items():
        other = answers["confidence", target]
        out[f"{rule}/{target}/error"] = round(float((answer - other).std()) / len(other) ** 0.5, 5)
    return out


def quality(val: Heard, test: Heard, exits: Sequence[Tensor], cost: Tensor) -> dict[str, float]:
    """The answers of a network whose samples leave at these exits (of the validation and of the test samples)."""
    import gateplug as gp

    rows = test.logits.gather(1, exits[1][:, None, None].expand(-1, 1, test.logits.shape[2]))[:, 0]
    accuracy = float((rows.argmax(-1) == test.labels).double().mean())
    error = gp.ExitCalibration(test.logits.shape[1])
    error.update(test.logits, exits[1], test.labels)
    sets = gp.ConformalCoverage(ALPHA, "general")
    sets.fit(val.logits.softmax(-1), exits[0], val.labels)
    sets.update(test.logits.softmax(-1), exits[1], test.labels)
    found = sets.compute()
    mixed = {"accuracy": accuracy, "cost": float(cost[exits[1]].mean()), "ece": float(error.compute()["mixture"])}
    return mixed | {"size": float(found["size"]), "coverage": float(found["coverage"])}


def shown(numbers: Sequence[float], digits: int, signed: bool = False) -> str:
    """Mean ± standard deviation over the seeds; of one seed the number."""
    if len(numbers) == 1:
        return f"{numbers[0]:{'+' if signed else ''}.{digits}f}"
    return cell(numbers, digits, signed)


def listed(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def mean(runs: Sequence[Run], arm: str, quantity: str, digits: int = 4) -> str:
    """Mean ± standard deviation over the seeds."""
    return shown(list(values(runs, arm, quantity).values()), digits)


def rules(runs: Sequence[Run]) -> str:
    """All rules on the same exits at equal cost, and a threshold on the confidence of heads that were trained without gates."""
    rows = [["target", "rule", "test accuracy", "minus confidence's", "cost in the test", "ECE", "set size", "coverage"]]
    for target in TARGETS:
        for arm, rule in [*(("jei", rule) for rule in RULES), ("heads", "confidence")]:
            key = f"{rule}/{target}"
            if not any(f"{key}/accuracy" in r for r in runs if r["arm"] == arm):
                continue
            name = rule if arm == "jei" else f"{rule}, heads trained alone"
            row = [str(target), name, mean(runs, arm, f"{key}/accuracy")]
            row.append("" if (arm, rule) == ("jei", "confidence") else minus(runs, (arm, key), ("jei", f"confidence/{target}")))
            row += [mean(runs, arm, f"{key}/{q}", 3) for q in ("cost", "ece", "size", "coverage")]
            rows.append(row)
    return listed(rows)


def minus(runs: Sequence[Run], one: tuple[str, str], other: tuple[str, str]) -> str:
    """Paired difference in accuracy of two (arm, rule/target); of one seed with its standard error over the test samples."""
    pair = [values(runs, arm, f"{key}/accuracy") for arm, key in (one, other)]
    both = sorted(set(pair[0]) & set(pair[1]))
    text = shown([pair[0][s] - pair[1][s] for s in both], 4, True) if both else ""
    error = next((r.get(f"{one[1]}/error") for r in runs if r["arm"] == one[0]), None)
    # one training says nothing of the spread between trainings, but the test samples have one
    return f"{text} ± {error:.4f} (samples)" if len(both) == 1 and one[0] == other[0] and error is not None else text


def trainings(runs: Sequence[Run]) -> str:
    """Gates of every arm: at the threshold of .5 and at equal cost."""
    heads = [f"accuracy at {t}" for t in TARGETS[1:]]
    rows = [["gates", "accuracy at θ = .5", "cost at θ = .5", *heads, "at 0.3, minus the first row's", "whole network"]]
    for arm in ("jei", CDF, *list(SETTINGS)[2:]):
        if not any(r["arm"] == arm for r in runs):
            continue
        row = [NAMES[arm], mean(runs, arm, "jei/own/accuracy"), mean(runs, arm, "jei/own/cost", 3)]
        row += [mean(runs, arm, f"jei/{target}/accuracy") for target in TARGETS[1:]]
        row.append("" if arm == "jei" else cell(differences(runs, arm, "jei", "jei/0.3/accuracy"), 4, True))
        row.append(cell([r["exits"][-1] for r in runs if r["arm"] == arm], 4))
        rows.append(row)
    return listed(rows)


def exits(runs: Sequence[Run]) -> str:
    """Accuracy of each exit on all test samples."""
    arms = [arm for arm in ("jei", "heads") if any(r["arm"] == arm for r in runs)]
    costs = next(r["costs"] for r in runs if "costs" in r)
    rows = [["all samples at", *(f"exit {i}" for i in range(len(costs) - 1)), "the network"]]
    rows.append(["cost", *(f"{c:.3f}" for c in costs)])
    for arm in arms:
        each = [r["exits"] for r in runs if r["arm"] == arm]
        name = "heads trained with gates" if arm == "jei" else NAMES[arm]
        rows.append([f"accuracy, {name}", *(shown([run[i] for run in each], 4) for i in range(len(costs)))])
    if plain := [r["exits"][-1] for r in runs if r["arm"] == PLAIN]:
        rows.append(["accuracy, trained without exits", *([""] * (len(costs) - 1)), shown(plain, 4)])
    return listed(rows)


def table(task: str, runs: Sequence[Run]) -> str:
    """The tables of a task."""
    parts = [exits(runs), rules(runs)] + ([trainings(runs)] if any(r["arm"] == "hazard" for r in runs) else [])
    took = [r["seconds"] for r in runs if r["arm"] not in (CDF, PLAIN)]
    seeds = sorted({r["seed"] for r in runs})
    parts.append(f"Seeds {seeds}; seconds of a run: median {statistics.median(took):.0f} [{min(took):.0f} … {max(took):.0f}].")
    return f"{task}\n\n" + "\n\n".join(parts)


def draw(runs: dict[str, list[Run]]) -> None:
    """Accuracy against cost in the test, a line a rule, mean over the seeds; each point is a target of GRID."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip(RULES, ("#2166ac", "#d6604d", "#4d9221", "#8c8c8c"), strict=True))
    tasks = [task for task in RECIPES if runs.get(task)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.8), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        seeds = len({r["seed"] for r in runs[task]})
        for arm, style in (("jei", "-"), ("heads", "--")):
            mine = [r for r in runs[task] if r["arm"] == arm]
            for rule in RULES:
                curves = [r[f"{rule}/curve"] for r in mine if f"{rule}/curve" in r]
                if not curves or (arm == "heads" and rule != "confidence"):
                    continue
                x, y = ([statistics.mean(c[i][which] for c in curves) for i in range(len(GRID))] for which in (0, 1))
                label = rule if arm == "jei" else f"{rule}, heads trained alone"
                axis.plot(x, y, style, marker="o", markersize=3, color=colors[rule], label=label, linewidth=1.4)
        whole = statistics.mean(r["exits"][-1] for r in runs[task] if r["arm"] == "jei")
        axis.axhline(whole, color="black", linewidth=0.8, linestyle=":", label="jei's whole network")
        axis.set(xlabel="mean cost, share of the network's multiply-adds", ylabel="test accuracy")
        axis.set_title(f"{task}, " + (f"mean of {seeds} seeds" if seeds > 1 else "one seed"), fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.savefig(HERE / "results_early_exit.png", dpi=110)


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("task", choices=ARMS)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    run.add_argument("--arms", nargs="+", choices=[*SETTINGS, PLAIN])
    run.add_argument("--pretrained", help="folder of the text's checkpoint, in place of its hub id")
    run.add_argument("--image-column", help="of the copy of CIFAR-10, if it is not the hub's")
    commands.add_parser("table")
    commands.add_parser("draw")
    commands.add_parser("cost")
    args = parser.parse_args()
    if args.command == "run":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for seed in args.seeds:
            for arm in args.arms or ARMS[args.task]:
                if not any(r["arm"] == arm and r["seed"] == seed for r in stored(store=STORE).get(args.task, [])):
                    for result in measure(args.task, arm, seed, args.pretrained, args.image_column):
                        stored((args.task, result), STORE)
                        print(args.task, result, flush=True)
    elif args.command == "draw":
        draw(stored(store=STORE))
    elif args.command == "cost":
        figure = str(HERE / "early_exit_training_step.png")
        subprocess.run([sys.executable, "tests/benchmarks/early_exit.py", "--figure", figure], check=True)
    else:
        for task, runs in stored(store=STORE).items():
            print(f"{table(task, runs)}\n")


if __name__ == "__main__":
    main()

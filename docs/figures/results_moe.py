"""The measurements of mixtures in docs/results.md: run them through the command line, store them, draw them.

    python docs/figures/results_moe.py run synthetic128 --seeds 0 1 2 3 4    # recipes/dselectk_synthetic128.yaml
    python docs/figures/results_moe.py run multifashion --seeds 0 1 2 3 4    # recipes/dselectk_multifashion.yaml
    python docs/figures/results_moe.py run movielens --seeds 0 1 2 3 4       # recipes/dselectk_movielens.yaml
    python docs/figures/results_moe.py table                                 # prints the tables in Markdown
    python docs/figures/results_moe.py draw                                  # results_moe.png
    python docs/figures/results_moe.py cost                                  # moe_experts_cost.png, by tests/benchmarks/moe.py

Run from the root of the repository, with the data sets in the folder that GATEPLUG_DATA names. A run that is stored already is
not repeated. All arms of a seed see the same batches in the same order; they differ by the gate alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import Run, cell, differences, stored, values

HERE = Path(__file__).parent
STORE = HERE / "results_moe.json"
NAMES = {
    "softmax": "softmax, all experts",
    "top_k": "top-k",
    "dselect_k": "DSelect-k",
    "dselect_k_free": "DSelect-k, no entropy term",
}
NAMES |= {f"{arm}_x": f"{name}, per example" for arm, name in list(NAMES.items())[:3]}
STATIC, EXAMPLE = ("softmax", "top_k", "dselect_k"), ("softmax_x", "top_k_x", "dselect_k_x")
ARMS = {
    "synthetic128": (*STATIC, "dselect_k_free"),
    "multifashion": (*STATIC, *EXAMPLE),
    "movielens": (*STATIC, *EXAMPLE),
}
SHAPE = {"synthetic128": (16, 128, None), "multifashion": (8, 2, 1296), "movielens": (8, 2, 64)}
"""Experts, tasks, and what a gate per example looks at."""
QUALITY = {
    "synthetic128": {"y/mse": "test MSE"},
    "multifashion": {"left/accuracy": "left accuracy", "right/accuracy": "right accuracy", "loss": "test loss"},
    "movielens": {"rating/mse": "rating MSE", "click/auroc": "click AUROC", "loss": "test loss"},
}


def gate(task: str, arm: str) -> dict[str, Any]:
    """The gate of an arm, as the command line takes it; of DSelect-k, what the recipe says of the entropy."""
    import yaml

    experts, tasks, width = SHAPE[task]
    dim = {"dim": width} if arm.endswith("_x") else {}
    if arm.startswith("softmax"):
        return {"class_path": "SoftmaxGate", "init_args": {"experts": experts, "tasks": tasks, **dim}}
    if arm.startswith("top_k"):
        return {"class_path": "TopKGate", "init_args": {"experts": experts, "k": 2, "tasks": tasks, **dim}}
    net = yaml.safe_load(Path(f"recipes/dselectk_{task}.yaml").read_text())["model"]["init_args"]["net"]["init_args"]
    own = net.get("gate", net.get("gates"))
    other: dict[str, Any] = {"entropy": 0.0} if arm.endswith("free") else {}
    if task == "multifashion" and arm.endswith("_x"):  # a gate per example decides under a fifth of what a static one needs
        other = {"entropy": {**own["init_args"]["entropy"], "end": 0.1}}
    return {"class_path": "DSelectK", "init_args": {**own["init_args"], **other, **dim}}


def measure(task: str, arm: str, seed: int) -> Run:
    """Train one arm with one seed; its test metrics, what its gates select, seconds."""
    from gateplug.cli import main as gateplug

    argument = "gates" if task == "synthetic128" else "gate"
    with tempfile.TemporaryDirectory() as folder:
        args = ["fit", "-c", f"recipes/dselectk_{task}.yaml", "--seed_everything", str(seed), f"--data.seed={seed}"]
        args += [f"--model.net.init_args.{argument}={json.dumps(gate(task, arm))}", "--trainer.default_root_dir", folder]
        args += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.enable_progress_bar=false"]
        args = [a for a in args if not (task == "movielens" and a.startswith("--data.seed"))]
        if not arm.startswith("dselect") or arm.endswith("free"):
            args += ["--trainer.callbacks=[]"]  # a gate without terms of its own: nothing to regulate
        start = time.perf_counter()
        if gateplug(args):
            raise SystemExit(f"{task}, {arm}, seed {seed}: the run failed")
        seconds = time.perf_counter() - start
        (table,) = Path(folder).rglob("metrics.csv")
        with table.open(encoding="utf-8") as file:
            tested = [{k: v for k, v in row.items() if v and k.startswith("test/")} for row in csv.DictReader(file)]
        (saved,) = Path(folder).rglob("last.ckpt")
        chosen = selection(task, saved, seed)
    metrics = {name.removeprefix("test/"): round(float(v), 5) for row in tested for name, v in row.items()}
    return {"arm": arm, "seed": seed, "seconds": round(seconds, 1), **chosen, **metrics}


def selection(task: str, path: Path, seed: int) -> dict[str, float]:
    """What the gates of a checkpoint select: a set is the experts with q > 0.01."""
    import torch

    import gateplug as gp
    from gateplug.moe.functional import selection_overlap
    from gateplug.moe.routing import ExpertGate
    from recipes import networks

    module = gp.load(path, register=[networks.MultiTaskCNN, networks.RatingNet])
    (found,) = (m for m in module.modules() if isinstance(m, ExpertGate))
    if found.static:
        q = found.weights()
    else:
        seen: list[torch.Tensor] = []
        found.tap.register_forward_hook(lambda m, a, out: seen.append(out.weights))
        data = test_data(task, seed)
        with torch.no_grad():
            for batch, _ in zip(data, range(20), strict=False):
                module.predict_step(batch, 0)
        q = torch.cat(seen)
    used, left = (q > 0.01).sum(-1).float(), (q != 0).sum(-1).float()
    out = {"experts": used.mean(), "at_most_k": (used <= 2).float().mean(), "nonzero": left.mean()}
    if task == "synthetic128":
        within, between = selection_overlap(q > 0.01, gp.SyntheticTasks(seed=seed).groups)
        out |= {"within": within, "between": between}
    return {name: round(float(v), 4) for name, v in out.items()}


def test_data(task: str, seed: int) -> Any:
    """The test batches of a recipe."""
    import gateplug as gp

    root = Path(os.environ["GATEPLUG_DATA"])
    if task == "movielens":
        return gp.Ratings(path=str(root / "ml-latest-small")).test_dataloader()
    images = gp.ImageData(path=str(root / "fashion_mnist"), mode="L", mean=[0.2860], std=[0.3530])
    return gp.OverlaidImages(images, seed=seed).test_dataloader()


def table(task: str, runs: Sequence[Run]) -> str:
    """One comparison in Markdown."""
    arms = [arm for arm in ARMS[task] if any(r["arm"] == arm for r in runs)]
    quality = QUALITY[task]
    main = next(iter(quality))
    head = ["gate", *quality.values(), "experts with q > 0.01", "share with ≤ 2", "experts with q ≠ 0"]
    head += ["overlap within / between groups"] if task == "synthetic128" else []
    head += [f"{next(iter(quality.values()))}, minus DSelect-k's"]
    rows = [head, ["---"] * len(head)]
    for arm in arms:
        cells = [cell(list(values(runs, arm, q).values()), 4) for q in (*quality,)]
        for name in ("experts", "at_most_k", "nonzero"):
            cells.append(f"{statistics.mean(values(runs, arm, name).values()):.2f}")
        if task == "synthetic128":
            pair = [statistics.mean(values(runs, arm, name).values()) for name in ("within", "between")]
            cells.append(f"{pair[0]:.2f} / {pair[1]:.2f}")
        other = "dselect_k_x" if arm.endswith("_x") else "dselect_k"
        cells.append("" if arm == other else cell(differences(runs, arm, other, main), 4, True))
        rows.append([NAMES[arm], *cells])
    took = [r["seconds"] for r in runs]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"Seeds {sorted({r['seed'] for r in runs})}; seconds of a run: median {statistics.median(took):.0f}"]
    lines[-1] += f" [{min(took):.0f} … {max(took):.0f}]."
    return "\n".join(lines)


def draw(runs: dict[str, list[Run]]) -> None:
    """Quality of each gate, a dot a seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    titles = {
        "synthetic128": "128 tasks, 16 experts",
        "multifashion": "Multi-Fashion, 8 experts",
        "movielens": "MovieLens, 8 experts",
    }
    for axis, (task, title) in zip(axes, titles.items(), strict=True):
        quantity, label = next(iter(QUALITY[task].items()))
        arms = [arm for arm in ARMS[task] if any(r["arm"] == arm for r in runs.get(task, []))]
        for place, arm in enumerate(arms):
            numbers = list(values(runs[task], arm, quantity).values())
            color = "#2166ac" if arm.startswith("dselect") else "#8c8c8c"
            axis.plot(numbers, [place] * len(numbers), "o", color=color, alpha=0.45)
            axis.plot([statistics.mean(numbers)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=3)
        axis.set_yticks(range(len(arms)), [NAMES[arm] for arm in arms])
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(label)
        axis.set_title(title, fontsize=10)
    figure.suptitle("Gates at k = 2 (softmax: all experts); a dot is a seed, a bar the mean", fontsize=11)
    figure.savefig(HERE / "results_moe.png", dpi=110)


def main() -> None:
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("task", choices=ARMS)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    commands.add_parser("table")
    commands.add_parser("draw")
    commands.add_parser("cost")
    args = parser.parse_args()
    if args.command == "run":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two series then share two cores
        for seed in args.seeds:
            for arm in ARMS[args.task]:
                if not any(r["arm"] == arm and r["seed"] == seed for r in stored(store=STORE).get(args.task, [])):
                    result = measure(args.task, arm, seed)
                    stored((args.task, result), STORE)
                    print(args.task, result, flush=True)
    elif args.command == "draw":
        draw(stored(store=STORE))
    elif args.command == "cost":
        figure = str(HERE / "moe_experts_cost.png")
        subprocess.run([sys.executable, "tests/benchmarks/moe.py", "--figure", figure], check=True)
    else:
        for task, runs in stored(store=STORE).items():
            print(f"{task}\n\n{table(task, runs)}\n")


if __name__ == "__main__":
    main()

"""The measurements of continual learning in docs/results.md: run them through the command line, store them, draw them.

    python docs/figures/results_continual.py run digits --seeds 0 1 2 3 4        # recipes/gateon_digits.yaml
    python docs/figures/results_continual.py run fashion --seeds 0 1 2           # ten permuted Fashion-MNIST tasks
    python docs/figures/results_continual.py run text --seeds 0 1 2              # recipes/gateon_bert_sentiment.yaml
    python docs/figures/results_continual.py run detector --seeds 0 1 2          # recipes/gateon_unsupervised.yaml
    python docs/figures/results_continual.py table                               # prints the tables in Markdown
    python docs/figures/results_continual.py draw                                # results_continual.png

Run from the root of the repository, with the data sets in the folder that GATEPLUG_DATA names. A run that is stored already is
not repeated. All arms of a seed see the same batches in the same order; they differ by the plugs alone. Joint training sees the
tasks in turn, a batch of each, in as many steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from results import Run, cell, stored, values

HERE = Path(__file__).parent
STORE = HERE / "results_continual.json"
RECIPE = {
    "digits": "gateon_digits",
    "fashion": "gateon_digits",
    "text": "gateon_bert_sentiment",
    "detector": "gateon_unsupervised",
}
FASHION = {"class_path": "ImageData", "init_args": {"name": "zalando-datasets/fashion_mnist", "mode": "L", "batch_size": 128}}
WEIGHTS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {"ewc": {"weight": 20000.0}, "si": {"weight": 0.1, "xi": 1e-3}, "mas": {"weight": 0.01}},
    "fashion": {"ewc": {"weight": 1000.0}, "si": {"weight": 1.0}, "mas": {"weight": 1.0}},
    "text": {"ewc": {"weight": 1000.0}, "si": {"weight": 1.0}, "mas": {"weight": 1.0}},
}
"""Of the baselines: the best of a grid on the validation set, with seed 10."""
BUFFER = {"digits": 500, "fashion": 500, "text": 200}
NAMES = {
    "fine_tuning": "fine-tuning",
    "gates": "gates alone",
    "obstruct": "obstruction alone (n)",
    "n": "n-GateON",
    "p": "p-GateON",
    "ewc": "EWC",
    "si": "SI",
    "mas": "MAS",
    "er": "ER",
    "der": "DER++",
    "joint": "joint training",
}
ARMS = {
    "digits": tuple(NAMES),
    "fashion": tuple(NAMES),
    "text": ("fine_tuning", "gates", "n", "p", "ewc", "er", "joint"),
    "detector": ("told", "detected"),
}
NEEDS = {"gates", "obstruct", "n", "p"}
"""Arms that must be told at test which task a sample is of."""


def plugs(task: str, arm: str) -> list[dict[str, Any]]:
    """The callbacks of an arm, beside the metrics."""
    recipe = yaml.safe_load(Path(f"recipes/{RECIPE[task]}.yaml").read_text())
    (own,) = (c.get("init_args", {}) for c in recipe["trainer"]["callbacks"] if c["class_path"] == "GateON")
    none = {"relevance": "none", "obstruct": "none"}
    gateon = {
        "gates": {**own, **none},
        "obstruct": {**own, "open_share": 0.9999, "lr_scale": 0.0},  # gates that are open and stay so
        "n": own,
        "p": {**own, "relevance": "parameter"},
        "told": own,
    }
    if arm in gateon:
        return [{"class_path": "GateON", "init_args": gateon[arm]}]
    if arm == "detected":
        return [c for c in recipe["trainer"]["callbacks"] if c["class_path"] != "ContinualMetrics"]
    classes = {"ewc": "EWC", "si": "SynapticIntelligence", "mas": "MAS"}
    if arm in classes:
        return [{"class_path": classes[arm], "init_args": WEIGHTS[task][arm]}]
    if arm in ("er", "der"):
        kind = {"er": "er", "der": "der++"}[arm]
        return [{"class_path": "Replay", "init_args": {"samples": BUFFER[task], "kind": kind}}]
    return []


def options(task: str, arm: str, seed: int) -> list[str]:
    """What an arm changes in its recipe."""
    data = yaml.safe_load(Path(f"recipes/{RECIPE[task]}.yaml").read_text())["data"]["init_args"]
    args = [f"--seed_everything={seed}", f"--data.seed={seed}"]
    tasks, steps, every = data.get("num_tasks", 4), data["steps_per_task"], 1
    if task == "fashion":
        tasks, steps = 10, 200
        args += [
            f"--data.base={json.dumps(FASHION)}",
            "--data.num_tasks=10",
            "--model.net.inputs=784",
            "--model.optimizer.lr=1e-3",
        ]
    if task != "text":
        args += [f"--data.base.seed={seed}"]
    if arm == "joint":
        every = tasks * steps
        args += [f"--data.order={[i % tasks for i in range(every)]}", "--data.steps_per_task=1"]
    metrics = {"class_path": "ContinualMetrics", "init_args": {"every_task": every}}
    return [*args, f"--trainer.callbacks={json.dumps([metrics, *plugs(task, arm)])}"]


def measure(task: str, arm: str, seed: int, more: Sequence[str] = ()) -> Run:
    """Train one arm with one seed: figures of validation, accuracy of the test, seconds, and bytes that a checkpoint takes."""
    from gateplug.cli import main as gateplug

    with tempfile.TemporaryDirectory() as folder:
        args = ["fit", "-c", f"recipes/{RECIPE[task]}.yaml", *options(task, arm, seed), "--trainer.default_root_dir", folder]
        args += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.enable_progress_bar=false"]
        start = time.perf_counter()
        if gateplug([*args, *more]):
            raise SystemExit(f"{task}, {arm}, seed {seed}: the run failed")
        seconds = time.perf_counter() - start
        (table,) = Path(folder).rglob("metrics.csv")
        with table.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        (saved,) = Path(folder).rglob("last.ckpt")
        found: dict[str, Any] = {"bytes": saved.stat().st_size}
        for path in Path(folder).rglob("contexts.csv"):
            events = csv.DictReader(path.open(encoding="utf-8"))
            found["events"] = [f"{e['step']} {e['from']}→{e['to']} {e['kind']}" for e in events]
        for path in Path(folder).rglob("accuracy_matrix.csv"):
            lines = list(csv.reader(path.open(encoding="utf-8")))
            found["last"] = [float(v) for v in lines[-1][1:]]
    wanted = [f"continual/{n}" for n in ("average_accuracy", "backward_transfer", "learning_accuracy", "test/average_accuracy")]
    wanted += ["continual/test/context_accuracy"]
    for name in wanted:
        column = [row[name] for row in rows if row.get(name)]
        if column:
            found[name.removeprefix("continual/")] = round(float(column[-1]), 5)
    return {"arm": arm, "seed": seed, "seconds": round(seconds, 1), **found}


def series(task: str, arms: Sequence[str], seeds: Sequence[int], more: Sequence[str]) -> None:
    """Measure what is not stored yet."""
    for seed in seeds:
        for arm in arms:
            if not any(r["arm"] == arm and r["seed"] == seed for r in stored(store=STORE).get(task, [])):
                stored((task, measure(task, arm, seed, more)), STORE)


def mean(runs: Sequence[Run], arm: str, quantity: str) -> float:
    """Over the seeds."""
    return statistics.mean(values(runs, arm, quantity).values())


def table(task: str, runs: Sequence[Run]) -> str:
    """ACC and BWT of every arm, with what it takes."""
    shown = {"test/average_accuracy": "test ACC, %", "backward_transfer": "BWT, %", "learning_accuracy": "learning accuracy, %"}
    head = ["", "context at test", *shown.values(), "more in a checkpoint, MB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in ARMS[task]:
        if not any(r["arm"] == arm for r in runs):
            continue
        found = [[100 * r[name] for r in runs if r["arm"] == arm and name in r] for name in shown]
        columns = [cell(numbers, 1) if numbers else "" for numbers in found]
        size = (mean(runs, arm, "bytes") - mean(runs, "fine_tuning", "bytes")) / 1e6
        told = "yes" if arm in NEEDS else "no"
        lines.append(f"| {NAMES[arm]} | {told} | {' | '.join(columns)} | {size:.2f} |")
    return "\n".join(lines)


def detected(runs: Sequence[Run]) -> str:
    """What the detector noticed, seed by seed."""
    lines = ["| seed | changes of context | right context at test | test ACC, % | told, % |", "|---|---|---|---|---|"]
    told = values(runs, "told", "test/average_accuracy")
    for r in runs:
        if r["arm"] == "detected":
            acc, right = (100 * r[n] for n in ("test/average_accuracy", "test/context_accuracy"))
            lines.append(f"| {r['seed']} | {', '.join(r['events'])} | {right:.0f} % | {acc:.1f} | {100 * told[r['seed']]:.1f} |")
    return "\n".join(lines)


def draw(results: dict[str, list[Run]]) -> None:
    """Test accuracy of every arm on every stream."""
    from matplotlib.figure import Figure

    shown = [task for task in ("digits", "fashion", "text") if results.get(task)]
    figure = Figure(figsize=(4 * len(shown), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        arms = [arm for arm in ARMS[task] if any(r["arm"] == arm for r in results[task])]
        for i, arm in enumerate(reversed(arms)):
            points = [100 * v for v in values(results[task], arm, "test/average_accuracy").values()]
            axes.plot(points, [i] * len(points), "o", color="C1" if arm in NEEDS else "C0", alpha=0.6)
        axes.set_yticks(range(len(arms)), [NAMES[arm] for arm in reversed(arms)], fontsize=8)
        axes.set_xlabel("test accuracy over all tasks, %")
        axes.set_title(task, fontsize=10)
        axes.grid(alpha=0.3)
    figure.savefig(HERE / "results_continual.png", dpi=110)


def main() -> None:
    """Read the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("run")
    measured.add_argument("task", choices=RECIPE)
    measured.add_argument("--arms", nargs="+")
    measured.add_argument("--seeds", nargs="+", type=int, default=[0])
    commands.add_parser("table")
    commands.add_parser("draw")
    given, more = parser.parse_known_args()
    if given.command == "run":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        series(given.task, given.arms or ARMS[given.task], given.seeds, more)
    elif given.command == "table":
        for task, runs in stored(store=STORE).items():
            print(f"\n### {task}\n\n{detected(runs) if task == 'detector' else table(task, runs)}")
    else:
        draw(stored(store=STORE))


if __name__ == "__main__":
    main()

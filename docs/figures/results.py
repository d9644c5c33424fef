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
import fcntl
import json
import os
import statistics
import tempfile
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
    from gateplug.cli.record import Record
    from gateplug.cli.training import GateplugCLI, short_function_names

    recipe, _, options, split = TASKS[task]
    short_function_names()
    with tempfile.TemporaryDirectory() as folder:
        args = ["fit", "-c", f"recipes/{recipe}.yaml", "--seed_everything", str(seed), "--trainer.default_root_dir", folder]
        args += [*options(arm), *([f"--data.seed={seed}"] if split else [])]
        cli = GateplugCLI(Record(), args)
    tested = {name.removeprefix("test/"): round(v, 5) for name, v in cli.metrics.items() if name.startswith("test/")}
    parameters = sum(p.numel() for p in cli.model.parameters())
    return {"arm": arm, "seed": seed, "parameters": parameters, "seconds": round(cli.seconds["fit"], 1), **tested}


def stored(new: tuple[str, Run] | None = None) -> dict[str, list[Run]]:
    """All stored runs, with a new one added; two series may run at once."""
    with STORE.open("a+") as file:
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


if __name__ == "__main__":
    main()

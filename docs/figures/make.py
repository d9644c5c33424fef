"""Draw the pictures of the documentation with gateplug itself: `python docs/figures/make.py`, about two minutes.

Each function writes PNG files into a folder. Trainings are seeded, so a second run draws the same pictures on the same machine.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure

import gateplug as gp
from gateplug.cli import main as gateplug
from gateplug.core.activations import ACTIVATIONS
from gateplug.glu import functional as glu
from gateplug.moe import functional as moe
from gateplug.privacy import functional as privacy

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def tempered_sigmoid(folder: Path) -> None:
    """The family s · σ(T x) - o, one parameter at a time."""
    x = torch.linspace(-4, 4, 400)
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    rows = [
        ("temperature T", [(2.0, t, 1.0) for t in (0.5, 1.0, 2.0, 4.0)]),
        ("scale s, offset s / 2", [(s, 2.0, s / 2) for s in (1.0, 2.0, 3.0)]),
        ("known members", [(2.0, 2.0, 1.0), (1.0, 1.0, 0.0)]),
    ]
    names = {(2.0, 2.0, 1.0): " = tanh", (1.0, 1.0, 0.0): " = logistic"}
    for axes, (title, members) in zip(figure.subplots(1, 3, sharey=True), rows, strict=True):
        for s, t, o in members:
            label = f"({s:g}, {t:g}, {o:g})" + names.get((s, t, o), "")
            axes.plot(x, privacy.tempered_sigmoid(x, s, t, o), label=label)
        axes.set(title=title, xlabel="x")
        axes.grid(alpha=0.3)
        axes.legend(title="(s, T, o)", fontsize=7, title_fontsize=7)
    figure.savefig(folder / "tempered_sigmoid.png", dpi=100)


def glu_activations(folder: Path) -> None:
    """What multiplies the up branch, and what GateMonitor shows of it."""
    z = torch.linspace(-4, 4, 401)
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for variant, name in glu.VARIANTS.items():
        if variant == "geglu_tanh":  # the curve of geglu, to the eye
            continue
        (line,) = left.plot(z, ACTIVATIONS[name](z), label=variant)
        if (openness := glu.openness(z, name)) is not None:
            right.plot(z, openness, color=line.get_color(), label=variant, ls="--" if name == "silu" else "-")
    left.set(title="factor on the up branch", xlabel="z, the gate branch", ylim=(-2, 4))
    right.set(title="openness that GateMonitor records", xlabel="z, the gate branch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(folder / "glu_activations.png", dpi=100)


def glu_gates(folder: Path, epochs: int = 60) -> None:
    """GateMonitor's heat map of the quickstart recipe."""
    recipe, limit = str(HERE.parents[1] / "recipes" / "quickstart.yaml"), ["--trainer.max_epochs", str(epochs)]
    run(folder, "glu_gates", lambda root: gateplug(["fit", "-c", recipe, *limit, "--trainer.default_root_dir", root]))


def units_gates(folder: Path, epochs: int = 20) -> None:
    """GateMonitor's heat map of the plug that the documentation writes."""
    L.seed_everything(0, verbose=False)
    example = runpy.run_path(str(EXAMPLES / "write_a_plug.py"))
    run(folder, "units_gates", lambda root: example["train"](root, epochs))


def smooth_step(folder: Path) -> None:
    """S for three widths, and how two bits choose among four experts."""
    t = torch.linspace(-1.5, 1.5, 601)
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for gamma in (0.5, 1.0, 2.0):
        left.plot(t, moe.smooth_step(t, gamma), label=f"γ = {gamma:g}")
    left.set(title="smooth step S(t)", xlabel="t")
    z = torch.stack([t, torch.full_like(t, 0.25)], -1)[:, None]
    for expert, row in enumerate(moe.selector_codes(z, 4)[:, 0].T):
        right.plot(t, row, label=f"expert {expert} (bits {expert:02b})")
    right.set(title="one selector over four experts, γ = 1, z = (t, 0.25)", xlabel="t")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(folder / "smooth_step.png", dpi=100)


def moe_experts_over_time(folder: Path, steps: int = 600) -> None:
    """The picture of ExpertMonitor after recipes/moe_router_text.yaml."""
    recipe = str(HERE.parents[1] / "recipes" / "moe_router_text.yaml")
    limit = [f"--trainer.max_steps={steps}", "--trainer.limit_test_batches=1"]
    run(folder, "moe_experts_over_time", lambda root: gateplug(["fit", "-c", recipe, *limit, "--trainer.default_root_dir", root]))


def exact_resume(folder: Path, steps: int = 60) -> None:
    """The loss of a run that was stopped and resumed, on top of one that was never stopped, and without ExactResume."""
    stop = steps // 2 + 3
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    for exact, color in ((True, "tab:blue"), (False, "tab:orange")):
        with TemporaryDirectory() as root:
            whole = losses(f"{root}/whole", [steps], exact)
            parts = losses(f"{root}/parts", [stop, steps], exact)
        gap = [abs(a - b) for a, b in zip(whole, parts, strict=True)]
        axes.plot(range(1, steps + 1), gap, color=color, label="exact_loader and ExactResume" if exact else "DataLoader alone")
    axes.axvline(stop, color="0.5", ls=":", label=f"stopped and resumed at step {stop}")
    axes.set(xlabel="step", ylabel="difference of the loss", title="Resumed run against a run that was never stopped")
    axes.legend(fontsize=8)
    figure.savefig(folder / "exact_resume.png", dpi=100)


def losses(folder: str, stops: list[int], exact: bool) -> list[float]:
    """Training loss of every step of a run with dropout, in parts."""
    seen: dict[int, float] = {}

    class Listen(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen[trainer.global_step] = float(outputs["loss"])

    data = gp.Digits()
    data.setup("fit")
    rows = torch.utils.data.TensorDataset(*data.dataset("train").columns.values())
    for stop in stops:
        L.seed_everything(0, verbose=False)
        net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10)
        )
        module = gp.Classifier(net, 10, lambda p: torch.optim.AdamW(p, lr=3e-3))
        loader = gp.exact_loader(rows, 64) if exact else torch.utils.data.DataLoader(rows, 64, shuffle=True)
        keep = ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=1)
        trainer = quiet(folder, None, [Listen(), keep, *([gp.ExactResume(0)] if exact else [])], max_steps=stop)
        last = Path(folder, "last.ckpt")
        trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    return [seen[step] for step in sorted(seen)]


def quiet(folder: str, epochs: int | None, callbacks: list[Any], max_steps: int = -1) -> L.Trainer:
    """A Trainer that prints little."""
    return L.Trainer(
        max_epochs=-1 if epochs is None else epochs, max_steps=max_steps, accelerator="cpu", devices=1,
        default_root_dir=folder, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=10,
    )  # fmt: skip


def run(folder: Path, picture: str, train: Callable[[str], object], found_as: str | None = None) -> None:
    """Train in a folder that goes away, and keep the picture that a plug wrote into it."""
    with TemporaryDirectory() as root:
        train(root)
        (found,) = Path(root).rglob(f"{found_as or picture}.png")
        shutil.copy(found, folder / f"{picture}.png")


def early_exit_operating_points(folder: Path, epochs: int = 60) -> None:
    """Accuracy against cost of the recipe with early exits."""
    recipe, limit = str(HERE.parents[1] / "recipes" / "early_exit_digits.yaml"), ["--trainer.max_epochs", str(epochs)]
    limit += ["--trainer.callbacks.warmup_epochs", str(epochs // 3)]
    run(
        folder,
        "early_exit_operating_points",
        lambda root: gateplug(["fit", "-c", recipe, *limit, "--trainer.default_root_dir", root]),
    )


def continual_contexts(folder: Path, steps: int = 200) -> None:
    """Gates of the first hidden layer in the five contexts of the recipe with GateON."""
    recipe, limit = str(HERE.parents[1] / "recipes" / "gateon_digits.yaml"), ["--data.steps_per_task", str(steps)]
    run(
        folder,
        "continual_contexts",
        lambda root: gateplug(["fit", "-c", recipe, *limit, "--trainer.default_root_dir", root]),
        "continual_contexts_net.1",
    )


FIGURES = {
    f.__name__: f
    for f in (
        tempered_sigmoid,
        glu_activations,
        glu_gates,
        units_gates,
        smooth_step,
        moe_experts_over_time,
        early_exit_operating_points,
        continual_contexts,
        exact_resume,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or FIGURES:
        FIGURES[name](HERE)

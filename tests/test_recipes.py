"""Every YAML under recipes/ runs through the real command line, for a few steps; its first lines say what it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gateplug as gp
from gateplug.cli import main

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PARTS = sorted(str(p.relative_to(ROOT / "recipes" / "parts")) for p in (ROOT / "recipes" / "parts").rglob("*.yaml"))
SHORT = ["--trainer.max_epochs=1", *(f"--trainer.limit_{part}_batches=2" for part in ("train", "val", "test"))]

COMBINATIONS = {
    "quickstart": [
        "data/digits.yaml",
        "model/vit_digits.yaml",
        "plug/gate_monitor.yaml",
        "plug/swiglu.yaml",
        "plug/early_exit.yaml",
    ],
    "glu_text": ["data/python_stdlib.yaml", "model/gpt2_bytes.yaml", "plug/swiglu.yaml"],
    "activation_fashion": ["data/fashion_mnist.yaml", "model/handcrafted_cnn.yaml", "plug/tempered_sigmoid.yaml"],
    "": ["data/python_stdlib_spans.yaml", "model/t5_bytes.yaml", "plug/swiglu.yaml", "plug/gate_monitor.yaml"],
}
"""Parts that go together, by the recipe that is made of them."""
WORDS = ("business", "entertainment", "politics", "sport", "tech")


def images(folder: Path, column: str, *shape: int) -> None:
    """A few images in the layout of a set of ten classes on the hub."""
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({column: Image(), "label": ClassLabel(num_classes=10)})
    for split, rows in (("train", 40), ("test", 20)):
        pixels = torch.randint(0, 256, (rows, *shape), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
        columns = {column: list(pixels.numpy()), "label": [i % 10 for i in range(rows)]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def news(folder: Path) -> None:
    """A few texts in the layout of SetFit's BBC news on the hub: one file of lines a split."""
    for split, rows in (("train", 40), ("test", 20)):
        kinds = [(i % 5, WORDS[i % 5]) for i in range(rows)]
        lines = [{"text": f"{word} of the day", "label": label, "label_text": word} for label, word in kinds]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def reviews(folder: Path) -> None:
    """A few texts of two classes."""
    from datasets import Dataset

    for split, rows in (("train", 40), ("test", 20)):
        columns = {"text": [f"{('good', 'bad')[i % 2]} day {i}" for i in range(rows)], "label": [i % 2 for i in range(rows)]}
        Dataset.from_dict(columns).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def ratings(folder: Path) -> None:
    """A few ratings in GroupLens' layout."""
    rows = (f"{i % 7 + 1},{i % 11 + 1},{(i % 10 + 1) / 2},{1000 + i}" for i in range(200))
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows))


HUB: dict[str, Callable[[Path], None]] = {
    "zalando-datasets/fashion_mnist": lambda folder: images(folder, "image", 28, 28),
    "ylecun/mnist": lambda folder: images(folder, "image", 28, 28),
    "uoft-cs/cifar10": lambda folder: images(folder, "img", 32, 32, 3),
    "SetFit/bbc-news": news,
    **{f"sentiment/{domain}": reviews for domain in ("products", "movies", "news", "tweets")},
    "ml-latest-small": ratings,
}
"""Small stand-ins for the data sets that are not bundled. A recipe with a new one adds a line here."""


def tiny_bert(folder: Path) -> str:
    """A checkpoint with its tokenizer, in the layout of the hub: stands in for a pretrained network of this architecture."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "of", "the", "day", *WORDS]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Fit from YAML files with a few steps, as from the root of the repository; returns the run's folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GATEPLUG_DATA", str(tmp_path / "data"))

    def fit(files: list[Path], *options: str) -> Path:
        small = list(options)
        for file in files:
            recipe = yaml.safe_load(file.read_text())
            data = recipe.get("data", {})
            if pretrained := recipe.get("model", {}).get("init_args", {}).get("net", {}).get("init_args", {}).get("pretrained"):
                tiny_bert(tmp_path / "data" / pretrained.rsplit("/", 1)[-1])
            if "data" in data.get("init_args", {}):  # images that are laid over each other
                small += [f"--data.{part}_pairs=10" for part in ("train", "val", "test")]
            if data.get("class_path") == "TaskStream":  # six tasks of one step
                small += ["--data.steps_per_task=1", "--trainer.limit_train_batches=6"]
            if callbacks(recipe) and callbacks(recipe)[-1]["class_path"].endswith("ModelCheckpoint"):
                small.append("--trainer.callbacks.every_n_train_steps=1")
            for name in names(data):
                if name == "python-stdlib":
                    small.append("--data.max_bytes=400000")
                else:
                    folder = tmp_path / "data" / name
                    folder.mkdir(parents=True)
                    HUB[name](folder)
        configs = [a for file in files for a in ("-c", str(file.relative_to(ROOT)))]
        assert main(["fit", *configs, *SHORT, f"--trainer.default_root_dir={tmp_path / 'runs'}", *small]) == 0
        return next((tmp_path / "runs").glob("*/version_0"))

    return fit


def names(data: Any) -> list[str]:
    """Hub ids in the configuration of a data module, those inside it too."""
    if isinstance(data, list):
        return [name for item in data for name in names(item)]
    if not isinstance(data, dict):
        return []
    arguments = data.get("init_args", {})
    own = [arguments["name"]] if arguments.get("name") else []
    return own + names([value for key, value in arguments.items() if key in ("data", "base", "tasks")])


def plugs_in(folder: Path) -> list[str]:
    """The plugs that a run's checkpoint names."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return [plug["class"] for plug in checkpoint["gateplug"]["plugs"]]


def callbacks(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The callbacks of a file, in either spelling."""
    trainer = config.get("trainer", {})
    return trainer.get("callbacks", []) + trainer.get("callbacks+", [])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_the_first_lines_say_paper_command_minutes_and_the_measured_number(recipe: Path) -> None:
    head = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    text = "\n".join(head)
    assert re.search(r"^Paper: .*(arXiv \d{4}\.\d{5})", text, re.M), text
    command = re.search(r"^Command: gateplug fit (.*)", text, re.M)
    assert command is not None, text
    assert f"-c recipes/{recipe.name}" in command[1]
    assert re.search(r"^Minutes: [\d.–]+ on 2 CPU cores", text, re.M), text
    assert re.search(r"^Expected: .*\d", text, re.M), text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_the_recipe_runs(recipe: Path, run: Callable[..., Path]) -> None:
    folder = run([recipe])
    wanted = [c["class_path"] for c in callbacks(yaml.safe_load(recipe.read_text()))]
    assert plugs_in(folder) == [name for name in wanted if hasattr(gp, name) and getattr(gp, name).attaches]
    assert (folder / "config.yaml").is_file()


@pytest.mark.parametrize("name", COMBINATIONS, ids=lambda name: name or "t5")
def test_parts_combine(name: str, run: Callable[..., Path]) -> None:
    files = [ROOT / "recipes" / "parts" / part for part in COMBINATIONS[name]]
    folder = run(files)
    wanted = [c["class_path"] for file in files for c in callbacks(yaml.safe_load(file.read_text()))]
    assert plugs_in(folder) == [plug for plug in wanted if getattr(gp, plug).attaches]


def test_every_part_is_in_a_combination() -> None:
    assert sorted({part for parts in COMBINATIONS.values() for part in parts}) == PARTS


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name])
def test_the_recipe_is_equal_to_its_parts(name: str) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    parts = [yaml.safe_load((ROOT / "recipes" / "parts" / part).read_text()) for part in COMBINATIONS[name]]
    for key in ("model", "data"):
        assert [recipe[key]] == [part[key] for part in parts if key in part]
    assert callbacks(recipe) == [callback for part in parts for callback in callbacks(part)]


@pytest.mark.parametrize("variant", ["ffn_relu", "ffn_gelu", "ffn_silu", "glu", "bilinear", "reglu", "geglu", "swiglu"])
def test_one_option_chooses_the_variant_at_equal_parameters(variant: str, run: Callable[..., Path]) -> None:
    folder = run([ROOT / "recipes" / "glu_digits.yaml"], f"--trainer.callbacks.variant={variant}")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    (plug,) = checkpoint["gateplug"]["plugs"]
    assert plug["arguments"]["variant"] == variant
    count = sum(t.numel() for name, t in checkpoint["state_dict"].items() if name.startswith("net."))
    assert count == pytest.approx(169_162, rel=0.002)


def test_quickstart_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gateplug", "fit", "-c", "recipes/quickstart.yaml", *SHORT]
    done = subprocess.run(
        [*command, f"--trainer.default_root_dir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for shown in ("ReplaceFFN", "EarlyExit", "Gates at the end of the training", "test/accuracy", "checkpoint (last)"):
        assert shown in done.stdout
    assert (tmp_path / "quickstart" / "version_0" / "figures" / "glu_gates.png").is_file()

"""README, guide and method cards: every snippet runs, every YAML is accepted, every link leads somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import yaml

import gateplug as gp
from gateplug.cli import main as command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CARDS = sorted(ROOT.glob("gateplug/*/README.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *CARDS]
PAGES += sorted(p for p in DOCS.rglob("*.md") if not {"_build", "generated"} & set(p.parts))
EXAMPLES = sorted(DOCS.glob("examples/*.py"))
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = [
    "pip install -c constraints.txt -e . && gateplug fit -c recipes/quickstart.yaml",
    'pip install -c constraints.txt -e ".[test]" && pytest',
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of the fenced blocks of a language; `python no-run` is another language."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start()) + 2, m["body"]) for m in FENCE.finditer(text) if m["info"].strip() == language]


def prose(page: Path) -> str:
    """The page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Runs write their logs into the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_blocks_run_in_order(page):
    space: dict[str, Any] = {"__name__": "page"}
    for path in re.findall(r"^```\{literalinclude\} (\S+\.py)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        space |= runpy.run_path(str(page.parent / path))  # what the page shows is known to the blocks below it
    for line, body in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + body, name(page), "exec"), space)


@pytest.mark.parametrize("example", EXAMPLES, ids=name)
def test_example_runs(example):
    runpy.run_path(str(example), run_name="__main__")


def test_example_plug_survives_a_checkpoint():
    """The page says that a plug gets this without writing anything for it."""
    example = runpy.run_path(str(DOCS / "examples" / "write_a_plug.py"))
    module = example["train"](".", epochs=1)
    (path,) = Path().rglob("*.ckpt")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    fresh = gp.load(path, gp.Classifier(net, num_classes=10), register=[example["GateUnits"]])
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(gp.fold(fresh)(x), module.eval()(x))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=name)
def test_yaml_blocks_pass_the_command_line(page, capsys):
    for line, body in blocks(page, "yaml"):
        recipe = yaml.safe_load(body)
        Path("block.yaml").write_text(body, encoding="utf-8")
        # a part of a recipe is added to the quickstart's
        files = ["block.yaml"] if "model" in recipe else [str(ROOT / "recipes" / "quickstart.yaml"), "block.yaml"]
        try:
            code = command(["fit", *(text for file in files for text in ("-c", file)), "--print_config"])
        except SystemExit as left:  # it prints and leaves; a refused file returns 2 instead
            code = left.code or 0
        said = capsys.readouterr()
        assert code == 0, f"{name(page)}, line {line}: {said.err}"
        accepted = yaml.safe_load(said.out)["trainer"]["callbacks"]
        wanted = recipe["trainer"].get("callbacks") or recipe["trainer"]["callbacks+"]
        assert [c["class_path"] for c in accepted][-len(wanted) :] == [f"gateplug.{c['class_path']}" for c in wanted]


def test_public_names_are_in_the_api_reference():
    listed = set(re.findall(r"^   (\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == set(gp.__all__)


def test_listed_modules_exist():
    modules = re.findall(r"^   (gateplug\.[\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert all((ROOT / f"{m.replace('.', '/')}.py").is_file() for m in modules)
    assert {f"gateplug.{card.parent.name}.functional" for card in CARDS} <= set(modules)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", prose(target), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{name(page)} links to {link}"


def test_every_room_has_its_card_in_the_docs():
    included = {(page.parent / found).resolve() for page in sorted(DOCS.glob("methods/*.md"))
                for found in re.findall(r"\{include\} (\S+)", page.read_text(encoding="utf-8"))}  # fmt: skip
    assert included == set(CARDS)
    assert all(f"methods/{card.parent.name}\n" in (DOCS / "index.md").read_text(encoding="utf-8") for card in CARDS)


@pytest.mark.parametrize("card", CARDS, ids=name)
def test_card_names_every_knob(card):
    """A constructor argument of a public plug or layer of the room that its card does not mention is an undocumented knob."""
    import importlib
    import inspect

    room = importlib.import_module(f"gateplug.{card.parent.name}")
    text = card.read_text(encoding="utf-8")
    for public in room.__all__:
        for argument in list(inspect.signature(getattr(room, public)).parameters):
            assert re.search(rf"\b{argument}\b", text), f"{public}({argument}=…) is not in {name(card)}"


def test_commands_of_the_readme_are_those_that_ci_runs():
    readme, ci = ((ROOT / file).read_text(encoding="utf-8") for file in ("README.md", ".ci/run"))
    for text in COMMANDS:
        assert text in readme
        assert text in ci.replace("pip install -q ", "pip install ")
    assert (ROOT / "recipes" / "quickstart.yaml").is_file()
    assert (ROOT / "constraints.txt").is_file()


@pytest.mark.parametrize("picture", sorted(DOCS.glob("figures/*.png")), ids=name)
def test_picture_is_small_and_drawn_by_a_script(picture):
    assert picture.stat().st_size < 150_000
    scripts = [script.read_text(encoding="utf-8") for script in picture.parent.glob("*.py")]
    assert any(picture.stem in text for text in scripts)


def test_pictures_can_be_drawn_again():
    make = runpy.run_path(str(DOCS / "figures" / "make.py"))
    shortened: dict[str, dict[str, int]] = {
        "glu_gates": {"epochs": 1},
        "units_gates": {"epochs": 1},
        "exact_resume": {"steps": 24},
        "moe_experts_over_time": {"steps": 20},
        "early_exit_operating_points": {"epochs": 1},
        "continual_contexts": {"steps": 4},
    }
    for figure, draw in make["FIGURES"].items():
        draw(Path(), **shortened.get(figure, {}))
        assert matplotlib.image.imread(f"{figure}.png").shape[1] > 600
        assert (DOCS / "figures" / f"{figure}.png").is_file()


def test_composition_page_shows_every_cell():
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    matrix = runpy.run_path(str(DOCS / "_ext" / "composition.py"))["matrix"]
    cells = {frozenset("AB"): "together", frozenset("AC"): "both change x", frozenset("BC"): "together, B first"}
    table = matrix(cells, set())
    assert "| `A` | · | together | refused (1) |" in table
    assert "1. both change x" in table
    assert "together, B first" in table
    assert "`C`" not in matrix(cells, {"C"})

"""The house rules: who imports whom, the shape of a room, what a file may hold."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gateplug as gp
from gateplug.core.gate import Gate
from tests.conformance import CASES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gateplug"
NO_ROOM = {"core", "data", "tasks", "cli", "__pycache__"}
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in NO_ROOM)
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides who imports whom"
            found |= {str(node.module)}
    return found


def parts(path: Path) -> set[str]:
    """Which parts of gateplug a file imports: `core`, `data`, `glu` …, and `` for the package itself."""
    own = (name.split(".") for name in imports(path) if name.split(".")[0] == "gateplug")
    return {name[1] if len(name) > 1 else "" for name in own}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_imports_whom(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = {"core": {"core"}, "data": {"core", "data"}, "tasks": {"core", "tasks"}}
    if part in ROOMS:
        assert parts(path) <= {"core", part}, "a room imports core and itself"
    elif part in allowed:
        assert parts(path) <= allowed[part]
    if path.name in ("functional.py", "layers.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_hold_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 250
    assert path.stem not in ("utils", "misc", "common", "helpers")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_its_shape_and_its_name_everywhere(room: str) -> None:
    folder = PACKAGE / room
    for name in ("README.md", "__init__.py", "functional.py", "layers.py"):
        assert (folder / name).exists(), f"{room} has no {name}"
    assert (folder / "callback.py").exists() or (folder / "task.py").exists()
    assert list((ROOT / "tests" / room).glob("test_*.py"))
    pages = [p for p in (ROOT / "docs").rglob("*.md") if f"gateplug/{room}/README.md" in p.read_text()]
    assert [p.stem for p in pages] == [room], "one docs page, of the room's name, includes the method card"


def public_plugs() -> list[type[gp.Plug]]:
    things = (getattr(gp, name) for name in gp.__all__)
    return [t for t in things if inspect.isclass(t) and issubclass(t, gp.Plug) and t is not gp.Plug]


def test_every_plug_is_in_the_battery_and_names_its_room() -> None:
    for plug in public_plugs():
        assert plug.__name__ in CASES, f"register {plug.__name__} in tests/conformance.py"
        assert plug.room == plug.__module__.split(".")[1]
        assert plug.summary
        assert plug.paper or plug.room == "core"


def test_every_gate_names_its_room() -> None:
    gates = [g for g in _subclasses(Gate) if g.__module__.startswith("gateplug.")]
    assert gates
    assert all(g.room == g.__module__.split(".")[1] for g in gates)


def _subclasses(cls: type) -> list[type]:
    return [s for c in cls.__subclasses__() for s in (c, *_subclasses(c))]


def test_public_names_are_flat_sorted_and_documented() -> None:
    assert set(gp.__all__) == {n for n in vars(gp) if not n.startswith("_") and not inspect.ismodule(getattr(gp, n))}
    assert all(inspect.getdoc(getattr(gp, name)) for name in gp.__all__)


def test_importing_gateplug_imports_nothing_that_is_optional_or_slow() -> None:
    names = "opacus torch_pruning faiss qdrant_client transformers datasets sklearn matplotlib rich.table jsonargparse"
    code = f"import lightning, sys; before = set(sys.modules); import gateplug; print(sorted(set({names.split()}) & (set(sys.modules) - before)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_no_file_knows_the_machine_that_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split("\n")
    # an unpacked source distribution has no git: then whatever is there is looked at
    paths = [ROOT / name for name in listed if name] or [p for p in ROOT.rglob("*") if ".git" not in p.parts]
    marks = ["/" + name + "/" for name in ("work", "root", "home", "tmp/pip")] + ["pypi." + "org", "files.python" + "hosted"]
    for path in paths:
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".json", ".cfg") and path.is_file():
            text = path.read_text()
            assert not [m for m in marks if m in text], path

"""The cause of a configuration error in plain words, with the nearest allowed names."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

import gateplug
from gateplug.core.errors import nearest

TOP_LEVEL = ("seed_everything", "trainer", "model", "data", "ckpt_path", "test_after_fit")
MARK = re.compile(r'in "<unicode string>", line \d+, column \d+')  # the file's name and line are said before


@dataclass
class Frame:
    """What jsonargparse wrapped around a cause.

    Attributes:
        keys: Keys from the outside in, ``["trainer.callbacks", "target"]``.
        owner: Import path of the innermost class, or "".
        union: Types that were tried for the innermost key, or "".
        refused: What one of these types said of the value it was given, or "".
    """

    keys: list[str] = field(default_factory=list)
    owner: str = ""
    union: str = ""
    refused: str = ""


@dataclass
class Said:
    """A cause in plain words, and the words by which its place is found in the files."""

    text: str
    words: list[str] = field(default_factory=list)
    syntax: bool = False


def plain_cause(text: str, frame: Frame) -> Said:
    """Say a message of jsonargparse in plain words; one that is not known is given as it is."""
    for pattern, say in RULES:
        if found := re.search(pattern, text, re.DOTALL):
            return say(found, frame)
    if frame.owner and find(frame.owner) is None:
        return _no_class(frame.owner)
    # Words in quotation marks, and a class that names itself: `Digits(batch_size=0): …`.
    return Said(one_line(text), re.findall(r"'([\w.]+)'", text) + re.findall(r"\b([A-Z]\w+)\(", text))


def _not_accepted(found: re.Match[str], frame: Frame) -> Said:
    option = found[1] or found[2]
    name = last(option)
    if frame.owner:
        allowed, who = accepted(find(frame.owner)), last(frame.owner)
    elif option.startswith("trainer."):
        allowed, who = accepted(L.Trainer), "Trainer"
    else:
        allowed, who, name = list(TOP_LEVEL), "the configuration", option.split(".")[0]
    hint = nearest(name, allowed)
    if not hint or len(allowed) <= 12:
        hint += f" Allowed: {', '.join(allowed)}."
    return Said(f"{who} does not accept {name!r}.{hint}", [name])


def _required(found: re.Match[str], frame: Frame) -> Said:
    names = ", ".join(re.sub(r"^(fit|validate|test|predict)\.", "", n.strip()) for n in found[1].split(","))
    if frame.owner:
        return Said(f"{last(frame.owner)} needs {names}, which is not given.", [last(frame.owner)])
    return Said(f"{names} must be given, in a YAML file (`-c FILE`) or as options.")


KINDS: dict[str, tuple[type, str]] = {
    "model": (L.LightningModule, "a LightningModule and belongs under `model:`"),
    "data": (L.LightningDataModule, "a data module and belongs under `data:`"),
    "trainer.callbacks": (L.Callback, "a callback and belongs into the list `trainer.callbacks:`"),
}


def _wrong_kind(found: re.Match[str], frame: Frame) -> Said:
    return _misplaced(found[1], find(found[1]), found[2])


def _misplaced(path: str, thing: Any, base: str) -> Said:
    fits = [place for kind, place in KINDS.values() if isinstance(thing, type) and issubclass(thing, kind)]
    hint = f" It is {fits[0]}." if fits else ""
    return Said(f"{last(path)} is no {base}.{hint}", [last(path)])


def _ambiguous(found: re.Match[str], frame: Frame) -> Said:
    ours = f" gateplug's is gateplug.{found[1]}." if hasattr(gateplug, found[1]) else ""
    return Said(one_line(found.string) + ours, [found[1]])


def _no_file(found: re.Match[str], frame: Frame) -> Said:
    path = Path(found[1])
    near = nearest(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return Said(f"there is no file {shown}.{near}")


def _no_yaml(found: re.Match[str], frame: Frame) -> Said:
    return Said(f"this is no valid YAML: {one_line(MARK.sub('', found[1]))}", syntax=True)


def _wrong_type(found: re.Match[str], frame: Frame) -> Said:
    if frame.refused:
        return Said(frame.refused, re.findall(r"(\w+)=", frame.refused)[:1])
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", frame.union or found[1])
    text = text.replace("typing.", "").replace("NoneType", "null")
    *head, tail = re.split(r", (?![^\[]*\])", text)  # not at the commas of dict[str, int]
    expected = f"{', '.join(head)} or {tail}" if head else tail
    given = one_line(found[2])
    return Said(f"expected {expected}, got {given}.", [given.strip("[]'\"")])


def _not_resolved(found: re.Match[str], frame: Frame) -> Said:
    thing = find(found[1]) or getattr(L.pytorch.callbacks, found[1], None)
    kind = KINDS.get(frame.keys[-1]) if frame.keys else None
    if isinstance(thing, type) and kind is not None:  # the class exists, but not among those that fit the key
        return _misplaced(found[1], thing, kind[0].__name__)
    return _no_class(found[1])


def _no_class(path: str) -> Said:
    module = path.rpartition(".")[0]
    try:
        places: list[Any] = [importlib.import_module(module)] if module else []
    except ImportError:
        places = []
    places += [gateplug, L.pytorch.callbacks]
    names = {name for place in places for name, thing in vars(place).items() if callable(thing) and name[0] != "_"}
    hint = nearest(last(path), sorted(names)) or " A class of your own is named with its module: `my_package.MyClass`."
    return Said(f"there is no class {path!r}.{hint}", [path])


RULES: list[tuple[str, Callable[[re.Match[str], Frame], Said]]] = [
    (r"Option '([^']+)' is not accepted|does not accept option '([^']+)'", _not_accepted),
    (r"unrecognized arguments: --([\w.]+)()", _not_accepted),
    (r"the following arguments are required: (.+)", _required),
    (r"Import path (\S+) does not correspond to a subclass of (\w+)", _wrong_kind),
    (r"Multiple subclasses with name (\w+)", _ambiguous),
    (r"File does not exist: '([^']+)'", _no_file),
    (r"Problems parsing config: (.*)", _no_yaml),
    (r"Expected a dot import path string: ([\w.]+)", _not_resolved),
    (r"Expected an? (.+?)\. Got value: (.*)", _wrong_type),
]


def accepted(thing: Any) -> list[str]:
    """Names of the arguments of a class or function; those of a class's bases too where it takes ``**kwargs``."""
    names: list[str] = []
    for level in inspect.getmro(thing) if isinstance(thing, type) else [thing]:
        function = level.__dict__.get("__init__") if isinstance(level, type) else level
        if function is None:
            continue
        parameters = list(inspect.signature(function).parameters.values())
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names += [n for n in named if n != "self" and n not in names]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def find(path: str) -> Any:
    """What an import path or a public name of gateplug stands for, or None."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name) if module else getattr(gateplug, name)
    except (ImportError, AttributeError):
        return None


def last(path: str) -> str:
    """The last part of a dotted name."""
    return path.rpartition(".")[2]


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())

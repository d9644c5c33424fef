"""From jsonargparse's page of alternatives to one paragraph: file, line and key, cause, nearest allowed names."""

import re
from pathlib import Path

import yaml

from gateplug.cli.causes import Frame, Said, one_line, plain_cause

KEY = re.compile(r'Parser key "([^"]+)":\s*')
CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*")
UNION = re.compile(r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*)\]")


def explain(error: BaseException, args: list[str]) -> str:
    """Say what is wrong in a configuration.

    Args:
        error: Raised while the arguments were parsed or classes were built.
        args: The arguments, which name the configuration files.

    Returns:
        One paragraph.
    """
    cause, frame = _unwrap(error)
    text = KEY.sub("", str(cause), count=1).strip() or type(cause).__name__
    owner = getattr(cause, "gateplug_class", None)
    said = plain_cause(text, frame)
    if owner is not None:
        name = owner.__name__
        # the value that the message quotes, where it was given as an option; else the class, which the files name
        options = {(a.partition("=")[0].rpartition(".")[2], a.partition("=")[2]) for a in args[1:]}
        values = [value for name, value in re.findall(r"(\w+)='?([^\s',)]+)", text) if (name, value) in options]
        said = Said(one_line(text if text.startswith(name) else f"{name}: {text}"), values[:1] or [name])
    place = ", ".join(part for part in (_place(args, said), ".".join(frame.keys)) if part)
    return f"{place}: {said.text}" if place else said.text


def _unwrap(error: BaseException) -> tuple[BaseException, Frame]:
    """Follow the chain to the first error that is not jsonargparse's frame around another one."""
    frame = Frame()
    current = error
    while not hasattr(current, "gateplug_class"):
        text = str(current)
        if found := KEY.match(text):
            frame.keys += [found[1]] if found[1] not in (*frame.keys[-1:], "config") else []
            text = text[found.end() :]
        if found := CLASS.match(text):
            frame.owner, frame.union = found[1], ""
        elif found := UNION.search(text):
            frame.union = found[1]
            # a group of values (a Ramp) that fits in form and not in value says why by itself
            said = re.search(r"^  - (\w+=(?!.*(?:Expected|Subtypes)).+)$", text, re.MULTILINE)
            frame.refused = said[1] if said else ""
        else:
            break
        following = current.__cause__ or current.__context__
        if following is None:
            break
        current = following
    return current, frame


def config_files(args: list[str]) -> list[str]:
    """Files given with ``-c`` or ``--config``."""
    named = [args[i + 1] for i, a in enumerate(args[:-1]) if a in ("-c", "--config")]
    return named + [a.split("=", 1)[1] for a in args if a.startswith(("--config=", "-c="))]


def _place(args: list[str], said: Said) -> str:
    """``file, line n`` where a word stands last: options win over files, later files over earlier ones."""
    files = config_files(args)
    options = [a for a in args[1:] if a not in files]
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for word in said.words if word]
    if any(pattern.search(option) for pattern in patterns for option in options):
        return "command line"
    for file in reversed(files):
        try:
            text = Path(file).read_text(encoding="utf-8")
            yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            if said.syntax:
                return f"{file}, line {mark.line + 1}" if mark else file
        except OSError:
            continue
        lines = enumerate(text.splitlines(), start=1)
        hits = [number for number, line in lines if any(p.search(line.split("#")[0]) for p in patterns)]
        if hits:
            return f"{file}, line {hits[-1]}"
    return files[0] if len(files) == 1 and Path(files[0]).is_file() else ""

"""Public names of gateplug, and how a configuration may write them."""

import inspect
from typing import Any

import jsonargparse
import yaml

import gateplug


def public_names() -> dict[str, object]:
    """All public names of gateplug; afterwards all of its classes are imported, so that short names can be resolved."""
    names = getattr(gateplug, "__all__", None) or [n for n in vars(gateplug) if not n.startswith("_")]
    things = {name: getattr(gateplug, name) for name in names}
    return {name: thing for name, thing in things.items() if not inspect.ismodule(thing)}


def short_function_names() -> None:
    """Let ``class_path: hf_model`` stand for ``gateplug.hf_model``: jsonargparse finds classes by short names only."""
    functions = [name for name, thing in public_names().items() if callable(thing) and not isinstance(thing, type)]
    load_yaml = jsonargparse.get_loader("yaml")
    if getattr(load_yaml, "resolves_functions", False):
        return

    def load(text: str) -> Any:
        value = load_yaml(text)
        stack = [value]
        while stack:
            node = stack.pop()
            if isinstance(node, dict) and node.get("class_path") in functions:
                node["class_path"] = f"gateplug.{node['class_path']}"
            stack += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return value

    load.resolves_functions = True  # type: ignore[attr-defined]
    jsonargparse.set_loader("yaml", load, exceptions=(yaml.YAMLError,))

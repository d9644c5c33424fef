"""Constructor arguments as plain Python, for a checkpoint, and back.

A checkpoint is read with `weights_only=True`, so an argument that is a class, a function or a module is written as its
name. A name from a file is never imported: it is looked up among torch's layers, Hugging Face's activations, gateplug's own
public names, and what the caller hands in.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gateplug.core.errors import PlugError, listed

Registered = Mapping[str, object]


def encode(value: Any) -> Any:  # noqa: PLR0911  # one line per kind
    """Write a value as numbers, texts, None, lists and dicts.

    Classes and functions become `{"name": …}`, modules `{"module": …, "arguments": …}`. What cannot be built again (a
    lambda, a local function) becomes `{"lost": …}`: it can be compared and read, and :func:`decode` refuses it by name.
    """
    if value is None:
        return None
    for kind in (bool, int, float, str):  # NumPy's numbers and enums are of these kinds, and not readable as what they are
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Mapping):
        return {(_name(k) or str(k)) if isinstance(k, type) else str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if isinstance(value, nn.Sequential):
        return {"sequence": [encode(child) for child in value]}
    if isinstance(value, nn.Module):
        return _encode_module(value)
    name = _name(value)
    if name is None or "<" in name:
        # no address of an object in it: a run resumed in another process writes the same
        return {"lost": name or f"an object of class {type(value).__qualname__}"}
    return {"name": name}


def _encode_module(module: nn.Module) -> dict[str, Any]:
    """A module by its constructor arguments, where each is kept as the attribute of the same name."""
    bare = type(module).__init__ is nn.Module.__init__  # nn.Tanh and others take nothing
    parameters = [] if bare else list(inspect.signature(type(module).__init__).parameters.values())[1:]
    held = {**module.__dict__, **module._parameters}
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # torch's layers do not keep device and dtype (not needed: weights are loaded) and retired arguments, whose default is None
    spare = {p.name for p in parameters if p.default is None and type(module).__module__.startswith("torch.nn.")}
    missing = [p.name for p in parameters if p.name not in held and p.name not in spare]
    if missing:
        return {"lost": f"{type(module).__qualname__}, which does not keep its {', '.join(missing)},"}
    return {"module": _name(type(module)), "arguments": {n: encode(held[n]) for n in named if n in held}}


def decode(value: Any, register: Iterable[object] = ()) -> Any:
    """Build a value again from what :func:`encode` wrote.

    Args:
        value: as in the checkpoint.
        register: classes and functions of the caller's own that may be named.

    Raises:
        PlugError: a name is not known, or the value could not be written when the checkpoint was.
    """
    if isinstance(value, list):
        return [decode(v, register) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"name"}:
        return resolve(value["name"], register)
    if set(value) == {"module", "arguments"}:
        return resolve(value["module"], register)(**decode(value["arguments"], register))
    if set(value) == {"sequence"}:
        return nn.Sequential(*[decode(child, register) for child in value["sequence"]])
    if set(value) == {"lost"}:
        raise PlugError(f"the argument {value['lost']} cannot be stored in a checkpoint: give the plug to gp.load(…, plugs=[…])")
    return {k: decode(v, register) for k, v in value.items()}


def has_lost(value: Any) -> bool:
    """Whether something in an encoded value cannot be built again."""
    if isinstance(value, dict):
        return set(value) == {"lost"} or any(has_lost(v) for v in value.values())
    return isinstance(value, list) and any(has_lost(v) for v in value)


def resolve(name: str, register: Iterable[object] = ()) -> Any:
    """Find the class or function of a full name without importing anything that the name says.

    Raises:
        PlugError: it is not among torch's layers, optimizers and schedulers, Hugging Face's activations, gateplug's names
            and `register`.
    """
    own = {_name(thing): thing for thing in register}
    if name in own:
        return own[name]
    last = name.rpartition(".")[2]
    for package in ("gateplug", "torch.nn", "torch.optim", "torch.optim.lr_scheduler", "transformers.activations"):
        thing = getattr(sys.modules.get(package), last, None)
        if thing is not None and callable(thing) and name in {_name(thing), f"{package}.{last}"}:
            return thing
    raise PlugError(
        f"{name} is named in the checkpoint, and no name from a file is imported: hand it in with register=[…]. "
        f"Registered are: {listed(n for n in own if n)}"
    )


def _name(thing: Any) -> str | None:
    name = getattr(thing, "__qualname__", None)
    return f"{thing.__module__}.{name}" if name else None

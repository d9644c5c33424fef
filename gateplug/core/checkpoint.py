"""Checkpoints that know their plugs: written with every save, checked before every load, rebuilt by `gp.load`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import nn

from gateplug.core.arguments import decode, resolve
from gateplug.core.errors import PlugError, listed
from gateplug.core.record import all_records
from gateplug.core.wrap import unwrap, wrap

if TYPE_CHECKING:
    from gateplug.core.plug import Plug

KEY = "gateplug"
"""Where the plugs stand in a checkpoint."""
MODEL_KEY = "gateplug_model"
"""Where the command line writes the plain configuration of the LightningModule, `{class_path, init_args}`."""
_GUARD = "gateplug.checkpoint"


def spelled(arguments: dict[str, Any]) -> str:
    """Constructor arguments as they would be typed."""
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def guard(module: nn.Module) -> None:
    """Have every checkpoint of a LightningModule name its plugs, and every load check them."""
    if isinstance(module, LightningModule):
        wrap(module, "on_save_checkpoint", _GUARD, _Saving(module))
        wrap(module, "on_load_checkpoint", _GUARD, _Loading(module))


def unguard(module: nn.Module) -> None:
    """Take :func:`guard` off when no plug is left."""
    if not all_records(module):
        unwrap(module, _GUARD)


class _Saving:
    def __init__(self, module: LightningModule) -> None:
        self.module = module

    def __call__(self, inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        inner(checkpoint)
        checkpoint[KEY] = {
            "plugs": [
                {"class": r.plug, "key": r.key, "arguments": r.arguments, "layers": r.layers} for r in all_records(self.module)
            ]
        }


class _Loading:
    def __init__(self, module: LightningModule) -> None:
        self.module = module

    def __call__(self, inner: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        check_plugs(self.module, checkpoint)
        inner(checkpoint)


def check_plugs(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Compare the plugs that a checkpoint was written with to those that `module` has, before its weights are loaded.

    Raises:
        PlugError: a plug is missing on either side; names it, with its arguments, instead of a list of keys.
    """
    stored = checkpoint.get(KEY, {}).get("plugs", [])
    present = {r.key: r for r in all_records(module)}
    missing = [f"{p['class']}({spelled(p['arguments'])})" for p in stored if p["key"] not in present]
    if missing:
        raise PlugError(
            f"this checkpoint was written with plugs that the model does not have: {listed(missing)}. Add them to the "
            "Trainer's callbacks, or open the checkpoint with gp.load(path, module)"
        )
    for entry in stored:
        record = present[entry["key"]]
        if record.arguments != entry["arguments"]:
            # an argument that the checkpoint does not have came with a later release, its default being the old behaviour
            names = sorted(n for n, v in entry["arguments"].items() if record.arguments.get(n) != v)
            if not names:
                continue
            then, now = ({n: a.get(n) for n in names} for a in (entry["arguments"], record.arguments))
            raise PlugError(
                f"this checkpoint was written with {record.plug}({spelled(then)}), the model has "
                f"{record.plug}({spelled(now)}): use the same arguments"
            )
    keys = {p["key"] for p in stored}
    weights = checkpoint.get("state_dict", {})
    added = [r.plug for k, r in present.items() if k not in keys and any(name not in weights for name, _ in r.parameters(module))]
    if added:
        raise PlugError(
            f"this checkpoint was written without {listed(added)}, and has no weights for what it attached: load the "
            "weights into the plain module first and attach then, or leave the plug out"
        )


def load(
    path: str | Path,
    module: LightningModule | None = None,
    plugs: Iterable[Plug] | None = None,
    register: Iterable[object] = (),
) -> LightningModule:
    """Open a checkpoint: the module with its plugs attached and the weights loaded, in eval mode, on the CPU.

    Args:
        path: of a Lightning checkpoint. It is read with `weights_only=True`: nothing in it is executed or imported.
        module: a fresh module of the kind that was trained, without plugs. None builds it from the configuration that the
            command line stored; classes that are not gateplug's or torch's must be in `register`.
        plugs: instead of building the plugs from the checkpoint, use these (needed where an argument was a lambda).
        register: classes and functions of your own that the checkpoint may name.

    Raises:
        FileNotFoundError: there is no such file.
        PlugError: a class is not known, a plug is missing, or the checkpoint does not say how to build the module.
    """
    register = list(register)
    try:
        checkpoint = torch.load(Path(path), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file that is no checkpoint makes of torch.load
        raise PlugError(f"{path} is no checkpoint that can be read safely: {type(error).__name__}: {error}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise PlugError(f"{path} is no Lightning checkpoint: it has no state_dict")
    if module is None:
        module = _build(checkpoint, register, str(path))
    module.configure_model()
    for plug in _plugs(checkpoint, register) if plugs is None else plugs:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fresh weights.*")  # the trained ones come in a moment
            plug.attach(module)
        state = checkpoint.get("callbacks", {}).get(plug.state_key)
        if state is not None:
            plug.load_state_dict(state)
    guard(module)
    try:
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    finally:
        unguard(module)
    return module.eval()


def _plugs(checkpoint: dict[str, Any], register: list[object]) -> list[Plug]:
    entries = checkpoint.get(KEY, {}).get("plugs", [])
    return [_plug_class(p["class"], register)(**decode(p["arguments"], register)) for p in entries]


def _plug_class(name: str, register: list[object]) -> type[Plug]:
    from gateplug.core.plug import Plug

    own = {cls.__name__: cls for cls in register if isinstance(cls, type)}
    cls = own.get(name)
    if cls is None:
        cls = resolve(f"gateplug.{name}")
    if not (isinstance(cls, type) and issubclass(cls, Plug)):
        raise PlugError(f"{name} is named as a plug in the checkpoint and is none")
    return cls


def _build(checkpoint: dict[str, Any], register: list[object], path: str) -> LightningModule:
    config = checkpoint.get(MODEL_KEY)
    if config is None:
        raise PlugError(
            f"{path} does not say how its LightningModule is built (only the command line stores that): give `module`"
        )
    module = instantiate(config, register)
    if not isinstance(module, LightningModule):
        raise PlugError(f"{path} names {config['class_path']} as its module, which is no LightningModule")
    return module


def instantiate(config: Any, register: Iterable[object] = ()) -> Any:
    """Build what a plain configuration of `{class_path, init_args}` describes, by known names only.

    A class whose required first argument is not given (an optimizer, a scheduler) becomes a factory that takes it.
    """
    if isinstance(config, list):
        return [instantiate(v, register) for v in config]
    if not isinstance(config, dict):
        return config
    if "class_path" not in config:
        return {k: instantiate(v, register) for k, v in config.items()}
    cls = resolve(config["class_path"], register)
    arguments = {k: instantiate(v, register) for k, v in (config.get("init_args") or {}).items()}
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler):
        return partial(cls, **arguments)
    return cls(**arguments)

"""``gateplug fold CKPT OUT``: from a checkpoint to the plain network, as weights or as exported programs."""

import argparse
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gateplug
from gateplug.cli.errors import UserError
from gateplug.cli.record import EXAMPLE_KEY, MODEL_KEY, build_example
from gateplug.core import PlugError, fold, load
from gateplug.early_exit import ExitRunner
from gateplug.early_exit.programs import FORMATS


def fold_checkpoint(args: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: If the checkpoint cannot be opened, the output exists or has another ending, or export fails.
    """
    parser = argparse.ArgumentParser("gateplug fold", description="Write the plain network of a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="written by `gateplug fit`")
    parser.add_argument(
        "out", type=Path, help="NAME.safetensors (config.json is put beside it), NAME.pt2, or a folder for a network with exits"
    )
    parser.add_argument("--form", choices=FORMATS, default="pt2", help="of the programs in a folder; onnx needs gateplug[onnx]")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="PACKAGE.NAME",
        help="a class or function of your own that the checkpoint names; a name is never imported from a file alone",
    )
    given = parser.parse_args(args)
    outputs = _outputs(given.out, given.overwrite)
    checkpoint = _read(given.checkpoint)
    try:
        net = fold(load(given.checkpoint, register=[_import(name) for name in given.register]))
    except (PlugError, ValueError, TypeError, RuntimeError) as error:
        hint = " On the command line: `--register PACKAGE.NAME`." if "register=" in str(error) else ""
        raise UserError(f"{given.checkpoint} cannot be folded: {error}.{hint}") from error
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(net, ExitRunner) and given.out.suffix == ".pt2":
        raise UserError(
            f"OUT is {str(given.out)!r}, and the network has exits: it becomes a program for each stage. Name a folder, e.g. "
            f"{str(given.out.with_suffix(''))!r}, or NAME.safetensors."
        )
    if not isinstance(net, ExitRunner) and not given.out.suffix:
        raise UserError(
            f"OUT is {str(given.out)!r}, a folder, and the network has no exits: it is one program. Add .pt2 to the name."
        )
    if given.out.suffix == ".safetensors":
        _write_weights(net, checkpoint, *outputs)
    elif isinstance(net, ExitRunner):
        _export_stages(net, checkpoint, given.out, given.form)
    else:
        _export(net, checkpoint, given.out)
    print("wrote " + ", ".join(str(path) for path in outputs))


def _outputs(out: Path, overwrite: bool) -> list[Path]:
    if out.suffix not in (".safetensors", ".pt2", ""):
        raise UserError(
            f"OUT is {str(out)!r}; its ending must be .safetensors (weights) or .pt2 (exported program), or a folder for the "
            "programs of a network with exits."
        )
    if not out.suffix:
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise UserError(f"{out} holds something already. Choose a folder that is new or empty.")
        return [out]
    outputs = [out, out.parent / "config.json"] if out.suffix == ".safetensors" else [out]
    exist = [str(path) for path in outputs if path.exists()]
    if exist and not overwrite:
        raise UserError(f"{' and '.join(exist)} would be overwritten. Choose another folder, or add `--overwrite`.")
    return outputs


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise UserError(f"There is no checkpoint {str(path)!r}.{' Here are: ' + ', '.join(near) + '.' if near else ''}")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint makes of torch.load
        raise UserError(f"{str(path)!r} is no checkpoint that can be read safely: {error}") from error
    return checkpoint


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--register {path}: it cannot be imported ({error}).") from error


def _write_weights(net: nn.Module, checkpoint: dict[str, Any], weights: Path, config: Path) -> None:
    from safetensors.torch import save_model

    save_model(net, str(weights))  # keeps tied weights once
    # The config of a Hugging Face network as its own `save_pretrained` writes it; what plugs changed is beside it.
    settings: Any = getattr(net, "config", None)
    described: dict[str, Any] = json.loads(settings.to_json_string()) if hasattr(settings, "to_json_string") else {}
    described["gateplug"] = {
        "version": gateplug.__version__,
        "model": checkpoint.get(MODEL_KEY),
        "example": checkpoint.get(EXAMPLE_KEY),
        **checkpoint.get("gateplug", {"plugs": []}),
    }
    config.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    weights.chmod(config.stat().st_mode & 0o777)  # safetensors lets nobody else read


def _plain_output(net: nn.Module, args: Any, output: Any) -> Any:
    """Give a Hugging Face output as a plain dict, without its cache: an exported program then loads without transformers."""
    if not isinstance(output, Mapping):
        return output
    return {key: value for key, value in output.items() if isinstance(value, (torch.Tensor, tuple, list, dict))}


def _example(checkpoint: dict[str, Any]) -> Any:
    example = checkpoint.get(EXAMPLE_KEY)
    if example is None:
        raise UserError(
            "The checkpoint does not say what the network is called with (`gateplug fit` writes that when the network"
            " is one sub-module of the LightningModule). Use `torch.export` in Python, or OUT.safetensors."
        )
    return example


def _export_stages(runner: ExitRunner, checkpoint: dict[str, Any], out: Path, form: str) -> None:
    args, kwargs = build_example(_example(checkpoint), batch=2)
    try:
        runner.export(out, args, kwargs, form)
    except PlugError as error:
        raise UserError(str(error)) from error


def _export(net: nn.Module, checkpoint: dict[str, Any], out: Path) -> None:
    example = _example(checkpoint)
    try:
        # Two samples: torch.export takes a size of 1 for a constant.
        args, kwargs = build_example(example, batch=2)
        net.register_forward_hook(_plain_output)
        _name_arguments(net, kwargs)
        names = inspect.signature(net.forward).bind(*args, **kwargs).arguments
        shapes = {name: _free_batch(value) for name, value in names.items()}
        program = torch.export.export(net, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # torch.export has no one exception of its own
        raise UserError(f"torch.export refuses the network: {type(error).__name__}: {error}") from error
    torch.export.save(program, out)
    called = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    foreign = sorted(str(operator) for operator in called if operator.namespace not in ("aten", "prim", "prims"))
    if foreign:
        print(f"{out} calls {', '.join(foreign)}: import what defines it before `torch.export.load`.")


def _name_arguments(net: nn.Module, kwargs: dict[str, Any]) -> None:
    """Say which keywords a ``forward(*args, **kwargs)`` takes: torch.export cannot give their shapes otherwise."""
    plain = net.forward
    declared = inspect.signature(plain).parameters.values()
    if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in declared):
        return

    def forward(*args: Any, **named: Any) -> Any:
        return plain(*args, **named)

    kept = [parameter for parameter in declared if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    known = {parameter.name for parameter in kept}
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in known]
    forward.__signature__ = inspect.Signature([*kept, *more])  # type: ignore[attr-defined]
    net.forward = forward


def _free_batch(value: Any) -> Any:
    """Let the first dimension of every tensor vary, where the network allows it (AUTO falls back to a constant)."""
    if isinstance(value, torch.Tensor):
        return {0: torch.export.Dim.AUTO} if value.dim() else None
    if isinstance(value, dict):
        return {key: _free_batch(item) for key, item in value.items()}
    return type(value)(_free_batch(item) for item in value) if isinstance(value, (list, tuple)) else None

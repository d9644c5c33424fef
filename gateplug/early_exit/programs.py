"""A network with exits as programs, one a stage, and a driver that runs no more of them than a batch needs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gateplug.core.errors import PlugError
from gateplug.early_exit.decision import Decision
from gateplug.early_exit.traced import Beside, Ending, Part, Start, inputs_of

if TYPE_CHECKING:
    from gateplug.early_exit.runner import ExitOutput, ExitRunner

FORMATS = ("pt2", "onnx")
_MANIFEST = "exits.json"
Program = Callable[..., list[Tensor]]


@torch.no_grad()
def export_stages(runner: ExitRunner, folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any], form: str = "pt2") -> None:
    """Write what comes before the blocks, the blocks up to each exit with that exit, and the end, as a program each.

    The number of samples is free; other sizes (tokens of a text, pixels) are those of the example.

    Args:
        runner: with its rule, mode and threshold, which are written as well.
        folder: new or empty.
        args: an example of the network's arguments, of two samples or more.
        kwargs: and by name.
        form: `pt2` (torch.export), or `onnx`, which needs the packages onnx and onnxscript.

    Raises:
        ValueError: an unknown form, an example of one sample.
        FileExistsError: the folder holds something.
        PlugError: a package is missing, or the network does not export.
    """
    if form not in FORMATS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMATS)}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: give a new folder, or an empty one")
    with tempfile.TemporaryDirectory(dir=_existing(folder)) as beside:  # all of it, or nothing
        _export(runner.alone(), Path(beside), args, kwargs, form)
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(beside).iterdir():
            path.rename(folder / path.name)


def _existing(folder: Path) -> Path:
    return folder if folder.is_dir() else _existing(folder.absolute().parent)


def _export(runner: ExitRunner, folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any], form: str) -> None:
    names, tensors = inputs_of(args, kwargs)
    stages = runner.stages
    flow = stages.begin(args, kwargs)
    samples = flow.size
    if samples < 2:
        raise ValueError("the example must be of two samples or more: torch.export takes a size of 1 for a constant")
    hidden, fixed, eager = flow.hidden, list(flow.beside), flow.follows
    flow.block(0)  # tells the form of what a block gives
    stages.place(None)
    free = torch.export.Dim("batch", min=1)

    def write(name: str, module: nn.Module, given: list[Tensor], rows: list[bool]) -> Callable[..., Any]:
        shapes = tuple({0: free} if follow else None for follow in rows)
        return _write(folder / f"{name}.{form}", module.eval(), tuple(given), shapes, form)

    per_sample = [t.dim() > 0 and len(t) == samples for t in tensors]
    more: list[Tensor] = []
    told = [False] * len(fixed)
    if not stages.sequential:
        start = Start(stages, names, args, kwargs)
        hidden, *more = write("start", start, tensors, per_sample)(*tensors)
        told = start.told()
    beside = Beside(fixed, told, flow.form)
    numbers = [i for i, tensor in enumerate(told) if tensor]
    # of a mask that eager mode leaves out, its length must tell
    known = [isinstance(fixed[i], Tensor) for i in numbers]
    follows = [eager[i] if k else len(t) == samples for i, k, t in zip(numbers, known, more, strict=False)]
    follows += [True] * (len(more) - len(follows))  # places
    first = 0
    for number, block in enumerate(stages.branches):
        given = [hidden, *more]
        hidden, *_ = write(f"exit{number}", Part(stages, beside, first, block), given, [True, *follows])(*given)
        first = block + 1
    end = Ending(stages, beside, flow.gave[0], first, args, kwargs)
    write("end", end, [hidden, *more, *([] if end.alone else tensors)], [True, *follows, *([] if end.alone else per_sample)])
    manifest = {
        "form": form,
        "gate": runner.gate,
        "mode": runner.mode,
        "threshold": runner.threshold,
        "costs": None if runner.costs is None else [float(c) for c in runner.costs],
        "exits": len(runner.branches),
        "start": not stages.sequential,
        "inputs": names,
        "per_sample": per_sample,
        "follows": follows,
        "end_takes_inputs": not end.alone,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, module: nn.Module, given: tuple[Tensor, ...], shapes: tuple[Any, ...], form: str) -> Callable[..., Any]:
    try:
        program = torch.export.export(module, given, dynamic_shapes=(shapes,))
        program = torch.export.export(_needed(program), given, dynamic_shapes=shapes)
        if form == "pt2":
            torch.export.save(program, path)
        else:
            names = [f"x{i}" for i in range(len(given))]  # an input that is not needed is left out
            torch.onnx.export(program, (), path, input_names=names, dynamo=True, verbose=False, external_data=False)
        return program.module()
    except ImportError as error:
        raise PlugError(f"form='onnx' needs the packages onnx and onnxscript: pip install 'gateplug[onnx]' ({error})") from error
    except Exception as error:  # torch.export has no one exception of its own
        raise PlugError(f"{path.stem} does not export: {type(error).__name__}: {error}") from error


def _needed(program: torch.export.ExportedProgram) -> nn.Module:
    """A program without what its result does not depend on: operations, and the weights that they alone use."""
    module = program.module()
    assert isinstance(module, torch.fx.GraphModule)
    needed = {node for node in module.graph.nodes if node.op == "output"}
    for node in reversed(module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
        elif node.op != "placeholder":  # also what checks a value that nobody uses
            module.graph.erase_node(node)
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [n for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))]:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)
    module.recompile()
    return module


class ExitPrograms:
    """Runs what :func:`export_stages` wrote: who has left is in no later program, and when all have left none is run.

    Args:
        folder: of the programs.
        threshold: as of :class:`gateplug.ExitRunner`; None: as exported.

    Raises:
        FileNotFoundError: there is no such folder, or no programs in it.
        PlugError: ONNX programs without the package onnxruntime.
    """

    def __init__(self, folder: str | Path, threshold: float | None = None) -> None:
        path = Path(folder) / _MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {_MANIFEST}: give a folder that ExitRunner.export has written")
        self.folder, self.told = Path(folder), json.loads(path.read_text(encoding="utf-8"))
        self.threshold = float(self.told["threshold"] if threshold is None else threshold)
        names = ["start"] * self.told["start"] + [f"exit{i}" for i in range(self.told["exits"])] + ["end"]
        self.programs: dict[str, Program] = {name: _load(self.folder / f"{name}.{self.told['form']}") for name in names}

    @torch.inference_mode()
    def __call__(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Run a batch, with the arguments of the example that was exported."""
        from gateplug.early_exit.runner import ExitOutput

        names, inputs = inputs_of(args, kwargs)
        if names != self.told["inputs"]:
            raise ValueError(f"the programs take {self.told['inputs']}, and got {names}: call them as in the export's example")
        first = inputs[self.told["per_sample"].index(True)]
        size = len(first)
        rows = torch.arange(size, device=first.device)
        exits = torch.full((size,), self.told["exits"], device=first.device)
        hidden, *beside = self.programs["start"](*inputs) if self.told["start"] else inputs
        decide = Decision(self.told["gate"], self.told["mode"], self.threshold)
        logits: Tensor | None = None
        for number in range(self.told["exits"]):
            hidden, z, gate = self.programs[f"exit{number}"](hidden, *beside)
            leave = decide(z, partial(_given, gate))
            if logits is None:
                logits = z.new_empty(size, z.shape[-1])
            logits[rows[leave]], exits[rows[leave]] = z[leave], number
            if leave.any():
                stay = ~leave
                rows, hidden = rows[stay], hidden[stay]
                beside = [t[stay] if f else t for t, f in zip(beside, self.told["follows"], strict=True)]
                inputs = [t[stay] if f else t for t, f in zip(inputs, self.told["per_sample"], strict=True)]
                decide.keep(stay)
            if not len(rows):
                break
        assert logits is not None
        if len(rows):
            more = inputs if self.told["end_takes_inputs"] else []
            logits[rows] = self.programs["end"](hidden, *beside, *more)[0]
        costs = self.told["costs"]
        return ExitOutput(logits, exits, None if costs is None else torch.tensor(costs, device=exits.device)[exits])


def _given(gate: Tensor, logits: Tensor) -> Tensor:
    return gate


def _load(path: Path) -> Program:
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()

        def run_module(*given: Tensor) -> list[Tensor]:
            out = module(*given)
            return [out] if isinstance(out, Tensor) else list(out)

        return run_module
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise PlugError("programs in ONNX need the package onnxruntime: pip install 'gateplug[onnx]'") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    numbers = {value.name: int(value.name.removeprefix("x")) for value in session.get_inputs()}

    def run_session(*given: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in session.run(None, {name: given[i].numpy() for name, i in numbers.items()})]

    return run_session

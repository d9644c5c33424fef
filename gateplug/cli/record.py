"""What the command line writes into a checkpoint, so that it can be opened without its YAML and without its data."""

import importlib
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import gateplug
from gateplug.core.answers import network
from gateplug.tasks.backbone import setting_names

MODEL_KEY = "gateplug_model"
EXAMPLE_KEY = "gateplug_example"


class Record(Callback):
    """Stores the model's configuration and the form of the network's first inputs in every checkpoint.

    ``checkpoint["gateplug_model"]`` is ``{class_path, init_args}`` in plain Python, as :func:`gateplug.load` reads it,
    ``checkpoint["gateplug_example"]`` the shapes and types of one call of the network, as :func:`build_example` reads
    them. Neither holds data.

    Attributes:
        started: Whether a batch was seen. Errors before that are about the set-up.
        example: Description of the first call's inputs, or None.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] | None = None
        self.example: dict[str, Any] | None = None
        self.started = False
        self._hook: Any = None

    def _look(self, module: L.LightningModule) -> None:
        self.started = True
        if self.example is None and self._hook is None:
            self._hook = network(module).register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        self.example = {"args": [describe(a) for a in args], "kwargs": {k: describe(v) for k, v in kwargs.items()}}

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the first call."""
        self._look(pl_module)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at the first call."""
        self._look(pl_module)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at the first call."""
        self._look(pl_module)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at the first call."""
        self._look(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._forget()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add both descriptions."""
        if self.config is not None:
            checkpoint[MODEL_KEY] = portable(self.config, pl_module)
        if self.example is not None:
            checkpoint[EXAMPLE_KEY] = self.example


def portable(node: Any, live: Any = None) -> Any:
    """A configuration with full class names, and without folders of this machine.

    A network from ``hf_model(pretrained=…)`` is described by its config instead: the checkpoint holds its weights.
    """
    if isinstance(node, list):
        return [portable(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "class_path" not in node:
        return {key: portable(value) for key, value in node.items()}
    path, arguments = full_name(node["class_path"]), dict(node.get("init_args") or {})
    if path == "gateplug.hf_model" and arguments.get("pretrained") and hasattr(live, "config"):
        stored, known = live.config.to_diff_dict(), setting_names(type(live.config)())
        # a checkpoint of an older transformers may bring settings that are gone: hf_model would refuse them
        kept = {k: v for k, v in stored.items() if k in known and k not in _NOT_SETTINGS}
        arguments |= {"pretrained": None, "architecture": live.config.model_type, "config": _plain(kept)}
    return {"class_path": path, "init_args": {k: portable(v, getattr(live, k, None)) for k, v in arguments.items()}}


_NOT_SETTINGS = ("architectures", "dtype", "model_type", "transformers_version", "torch_dtype")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key if isinstance(key, (str, int)) else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def full_name(path: str) -> str:
    """``gateplug.Name`` for gateplug's public names, else the name under which the thing was defined."""
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name) if module else None
    if thing is None or getattr(gateplug, name, None) is thing:
        return f"gateplug.{name}"
    return f"{thing.__module__}.{thing.__qualname__}"


def describe(value: Any) -> Any:
    """The form of an input: ``{"shape", "dtype"}`` of a tensor, a plain value as ``{"value"}``, containers of these."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, Mapping):
        return {"dict": {str(k): describe(v) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [describe(v) for v in value]}
    return {"lost": type(value).__name__}


def build_example(
    described: Mapping[str, Any], batch: int | None = None, device: torch.device | str = "cpu"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make inputs of the described form: zeros for floats, ones for whole numbers (a token, an open mask).

    Args:
        described: As in a checkpoint's ``gateplug_example``.
        batch: Size of the first dimension instead of the recorded one, where all tensors share it.
        device: Where the tensors go.

    Returns:
        Positional and keyword arguments of the network.

    Raises:
        ValueError: If an input was neither tensor nor plain value.
    """
    leaves = list(_tensors([*described["args"], *described["kwargs"].values()]))
    shared = len({leaf["shape"][0] if leaf["shape"] else None for leaf in leaves}) == 1

    def build(form: Any) -> Any:
        if "shape" in form:
            shape = list(form["shape"])
            if batch is not None and shared and shape:
                shape[0] = batch
            dtype = getattr(torch, form["dtype"])
            full = 0 if dtype.is_floating_point or dtype.is_complex else 1
            return torch.full(shape, full, dtype=dtype, device=device)
        if "lost" in form:
            raise ValueError(f"the network was called with a {form['lost']}, which a checkpoint cannot describe")
        if "dict" in form:
            return {key: build(item) for key, item in form["dict"].items()}
        return [build(item) for item in form["list"]] if "list" in form else form["value"]

    return tuple(build(a) for a in described["args"]), {k: build(v) for k, v in described["kwargs"].items()}


def _tensors(forms: list[Any]) -> Any:
    for form in forms:
        if "shape" in form:
            yield form
        else:
            yield from _tensors(list(form.get("dict", {}).values()) + list(form.get("list", [])))

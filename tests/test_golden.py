"""Every golden case of every room: outputs, gradients, errors."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"
ROOMS = sorted(path.stem for path in FOLDER.glob("*.json"))
TENSORS = {room: load_file(FOLDER / f"{room}.safetensors") for room in ROOMS}
CASES = [
    pytest.param(room, case, id=f"{room}:{case['name']}")
    for room in ROOMS
    for case in json.loads((FOLDER / f"{room}.json").read_text())["cases"]
]


def value(room: str, x: Any) -> Any:
    """A case's value, with tensors in place of their keys."""
    if isinstance(x, str) and x.startswith("@"):
        return TENSORS[room][x[1:]].clone()
    if isinstance(x, list):
        return [value(room, i) for i in x]
    if isinstance(x, dict):
        return {k: value(room, v) for k, v in x.items()}
    return x


def find(path: str) -> Any:
    """`module:name`."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def assert_close(got: Any, want: Any, case: dict[str, Any]) -> None:
    rtol, atol = case.get("rtol", 1e-9), case.get("atol", 1e-10)
    if not isinstance(want, Tensor):
        assert got == want
        return
    assert got.shape == want.shape
    assert torch.allclose(got.detach().double(), want.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("room", "case"), CASES)
def test_golden(room: str, case: dict[str, Any]) -> None:
    args, grads = value(room, case.get("args", {})), case.get("grad", {})
    for name in grads:
        if not name.startswith("state."):
            args[name].requires_grad_()
    call = find(case["call"]) if "call" in case else None
    if "raises" in case:
        with pytest.raises(ValueError, match=".") as caught:
            call(**args)
        assert case["raises"] in {c.__name__ for c in type(caught.value).__mro__}
        return
    module: nn.Module | None = None
    if "build" in case:
        module = find(case["build"])(**value(room, case.get("init", {}))).to(getattr(torch, case.get("dtype", "float64")))
        module.load_state_dict(value(room, case.get("state", {})), strict=True)
        call = module.eval()
    out = call(**args)
    outs = list(out) if isinstance(out, tuple) else [out]
    for got, want in zip(outs, value(room, case["out"]), strict=True):
        assert_close(got, want, case)
    if grads:
        (outs[0] * value(room, case["cotangent"])).sum().backward()
        for name, want in grads.items():
            holder = dict(module.named_parameters())[name[6:]] if module is not None and name[:6] == "state." else args[name]
            assert_close(holder.grad, value(room, want), case)

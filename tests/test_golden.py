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


def flat(out: Any, keys: list[str] | None = None) -> list[Any]:
    """What a call returned, as a list: of a tuple or a list of tensors its parts, of a dict the values of `keys`."""
    if isinstance(out, dict):
        return [out[k] for k in keys or out]
    if isinstance(out, tuple) or (isinstance(out, list) and any(isinstance(x, Tensor) for x in out)):
        return list(out)
    return [out]


def assert_close(got: Any, want: Any, case: dict[str, Any]) -> None:
    if not isinstance(want, Tensor | float):
        assert type(got) is type(want)
        assert got == want
        return
    got, want = (torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else torch.as_tensor(x) for x in (got, want))
    assert got.shape == want.shape
    if not want.is_floating_point():
        assert torch.equal(got.to(torch.int64), want.to(torch.int64))
        return
    rtol, atol = case.get("rtol", 1e-9), case.get("atol", 1e-10)
    assert torch.allclose(got.detach().double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


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
    outs = flat(out, case.get("keys"))
    for got, want in zip(outs, value(room, case["out"]), strict=True):
        assert_close(got, want, case)
    if grads:
        (outs[0] * value(room, case["cotangent"])).sum().backward()
        for name, want in grads.items():
            holder = dict(module.named_parameters())[name[6:]] if module is not None and name[:6] == "state." else args[name]
            assert_close(holder.grad, value(room, want), case)

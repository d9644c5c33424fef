"""The gate of an exit: what it reads, in which precision, and what it shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gateplug.early_exit import ExitGate
from gateplug.early_exit.functional import uncertainty_features


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_gate_is_a_linear_reading_of_its_features_in_their_order() -> None:
    gate = ExitGate(("margin", "confidence")).double()
    assert list(gate.state_dict()) == ["linear.weight", "linear.bias"]
    z = normal(5, 3, 4)
    w, b = gate.linear.weight[0].tolist(), gate.linear.bias.item()
    want = [[w[0] * u[2] + w[1] * u[0] + b for u in rows] for rows in uncertainty_features(z).tolist()]
    assert gate(z).tolist() == [pytest.approx(v, abs=1e-12) for v in want]


def test_the_gate_computes_in_float32_under_autocast_and_in_half_precision() -> None:
    gate, z = ExitGate(), normal(64, 10).float()
    plain = gate(z)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gate(z)
    assert torch.equal(inside, plain)
    half = gate.bfloat16()
    assert half(z.bfloat16()).dtype == torch.float32
    half(z.bfloat16()).sum().backward()
    assert half.linear.weight.grad is not None
    assert half.linear.weight.grad.dtype == torch.bfloat16


def test_the_gate_tells_how_open_it_is_when_asked() -> None:
    gate, z = ExitGate(), normal(8, 3).float()
    gate(z)
    assert gate.openness() is None
    gate.recording = True
    want = torch.cat([gate(z[:5]), gate(z[5:])]).sigmoid().mean()
    seen = gate.openness()
    assert seen is not None
    assert seen.axes == ("exit",)
    assert seen.rows == 8
    assert seen.values.tolist() == [pytest.approx(float(want.detach()), rel=1e-6)]


def test_a_gate_learns_and_its_exit_feels_nothing() -> None:
    gate, z = ExitGate(), normal(8, 3).float().requires_grad_()
    gate(z).sum().backward()
    assert z.grad is None
    assert gate.linear.weight.grad is not None
    assert gate.linear.weight.grad.tolist() == [pytest.approx(uncertainty_features(z).sum(0).tolist(), rel=1e-5)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ExitGate(("confidence", "entrpy")),
            "'entrpy' is none of 'confidence', 'entropy', 'margin', 'sharp_entropy'. Did you mean 'entropy'",
        ),
        (lambda: ExitGate(()), r"features=\(\) must name at least one"),
        (lambda: ExitGate(("margin", "margin")), "none twice"),
        (lambda: ExitGate()(torch.zeros(2, 1)), "C ≥ 2"),
    ],
)
def test_bad_input_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

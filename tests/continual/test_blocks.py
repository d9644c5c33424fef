"""Availability of single weights, stepped block by block, is the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateplug.continual.blocks import BLOCK, step_in_blocks
from gateplug.continual.functional import availability_step, parameter_relevance
from gateplug.continual.layers import Availability


def literal(a: torch.Tensor, w: torch.Tensor, g: torch.Tensor, eta: float, reactivation: float) -> torch.Tensor:
    return availability_step(a.double(), parameter_relevance(w.double(), g.double()), eta, reactivation)


@given(st.integers(1, 40), st.floats(1e-3, 0.5), st.floats(0, 2), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_it_is_the_formula(rows: int, eta: float, reactivation: float, seed: int) -> None:
    torch.manual_seed(seed)
    a, w, g = torch.rand(rows, 7), torch.randn(rows, 7), torch.randn(rows, 7) * 1e-3
    want = literal(a, w, g, eta, reactivation)
    assert step_in_blocks(a, w, g, eta, reactivation)
    assert torch.allclose(a.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_blocks_make_no_difference(size: int) -> None:
    torch.manual_seed(0)
    a, w, g = torch.rand(size), torch.randn(size), torch.randn(size)
    want = literal(a, w, g, 0.01, 0.1)
    assert step_in_blocks(a, w, g, 0.01, 0.1)
    assert torch.allclose(a.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    a, w, g = torch.rand(50), torch.randn(50).to(kind), torch.randn(50).to(kind)
    want = literal(a, w, g, 0.1, 0.0)
    assert step_in_blocks(a, w, g, 0.1, 0.0)
    assert torch.allclose(a.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bad", "finite"), [(float("nan"), False), (float("inf"), False), (0.0, True)])
def test_what_tells_nothing_changes_nothing(bad: float, finite: bool) -> None:
    a, w, g = torch.rand(5), torch.ones(5), torch.ones(5)
    g[2] = bad
    if bad == 0:
        g.zero_()
    before = a.clone()
    assert step_in_blocks(a, w, g, 0.1, 0.5) is finite
    assert torch.equal(a, before)


def test_an_availability_counts_what_it_left_out_and_takes_tensors_of_any_layout() -> None:
    torch.manual_seed(0)
    one, other = Availability((6, 4)), Availability((6, 4))
    w, g = torch.randn(6, 4), torch.randn(6, 4)
    one.step_by(w, g, 0.1, 0.2)
    other.step_by(w.t().contiguous().t(), g, 0.1, 0.2)
    assert torch.allclose(one.draft, other.draft, rtol=1e-5)
    one.step_by(w, g * float("nan"), 0.1, 0.2)
    assert (int(one.skipped), int(other.skipped)) == (1, 0)

"""Calibration error and reliability: against loops over samples, numpy's quantiles and torchmetrics."""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from gateplug.early_exit import functional as E

FAST = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 10**6)
binnings = st.sampled_from(["quantile", "width"])
# round values repeat, and lie on edges of equal width
values = st.lists(st.one_of(st.sampled_from([0.0, 0.2, 0.5, 0.6, 1.0]), st.floats(0, 1)), min_size=1, max_size=40)


def draw(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, generator=g, dtype=torch.float64)
    return confidence, torch.rand(n, generator=g, dtype=torch.float64) < confidence


def bins_of(confidence: list[float], edges: list[float]) -> list[int]:
    """The bin of each value: how many interior edges are strictly below it."""
    return [sum(edge < c for edge in edges[1:-1]) for c in confidence]


@FAST
@given(confidence=values, bins=st.integers(1, 16), binning=binnings, seed=seeds)
def test_error_and_bars_are_sums_over_the_samples_of_a_bin(confidence: list[float], bins: int, binning: str, seed: int) -> None:
    c = torch.tensor(confidence, dtype=torch.float64)
    right = torch.rand(len(c), generator=torch.Generator().manual_seed(seed)) < 0.5
    where = bins_of(confidence, E.bin_edges(c, bins, binning).tolist())
    error, bars = 0.0, E.reliability(c, right, bins, binning)
    for b in range(bins):
        own = [i for i, at in enumerate(where) if at == b]
        assert int(bars.samples[b]) == len(own)
        if not own:
            assert bars.confidence[b].isnan()
            assert bars.accuracy[b].isnan()
            continue
        sure, hits = sum(confidence[i] for i in own), sum(bool(right[i]) for i in own)
        assert float(bars.confidence[b]) == pytest.approx(sure / len(own), rel=1e-12)
        assert float(bars.accuracy[b]) == pytest.approx(hits / len(own), rel=1e-12)
        error += abs(sure - hits) / len(c)
    assert float(E.calibration_error(c, right, bins, binning)) == pytest.approx(error, abs=1e-12)


@FAST
@given(confidence=values, bins=st.integers(1, 16))
def test_edges_are_numpys_quantiles_or_equally_wide(confidence: list[float], bins: int) -> None:
    c = torch.tensor(confidence, dtype=torch.float64)
    want = np.quantile(np.array(confidence), np.arange(bins + 1) / bins)
    # numpy rounds the place of a quantile, here it is a fraction of whole numbers
    assert E.bin_edges(c, bins, "quantile").tolist() == pytest.approx(want.tolist(), abs=1e-14)
    assert E.bin_edges(c, bins, "width").tolist() == [i / bins for i in range(bins + 1)]
    edges = E.bin_edges(c, bins, "quantile").tolist()
    assert edges == sorted(edges)


@pytest.mark.parametrize("bins", [3, 7, 15])
def test_a_quantile_that_is_a_sample_is_it_to_the_bit_and_keeps_it_in_the_lower_bin(bins: int) -> None:
    for each in range(1, 9):
        confidence, right = draw(bins * each + 1, seed=each)
        ordered = confidence.sort().values
        edges = E.bin_edges(confidence, bins, "quantile")
        assert torch.equal(edges, ordered[::each])
        # the first bin has the smallest value as well as its upper edge
        assert E.reliability(confidence, right, bins, "quantile").samples.tolist() == [each + 1] + [each] * (bins - 1)


@FAST
@given(n=st.integers(1, 60), bins=st.integers(1, 20), seed=seeds)
def test_equally_wide_bins_agree_with_torchmetrics_away_from_edges(n: int, bins: int, seed: int) -> None:
    c, right = draw(n, seed)
    # torchmetrics looks at the confidence of the predicted class: keep to p ≥ 1/2, where that is p itself
    c = 0.5 + 0.4999 * c
    want = binary_calibration_error(c.float(), right.long(), n_bins=bins, norm="l1")
    near = (c[:, None] - torch.arange(bins + 1) / bins).abs().min() < 1e-5
    if not near:
        # torchmetrics computes in float32
        assert float(E.calibration_error(c, right, bins, "width")) == pytest.approx(float(want), abs=1e-5)


@FAST
@given(n=st.integers(1, 60), bins=st.integers(1, 20), binning=binnings, seed=seeds)
def test_the_order_of_the_samples_does_not_matter_and_the_error_lies_in_0_1(n: int, bins: int, binning: str, seed: int) -> None:
    c, right = draw(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    error = E.calibration_error(c, right, bins, binning)
    assert 0 <= float(error) <= 1
    assert float(E.calibration_error(c[order], right[order], bins, binning)) == pytest.approx(float(error), abs=1e-13)


def test_the_mean_of_the_errors_of_batches_is_another_and_larger_number() -> None:
    c, right = draw(6400)
    pooled = float(E.calibration_error(c, right))
    batches = [float(E.calibration_error(a, b)) for a, b in zip(c.split(64), right.split(64), strict=True)]
    assert pooled < 0.03
    assert sum(batches) / 100 > 5 * pooled, "four samples a bin measure noise"


def test_extremes_of_calibration() -> None:
    sure = torch.ones(10)
    for binning in ("quantile", "width"):
        assert float(E.calibration_error(sure, torch.ones(10, dtype=torch.bool), binning=binning)) == 0
        assert float(E.calibration_error(sure, torch.zeros(10, dtype=torch.bool), binning=binning)) == 1


def test_repeated_edges_leave_empty_bins() -> None:
    c, right = torch.tensor([0.3] * 20 + [0.9]), torch.tensor([True] * 10 + [False] * 11)
    bars = E.reliability(c, right, 15, "quantile")
    assert bars.samples.tolist() == [20] + [0] * 13 + [1]
    # |20 · 0.3 − 10| + |0.9 − 0| over 21, with the float32 of 0.3 and 0.9
    assert float(E.calibration_error(c, right, 15, "quantile")) == pytest.approx(4.9 / 21, rel=1e-6)


@pytest.mark.parametrize("binning", ["quantile", "width"])
def test_a_confidence_slightly_above_one_counts_as_one(binning: str) -> None:
    above = torch.tensor([math.nextafter(1, 2), 1 + 1e-7, 0.4], dtype=torch.float64)
    right = torch.tensor([True, True, False])
    assert torch.equal(E.calibration_error(above, right, 5, binning), E.calibration_error(above.clamp(max=1), right, 5, binning))
    assert float(E.calibration_error(above[:2], right[:2], 5, binning)) == 0


@pytest.mark.parametrize("binning", ["quantile", "width"])
def test_no_samples_have_no_error(binning: str) -> None:
    none = torch.zeros(0)
    assert E.calibration_error(none, none.bool(), 15, binning).isnan()
    assert E.reliability(none, none.bool(), 15, binning).samples.tolist() == [0] * 15
    assert E.bin_edges(none, 15, "quantile").isnan().all()


def test_a_confidence_that_is_nan_is_not_hidden() -> None:
    assert E.calibration_error(torch.tensor([0.5, math.nan]), torch.tensor([True, False])).isnan()


def test_the_values_quantile_of_torch_cannot_take_are_no_limit() -> None:
    many = torch.arange(2**24 + 1, dtype=torch.float32) / 2**25
    with pytest.raises(RuntimeError, match="too large"):
        many.quantile(0.5)
    assert E.bin_edges(many, 2, "quantile").tolist() == [0.0, 0.25, 0.5]


def test_a_number_is_in_the_bin_whose_upper_edge_it_is() -> None:
    edges = E.bin_edges(torch.zeros(1), 4, "width").tolist()
    for c in (0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0):
        samples = E.reliability(torch.tensor([c]), torch.tensor([True]), 4, "width").samples.tolist()
        assert samples.index(1) == max(bisect.bisect_left(edges, c) - 1, 0)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ValueError, {"bins": 0}, "bins=0 must be at least 1"),
        (TypeError, {"bins": 1.5}, "bins=1.5 is a float"),
        (ValueError, {"binning": "mass"}, "binning='mass' must be one of 'quantile', 'width'"),
        (
            ValueError,
            {"correct": torch.ones(2, dtype=torch.bool)},
            r"confidence of shape \(3,\) and correct of shape \(2,\) must both be",
        ),
        (ValueError, {"confidence": torch.ones(3, 1), "correct": torch.ones(3, 1)}, r"must both be \(N,\)"),
    ],
)
def test_bad_input_is_refused_by_name(kind: type[Exception], arguments: dict, message: str) -> None:
    good = {"confidence": torch.ones(3), "correct": torch.ones(3, dtype=torch.bool)}
    for call in (E.calibration_error, E.reliability):
        with pytest.raises(kind, match=message):
            call(**good | arguments)

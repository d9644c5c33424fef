"""The metrics: pooled over batches and processes, without the samples that have no label."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric

import gateplug as gp
from gateplug.early_exit import CalibrationError, ConformalCoverage, ExitCalibration
from gateplug.early_exit import functional as E
from tests.ddp import two_processes

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)
EXITS, CLASSES = 3, 4


def draw(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, L, C) that know a little, exits (N,), labels (N,)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    z = torch.randn(n, EXITS, CLASSES, generator=g) + 2 * torch.nn.functional.one_hot(labels, CLASSES)[:, None]
    return z, torch.randint(0, EXITS, (n,), generator=g), labels


def confident(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    z, _, labels = draw(n, seed)
    sure, guess = z[:, 0].softmax(-1).max(-1)
    return sure, guess == labels


def cut(n: int, at: list[int]) -> list[int]:
    """Sizes of batches, empty ones as well."""
    ends = sorted(min(a, n) for a in at)
    return [b - a for a, b in zip([0, *ends], [*ends, n], strict=True)]


def fill(metric: Metric, sizes: list[int], *parts: Tensor) -> Metric:
    for batch in zip(*(p.split(sizes) for p in parts), strict=True):
        metric.update(*batch)
    return metric


def same(got: Tensor | dict[str, Tensor], want: Tensor | dict[str, Tensor]) -> None:
    if isinstance(got, Tensor):
        got, want = {"": got}, {"": want}
    assert list(got) == list(want)
    for name, value in got.items():
        assert float(value) == pytest.approx(float(want[name]), abs=1e-12, nan_ok=True), name


@FAST
@given(
    n=st.integers(1, 60), at=st.lists(st.integers(0, 60), max_size=5), binning=st.sampled_from(["quantile", "width"]), seed=seeds
)
def test_the_error_is_that_of_the_epoch_however_it_is_cut_and_ordered(n: int, at: list[int], binning: str, seed: int) -> None:
    sure, right = confident(n, seed)
    want = E.calibration_error(sure, right, 10, binning)
    same(fill(CalibrationError(10, binning), cut(n, at), sure, right).compute(), want)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    same(fill(CalibrationError(10, binning), cut(n, at), sure[order], right[order]).compute(), want)


@FAST
@given(n=st.integers(0, 60), at=st.lists(st.integers(0, 60), max_size=4), ignore=st.sampled_from([-100, 0]), seed=seeds)
def test_every_exit_is_judged_on_all_and_on_its_own_samples(n: int, at: list[int], ignore: int, seed: int) -> None:
    z, left, labels = draw(n, seed)
    labels = torch.where(torch.arange(n) % 5 == 2, ignore, labels)
    got = fill(ExitCalibration(EXITS, bins=5, ignore_index=ignore), cut(n, at), z, left, labels).compute()
    want: dict[str, list[tuple[float, bool]]] = {f"exit{k}/{part}": [] for part in ("all", "left") for k in range(EXITS)}
    want["mixture"] = []
    for i in range(n):
        if labels[i] == ignore:
            continue
        for k in range(EXITS):
            p = z[i, k].softmax(-1)
            seen = (float(p.max()), int(p.argmax()) == int(labels[i]))
            want[f"exit{k}/all"].append(seen)
            if left[i] == k:
                want[f"exit{k}/left"].append(seen)
                want["mixture"].append(seen)
    assert set(got) == set(want)
    for name, seen in want.items():
        sure, right = (
            torch.tensor([s for s, _ in seen], dtype=torch.float64),
            torch.tensor([r for _, r in seen], dtype=torch.bool),
        )
        assert float(got[name]) == pytest.approx(float(E.calibration_error(sure, right, 5)), abs=1e-12, nan_ok=True), name


@FAST
@given(
    n=st.integers(0, 50),
    at=st.lists(st.integers(0, 50), max_size=4),
    variant=st.sampled_from(["general", "all", "strict", "per_exit"]),
    seed=seeds,
)
def test_coverage_is_that_of_the_functions_without_unlabelled_samples(n: int, at: list[int], variant: str, seed: int) -> None:
    z, left, labels = draw(120, seed + 1)
    metric = ConformalCoverage(0.2, variant)
    metric.fit(z.softmax(-1), left, torch.where(torch.arange(120) % 4 == 1, -100, labels))
    kept = torch.arange(120) % 4 != 1
    true = 1 - z.softmax(-1)[kept, :][torch.arange(90), :, labels[kept]]
    assert metric.thresholds is not None
    assert torch.equal(metric.thresholds, E.conformal_thresholds(true, left[kept], 0.2, variant))
    z, left, labels = draw(n, seed)
    marked = torch.where(torch.arange(n) % 3 == 0, -100, labels)
    got = fill(metric, cut(n, at), z.softmax(-1), left, marked).compute()
    kept = marked != -100
    own = z.softmax(-1)[torch.arange(n), left]
    want = E.coverage_and_size(E.conformal_sets(own, left, metric.thresholds)[kept], labels[kept], left[kept], EXITS)
    named = {f"exit{k}/coverage": want.coverage[k] for k in range(EXITS)} | {f"exit{k}/size": want.size[k] for k in range(EXITS)}
    same(got, {**named, "coverage": want.overall_coverage, "size": want.overall_size})


def made() -> list[tuple[Metric, tuple[Tensor, ...]]]:
    """Each metric, ready, with a batch."""
    z, left, labels = draw(40)
    coverage = ConformalCoverage(0.2)
    coverage.fit(z.softmax(-1), left, labels)
    return [
        (CalibrationError(), confident(40)),
        (ExitCalibration(EXITS), (z, left, labels)),
        (coverage, (z.softmax(-1), left, labels)),
    ]


@pytest.mark.parametrize("which", range(3))
def test_a_metric_forgets_on_reset_copies_and_gives_the_value_of_a_batch_in_forward(which: int) -> None:
    metric, batch = made()[which]
    first, second = (tuple(p[part] for p in batch) for part in (slice(0, 25), slice(25, 40)))
    whole = fill(copy.deepcopy(metric), [40], *batch).compute()
    alone = fill(copy.deepcopy(metric), [15], *second).compute()
    metric(*first)
    same(metric(*second), alone)
    same(copy.deepcopy(metric).compute(), whole)
    same(metric.compute(), whole)
    metric.reset()
    same(fill(metric, [15], *second).compute(), alone)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_an_epoch_without_samples_is_nan(which: int) -> None:
    metric, batch = made()[which]
    values = metric.compute()
    assert all(v.isnan() for v in (values.values() if isinstance(values, dict) else [values]))
    metric.reset()
    metric.update(*(p[:0] for p in batch))
    values = metric.compute()
    assert all(v.isnan() for v in (values.values() if isinstance(values, dict) else [values]))


def test_double_precision_is_kept_where_it_is_set() -> None:
    sure, right = confident(50)
    sure = sure.double() + 1e-9
    metric = fill(CalibrationError(binning="width").set_dtype(torch.float64), [20, 30], sure, right)
    assert float(metric.compute()) == float(E.calibration_error(sure, right, binning="width"))
    assert abs(float(fill(CalibrationError(binning="width"), [50], sure, right).compute()) - float(metric.compute())) < 1e-7


def test_half_precision_logits_are_read_in_float32() -> None:
    z, left, labels = draw(40)
    same(
        fill(ExitCalibration(EXITS), [40], z.bfloat16(), left, labels).compute(),
        fill(ExitCalibration(EXITS), [40], z.bfloat16().float(), left, labels).compute(),
    )


def test_thresholds_outlive_a_reset_and_may_be_set() -> None:
    metric, batch = made()[2]
    fitted = metric.thresholds.clone()
    metric.reset()
    assert torch.equal(metric.thresholds, fitted)
    assert not metric.state_dict()
    other = ConformalCoverage(0.2)
    other.thresholds = fitted
    same(fill(other, [40], *batch).compute(), fill(metric, [40], *batch).compute())


def on_two(folder: Path, devices: int) -> None:
    """Uneven shares, and one of the processes without any sample in the second half."""
    fabric = L.Fabric(accelerator="cpu", devices=devices, strategy="ddp")
    fabric.launch()
    out = {}
    for which, (metric, batch) in enumerate(made()):
        for name, mine in (("uneven", [slice(0, 27), slice(27, 40)]), ("one empty", [slice(0, 40), None])):
            part = mine[fabric.global_rank]
            if part is not None:
                metric.update(*(p[part] for p in batch))
            out[which, name] = metric.compute()
            metric.reset()
    if fabric.global_rank == 0:
        torch.save(out, folder / "seen.pt")


def test_two_processes_pool_their_samples_also_where_one_has_none(tmp_path: Path) -> None:
    two_processes(on_two, tmp_path)
    seen = torch.load(tmp_path / "seen.pt")
    for which, (metric, batch) in enumerate(made()):
        want = fill(metric, [40], *batch).compute()
        same(seen[which, "uneven"], want)
        same(seen[which, "one empty"], want)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (ValueError, lambda: CalibrationError(bins=0), "bins=0 must be at least 1"),
        (ValueError, lambda: CalibrationError(binning="mass"), "binning='mass' must be one of"),
        (
            ValueError,
            lambda: CalibrationError().update(torch.ones(3), torch.ones(2)),
            r"confidence of shape \(3,\) and correct of shape \(2,\)",
        ),
        (ValueError, lambda: ExitCalibration(0), "exits=0 must be at least 1"),
        (TypeError, lambda: ExitCalibration(2.0), "exits=2.0 is a float"),
        (ValueError, lambda: ExitCalibration(2, binning="mass"), "binning='mass' must be one of"),
        (
            ValueError,
            lambda: ExitCalibration(2).update(*draw(5)),
            r"logits of shape \(5, 3, 4\) must be \(B, 2, C\): all exits, the last",
        ),
        (
            ValueError,
            lambda: ExitCalibration(3).update(draw(5)[0], *draw(4)[1:]),
            r"exits of shape \(4,\) and labels of shape \(4,\) must both be \(5,\)",
        ),
        (ValueError, lambda: ConformalCoverage(alpha=1.0), "alpha=1.0 must lie between 0 and 1"),
        (ValueError, lambda: ConformalCoverage(variant="each"), "variant='each' must be one of"),
        (
            ValueError,
            lambda: ConformalCoverage().fit(torch.ones(5, 3), *draw(5)[1:]),
            r"probs of shape \(5, 3\) must be \(B, L, C\)",
        ),
        (gp.PlugError, lambda: ConformalCoverage().update(*draw(5)), r"has no thresholds: call fit\(probs, exits, labels\)"),
        (ValueError, lambda: made()[2][0].update(torch.ones(5, 2, 4), *draw(5)[1:]), r"must be \(B, 3, C\)"),
    ],
)
def test_bad_input_is_refused_by_name(kind: type[Exception], call, message: str) -> None:
    with pytest.raises(kind, match=message):
        call()

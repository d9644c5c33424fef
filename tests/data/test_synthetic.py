"""gp.SyntheticTasks against its formulas, written out one sample and one task at a time."""

import itertools
import math

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import nn

from gateplug.data import SyntheticTasks
from gateplug.data import synthetic as source
from tests.data import test_exact_resume as exact

SMALL = {"train_samples": 72, "val_samples": 20, "test_samples": 30}


def small(**kwargs):
    return SyntheticTasks(**{**SMALL, **kwargs})


def table(data, split):
    rows = data.dataset(split)
    return rows.columns["x"], rows.labels.columns["y"]


def literal(data, x, task):
    """u f_a(x) + (1 - u) f_b(x) of one sample, by the formulas."""

    def expert(j):
        out = 0.0
        for row, bias, weight in zip(data.truth.inner[j], data.truth.bias[j], data.truth.outer[j], strict=True):
            out += max(0.0, sum(float(a) * float(v) for a, v in zip(row, x, strict=True)) + float(bias)) * float(weight)
        return out

    size = data.tasks // len(data.pairs)
    first, second = data.pairs[task // size].tolist()
    u = float(data.weights[task])
    return u * expert(first) + (1 - u) * expert(second)


def test_the_documented_sizes_and_forms():
    data = SyntheticTasks()
    data.setup()
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [50_000, 5_000, 10_000]
    batch = next(iter(data.train_dataloader()))
    assert batch["x"].shape == (512, 10)
    assert batch["labels"]["y"].shape == (512, 128)
    assert batch["x"].dtype == batch["labels"]["y"].dtype == torch.float32
    assert data.groups.tolist() == [g for g in range(16) for _ in range(8)]
    assert data.pairs.shape == (16, 2)
    assert data.groups.dtype == data.pairs.dtype == torch.int64
    assert tuple(data.truth.inner.shape) == (16, 4, 10)


def test_every_task_is_the_literal_mixture_of_its_groups_experts():
    data = small(noise=0.0, tasks=12, groups=4, experts=5, dim=3, hidden=2)
    x, y = table(data, "train")
    for sample, task in itertools.product(range(0, 72, 9), range(12)):
        # float32 labels of values up to some 10
        assert float(y[sample, task]) == pytest.approx(literal(data, x[sample], task), abs=2e-6)


def test_what_the_mixture_leaves_is_normal_noise_of_the_size_asked_for():
    data = SyntheticTasks(train_samples=5000, noise=0.3)
    x, y = table(data, "train")
    left = y - data.signal(x)
    n = left.numel()  # 640,000
    assert abs(float(left.mean())) < 5 * 0.3 / math.sqrt(n)
    assert float(left.std()) == pytest.approx(0.3, rel=5 / math.sqrt(2 * n))
    assert float((left / 0.3).pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / n))  # a normal's kurtosis
    between = torch.corrcoef(left.T)[~torch.eye(128, dtype=torch.bool)]
    assert float(between.abs().max()) < 6 / math.sqrt(5000)  # each task has its own
    clean = SyntheticTasks(train_samples=5000, noise=0.0)
    assert torch.equal(clean.dataset("train").columns["x"], x)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_true_experts_have_unit_variance(seed):
    data = SyntheticTasks(seed=seed)
    x = torch.randn(200_000, 10, generator=torch.Generator().manual_seed(99))  # not the points that they were scaled on
    f = data.truth(x)
    # two estimates with a standard error of some 1 % (65,536 points, heavier tails than the normal) and .5 %
    assert ((f.var(0) - 1).abs() < 0.05).all()


def test_experts_are_drawn_as_the_paper_of_the_construction_says():
    """Before scaling A, a and v are N(0, 1): scale leaves A and a alone."""
    data = SyntheticTasks(experts=200, groups=1, tasks=1, **SMALL)
    for values in (data.truth.inner, data.truth.bias):
        n = values.numel()
        assert abs(float(values.mean())) < 5 / math.sqrt(n)
        assert float(values.std()) == pytest.approx(1, rel=5 / math.sqrt(2 * n))
    signs = data.truth.outer.sign().mean()
    assert abs(float(signs)) < 5 / math.sqrt(800)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.data(), st.integers(0, 100))
def test_no_two_groups_have_the_same_pair(experts, draw, seed):
    groups = draw.draw(st.integers(1, math.comb(experts, 2)))
    data = small(experts=experts, groups=groups, tasks=3 * groups, seed=seed)
    pairs = [tuple(p) for p in data.pairs.tolist()]
    assert len(set(pairs)) == groups
    assert all(0 <= a < b < experts for a, b in pairs)
    assert torch.bincount(data.groups).tolist() == [3] * groups
    assert ((data.weights >= 0.3) & (data.weights < 0.7)).all()


def test_weights_are_uniform_between_three_and_seven_tenths():
    u = small(tasks=16_000).weights
    counts = torch.histc(u, 8, 0.3, 0.7)
    assert float(counts.sum()) == 16_000
    assert ((counts - 2000) ** 2 / 2000).sum() < 30  # chi-squared, 7 degrees of freedom: 99.99 %


def test_tasks_of_a_group_are_more_alike_than_others():
    data = SyntheticTasks(train_samples=4000, noise=0.0, experts=32)
    alike = torch.corrcoef(table(data, "train")[1].T).abs()
    same = data.groups[:, None] == data.groups
    off = ~torch.eye(128, dtype=torch.bool)
    assert alike[same & off].mean() > alike[~same].mean() + 0.4


def test_all_is_a_function_of_the_seed_and_splits_share_no_sample():
    a, b, other = small(), small(), small(seed=1)
    for split in ("train", "val", "test"):
        for x, y, z in zip(table(a, split), table(b, split), table(other, split), strict=True):
            assert torch.equal(x, y)
            assert not torch.equal(x, z)
    assert torch.equal(a.pairs, b.pairs)
    assert not torch.equal(a.pairs, other.pairs)
    assert not torch.equal(a.weights, other.weights)
    assert not torch.equal(a.truth.inner, other.truth.inner)
    seen = [{row.numpy().tobytes() for row in table(a, split)[0]} for split in ("train", "val", "test")]
    assert len(set.union(*seen)) == 72 + 20 + 30


def test_the_number_of_threads_does_not_matter():
    before = torch.get_num_threads()
    try:
        ys = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ys.append(table(SyntheticTasks(train_samples=20_000), "train")[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*ys)


def test_missing_labels_are_of_training_alone_and_change_no_other():
    whole, holes, other = (small(train_samples=1000, missing=m, seed=s) for m, s in ((0.0, 0), (0.3, 0), (0.3, 1)))
    gone = table(holes, "train")[1].isnan()
    n = gone.numel()
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / n))
    assert torch.equal(table(holes, "train")[1][~gone], table(whole, "train")[1][~gone])
    assert torch.equal(table(holes, "train")[0], table(whole, "train")[0])
    assert not torch.equal(gone, table(other, "train")[1].isnan())
    for split in ("val", "test"):
        assert torch.equal(table(holes, split)[1], table(whole, split)[1])
        assert not table(holes, split)[1].isnan().any()
    # the same holes however much is missing: more are added
    assert not (gone & ~table(small(train_samples=1000, missing=0.6), "train")[1].isnan()).any()


def test_an_expert_that_hardly_opens_is_drawn_again():
    """With one input and one unit some experts are constant; divided by their deviation they would be NaN."""
    truth = small(dim=1, hidden=1, experts=40, groups=1, tasks=1).truth
    x = torch.randn(50_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    assert ((truth(x).var(0) - 1).abs() < 0.2).all()  # those that open seldom are estimated roughly
    asleep = 0
    for number in range(40):
        generator = source._generator(0, source._EXPERTS, number)
        inner, bias, outer = (torch.randn(1, dtype=torch.float64, generator=generator) for _ in range(3))
        std = float(((inner * x[:, 0] + bias).relu() * outer).std())
        if abs(std - 0.05) > 0.01:  # else the other points decide
            asleep += std < 0.05
            assert (inner == truth.inner[number]).all() == (std > 0.05)
    assert asleep > 0


def test_there_may_be_no_validation_set():
    data = small(val_samples=0)
    data.setup()
    assert data.val_dataloader() == []


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"tasks": 0}, r"SyntheticTasks\(tasks=0\): it must be at least 1"),
        ({"tasks": 130}, r"tasks=130\): it must be a multiple of groups=16"),
        ({"groups": 0}, r"groups=0\): it must be at least 1"),
        ({"experts": 1}, r"experts=1\): it must be at least 2"),
        ({"experts": 4, "groups": 8}, r"groups=8\): 4 experts make 6 different pairs.*more experts or fewer groups"),
        ({"dim": 0}, r"dim=0\)"),
        ({"hidden": 0}, r"hidden=0\)"),
        ({"noise": -0.1}, r"noise=-0.1\): a standard deviation"),
        ({"noise": float("nan")}, r"noise=nan\)"),
        ({"missing": 1.0}, r"missing=1.0\): a share of the labels, in \[0, 1\)"),
        ({"missing": -0.1}, r"missing=-0.1\)"),
        ({"train_samples": 0}, r"train_samples=0\): it must be at least 1"),
        ({"val_samples": -1}, r"val_samples=-1\): it must be at least 0"),
        ({"test_samples": 0}, r"test_samples=0\): it must be at least 1"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"num_workers": -1}, r"num_workers=-1"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text):
        SyntheticTasks(**kwargs)


@pytest.mark.filterwarnings("ignore:.*instantiate_classes")
def test_it_can_be_written_in_yaml():
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    yaml = {"class_path": "gateplug.data.SyntheticTasks", "init_args": {"tasks": 8, "groups": 2, "missing": 0.5, **SMALL}}
    data = parser.instantiate_classes(parser.parse_object({"data": yaml})).data
    assert table(data, "train")[1].shape == (72, 8)


class Heads(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 128))

    def training_step(self, batch, batch_idx):
        y = batch["labels"]["y"]
        return ((self.net(batch["x"]) - y.nan_to_num()) ** 2)[~y.isnan()].mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_within_an_epoch_is_resumed_exactly(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(exact, "Net", Heads)

    def data():
        return small(batch_size=16, missing=0.2, num_workers=workers)

    unbroken = exact.run(tmp_path / "whole", data())
    assert exact.run(tmp_path, data(), kill=7) is None
    assert exact.same(unbroken, exact.run(tmp_path, data(), resume=tmp_path / "last.ckpt"))

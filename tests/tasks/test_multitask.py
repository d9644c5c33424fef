"""Several tasks on one network: the loss and its masks, empty tasks, metrics of an epoch, and all the ways to run it."""

import copy
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.metrics import roc_auc_score
from torch import nn
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import BinaryF1Score

import gateplug as gp
from gateplug.tasks import MultiTask, TaskHead, TaskTowers
from tests.ddp import two_processes
from tests.tasks.nets import loader, trainer

NAN = math.nan


class Given(nn.Module):
    """Parts that are given as inputs."""

    def forward(self, **parts):
        return parts


def heads(**more):
    """One head of each kind; the number of outputs is that of the parts below."""
    return {
        "class": TaskHead("classification", outputs=3, weight=2.0, **more),
        "click": TaskHead("binary", weight=0.5, **more),
        "rating": TaskHead("regression", weight=0.1, **more),
    }


def samples(n, seed=0, dtype=torch.float32, missing=0.4):
    """Parts as inputs, and labels of which every sample has at least one."""
    g = torch.Generator().manual_seed(seed)
    gap = torch.rand(n, 3, generator=g) < missing
    gap[torch.arange(n), torch.arange(n) % 3] = False
    labels = {
        "class": torch.randint(0, 3, (n,), generator=g).masked_fill(gap[:, 0], -100),
        "click": torch.randint(0, 2, (n,), generator=g).float().masked_fill(gap[:, 1], NAN),
        "rating": torch.randn(n, generator=g).masked_fill(gap[:, 2], NAN),
    }
    parts = {name: torch.randn(n, size, generator=g, dtype=dtype) for name, size in (("class", 3), ("click", 1), ("rating", 1))}
    return {**parts, "labels": labels}


def pick(thing, index):
    """A sample, or some, of a batch."""
    return {k: pick(v, index) for k, v in thing.items()} if isinstance(thing, dict) else thing[index]


def rows(batch):
    """Samples of a batch, one by one."""
    return [pick(batch, i) for i in range(len(batch["rating"]))]


def literal(batch):
    """Loss and accuracy of each task, written out in Python for one sample after the other."""
    losses, hits = {name: [] for name in batch["labels"]}, {"class": [], "click": []}
    for row in rows(batch):
        label = {name: float(value) for name, value in row["labels"].items()}
        if label["class"] not in (-100, NAN) and not math.isnan(label["class"]):
            z = [float(v) for v in row["class"]]
            losses["class"].append(math.log(sum(math.exp(v) for v in z)) - z[int(label["class"])])
            hits["class"].append(max(range(3), key=lambda c: z[c]) == label["class"])
        if label["click"] != -100 and not math.isnan(label["click"]):
            p = 1 / (1 + math.exp(-float(row["click"])))
            losses["click"].append(-math.log(p if label["click"] == 1 else 1 - p))
            hits["click"].append((p > 0.5) == (label["click"] == 1))
        if not math.isnan(label["rating"]):
            losses["rating"].append((float(row["rating"]) - label["rating"]) ** 2)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {k: mean(v) for k, v in losses.items()}, {k: mean(v) for k, v in hits.items()}


# ---------------------------------------------------------------------- the loss


def test_loss_is_the_weighted_sum_of_means_over_labels():
    batch = samples(23, dtype=torch.float64)
    losses, _ = literal(batch)
    expected = 2 * losses["class"] + 0.5 * losses["click"] + 0.1 * losses["rating"]
    assert float(MultiTask(Given(), heads()).training_step(batch, 0)) == pytest.approx(expected, rel=1e-12)
    single = {**{k: v.float() for k, v in batch.items() if k != "labels"}, "labels": batch["labels"]}
    loss = MultiTask(Given(), heads()).training_step(single, 0)
    assert (loss.dtype, float(loss)) == (torch.float32, pytest.approx(expected, rel=1e-6))
    half = {**{k: v.bfloat16() for k, v in batch.items() if k != "labels"}, "labels": batch["labels"]}
    loss = MultiTask(Given(), heads()).training_step(half, 0)
    assert (loss.dtype, float(loss)) == (torch.float32, pytest.approx(expected, rel=2e-2))  # 8 bits of the parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32, torch.int8])
def test_nan_and_ignore_index_and_any_number_type_mean_the_same(dtype):
    batch = samples(23)
    expected = float(MultiTask(Given(), heads()).training_step(batch, 0))
    other = copy.deepcopy(batch)
    if dtype.is_floating_point:
        other["labels"]["class"] = other["labels"]["class"].to(dtype).masked_fill(batch["labels"]["class"] == -100, NAN)
        other["labels"]["click"] = other["labels"]["click"].to(dtype)
    else:
        other["labels"]["class"] = other["labels"]["class"].to(dtype)
        other["labels"]["click"] = other["labels"]["click"].nan_to_num(-100).to(dtype)
    assert float(MultiTask(Given(), heads()).training_step(other, 0)) == pytest.approx(expected, rel=1e-7)


def test_an_ignore_index_of_ones_own():
    x, y = torch.randn(4, 3), torch.tensor([255, 1, 2, 255])
    task = MultiTask(Given(), {"a": TaskHead("classification", outputs=3, ignore_index=255)})
    loss = task.training_step({"a": x, "labels": {"a": y.to(torch.uint8)}}, 0)
    assert float(loss) == pytest.approx(float(F.cross_entropy(x[1:3], y[1:3])))


def test_a_class_of_bytes_is_not_taken_for_the_ignore_index():
    x, y = torch.randn(2, 200), torch.tensor([156, 3], dtype=torch.uint8)  # as a byte, −100 is 156
    loss = MultiTask(Given(), {"a": TaskHead("classification", outputs=200)}).training_step({"a": x, "labels": {"a": y}}, 0)
    assert float(loss) == pytest.approx(float(F.cross_entropy(x, y.long())))


def test_a_sample_without_a_label_reaches_neither_loss_nor_gradient():
    batch = samples(12)
    gone = {"class": batch["labels"]["class"] == -100, "click": batch["labels"]["click"].isnan()}
    gone["rating"] = batch["labels"]["rating"].isnan()
    for name, mask in gone.items():
        assert mask.any()
        batch[name][mask] = torch.tensor([math.inf, NAN]).repeat(12)[: int(mask.sum())].unsqueeze(-1)
        batch[name].requires_grad_()
    loss = MultiTask(Given(), heads()).training_step(batch, 0)
    loss.backward()
    assert loss.isfinite()
    for name, mask in gone.items():
        assert torch.equal(batch[name].grad.abs().sum(-1) == 0, mask)
        assert batch[name].grad.isfinite().all()


def test_several_numbers_for_a_sample_and_one_nan_leaves_it_out():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    y[2, 1] = NAN
    task = MultiTask(Given(), {"a": TaskHead("regression", outputs=3)})
    kept = [0, 1, 3]
    expected = float(F.mse_loss(x[kept], y[kept]))
    assert float(task.training_step({"a": x, "labels": {"a": y}}, 0)) == pytest.approx(expected)
    assert float(task.heads["a"].train_metrics["mse"].compute()) == pytest.approx(expected)


def test_weight_zero_is_watched_and_not_trained():
    towers = {name: nn.Linear(2, 1) for name in "ab"}
    tasks = {name: TaskHead("regression", weight=float(name == "a"), tower=tower) for name, tower in towers.items()}
    x, y = torch.randn(4, 2), torch.randn(4)
    x_b = torch.full((4, 2), 1e30)  # its squared error is infinite, and 0 · inf is NaN
    task = MultiTask(Given(), tasks)
    loss = task.training_step({"a": x, "b": x_b, "labels": {"a": y, "b": y}}, 0)
    assert float(loss.detach()) == pytest.approx(float(F.mse_loss(towers["a"](x)[:, 0], y).detach()))
    loss.backward()
    assert float(towers["b"].weight.grad.abs().sum()) == 0 < float(towers["a"].weight.grad.abs().sum())


# ---------------------------------------------------------------------- empty tasks


def two_towers(**more):
    torch.manual_seed(3)
    tasks = {name: TaskHead("regression", tower=nn.Linear(3, 1), **more) for name in ("left", "right")}
    return MultiTask(nn.Linear(4, 3), tasks, optimizer=lambda p: torch.optim.SGD(p, 0.1))


@pytest.mark.parametrize("form", ["no name", "all NaN"])
def test_an_empty_task_adds_nothing_and_its_gradient_is_zero(form):
    task, x, y = two_towers(), torch.randn(5, 4), torch.randn(5)
    labels = {"left": y} if form == "no name" else {"left": y, "right": torch.full((5,), NAN)}
    loss = task.training_step((x, labels), 0)
    left = task.heads["left"]
    assert float(loss.detach()) == pytest.approx(float(F.mse_loss(left.tower(task.net(x))[:, 0], y).detach()))
    loss.backward()
    # not None: where another process has labels, it waits for this gradient
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in task.heads["right"].parameters())
    assert all(float(p.grad.abs().sum()) > 0 for p in (*left.parameters(), *task.net.parameters()))


def test_an_empty_task_whose_predictions_are_not_finite_adds_nothing():
    batch = samples(6, missing=0.0)
    del batch["labels"]["rating"]
    expected = float(MultiTask(Given(), heads()).training_step(batch, 0))
    batch["rating"] = torch.tensor([math.inf, -math.inf, NAN]).repeat(2).unsqueeze(-1).requires_grad_()
    loss = MultiTask(Given(), heads()).training_step(batch, 0)
    loss.backward()
    assert float(loss.detach()) == expected
    assert torch.equal(batch["rating"].grad, torch.zeros(6, 1))


def empty_from(first, n=6):
    """Batches of two samples; from number `first` on they have no label."""
    y = torch.arange(2.0 * n)
    y[2 * first :] = NAN
    return loader([(torch.randn(4), {"left": v, "right": v}) for v in y], 2)


@pytest.mark.parametrize("reading_is_free", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_a_batch_without_any_label_is_an_error_with_its_index(stage, reading_is_free, tmp_path, monkeypatch):
    task, run = two_towers(), trainer(tmp_path, num_sanity_val_steps=0)
    if not reading_is_free:
        monkeypatch.setattr(task, "may_look", lambda stage, like: False)
    good, bad = empty_from(6), empty_from(3)
    runs = {
        "train": lambda: run.fit(task, bad),
        "val": lambda: run.fit(task, good, bad),
        "test": lambda: run.test(task, bad, verbose=False),
    }
    with pytest.raises(ValueError, match=f"Batch 3 of {stage} has no label of any task"):
        runs[stage]()
    if stage == "train":  # on a GPU it is said at the end of the epoch, after all batches
        assert run.global_step == (3 if reading_is_free else 6)
    run.fit(task, good)  # nothing is left of it


def test_no_value_is_read_back_after_the_first_batch():
    """Tensors without values cannot be read: whatever would make a GPU wait fails on them."""
    task = MultiTask(Given(), {**heads(), "many": TaskHead("binary", count=4)})
    for stage in ("train", "val"):
        task.may_look(stage, torch.empty(0))
    batch = {**samples(6), "many": torch.randn(6, 4, 1)}
    batch["labels"]["many"] = torch.ones(6, 4)
    move = lambda thing: {k: move(v) for k, v in thing.items()} if isinstance(thing, dict) else thing.to("meta")  # noqa: E731
    task.to("meta")
    task.training_step(move(batch), 0)
    task.validation_step(move(batch), 0)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        task.test_step(move(batch), 0)  # the first one of its stage


# ---------------------------------------------------------------------- many tasks in one head


@pytest.mark.parametrize("kind", ["classification", "binary", "regression"])
def test_a_head_with_count_is_a_loop_of_single_heads(kind):
    torch.manual_seed(1)
    count, outputs = 5, 3 if kind == "classification" else 1
    towers = TaskTowers(count, [4, 3, outputs]).double()
    x = torch.randn(9, count, 4, dtype=torch.float64)
    y = torch.randn(9, count) if kind == "regression" else torch.randint(0, outputs if outputs > 1 else 2, (9, count)).float()
    y[torch.rand(9, count) < 0.4] = NAN
    y[:, 2] = NAN  # a task without labels: it counts as 0 in the mean over all five

    many = MultiTask(nn.Identity(), {"y": TaskHead(kind, outputs, weight=0.7, count=count, tower=towers)})
    loss = many.training_step((x, {"y": y}), 0)
    gradients = torch.autograd.grad(loss, list(towers.parameters()))

    singles = {}
    for t in range(count):
        tower = TaskTowers(1, [4, 3, outputs]).double()
        tower.load_state_dict({name: value[t : t + 1] for name, value in towers.state_dict().items()})
        singles[f"y{t}"] = TaskHead(kind, outputs, weight=0.7 / count, tower=tower)
    one_by_one = MultiTask(nn.Identity(), singles)
    expected = one_by_one.training_step((x, {f"y{t}": y[:, t] for t in range(count)}), 0)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    expected.backward()
    for number, gradient in enumerate(gradients):
        parts = [list(head.tower.parameters())[number].grad for head in one_by_one.heads.values()]
        assert torch.allclose(gradient, torch.cat(parts), rtol=0, atol=1e-12)  # float64, another order of sums
    assert float(gradients[0].abs().sum()) > 0


def test_the_test_loss_of_every_task_in_a_head_is_kept(tmp_path):
    torch.manual_seed(2)
    x, y = torch.randn(40, 6, 1), torch.randn(40, 6)
    y[torch.rand(40, 6) < 0.3] = NAN
    y[:, 0] = 1.0
    y[:, 4] = NAN
    task = MultiTask(nn.Identity(), {"y": TaskHead("regression", count=6)})
    data = loader([(a, {"y": b}) for a, b in zip(x, y, strict=True)], 7)
    result = trainer(tmp_path).test(task, data, verbose=False)[0]
    squares = (x[..., 0] - y).double().square()
    assert torch.allclose(task.task_losses["test"]["y"].double(), squares.nanmean(0), rtol=1e-5, equal_nan=True)
    assert set(result) == {"test/loss", "test/y/loss", "test/y/mse"}
    assert result["test/y/loss"] == pytest.approx(float(squares.nanmean(0).nan_to_num().mean()), rel=1e-5)
    assert result["test/y/mse"] == pytest.approx(float(squares.nanmean()), rel=1e-5)
    assert [p["y"].shape for p in trainer(tmp_path).predict(task, data)][-1] == (5, 6)


# ---------------------------------------------------------------------- what an epoch reports


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_an_epochs_losses_and_metrics_do_not_depend_on_the_batches(size, tmp_path):
    batch = samples(50, seed=5)
    losses, hits = literal(batch)
    known = ~batch["labels"]["click"].isnan()
    expected = {
        "test/loss": 2 * losses["class"] + 0.5 * losses["click"] + 0.1 * losses["rating"],
        **{f"test/{name}/loss": value for name, value in losses.items()},
        **{f"test/{name}/accuracy": value for name, value in hits.items()},
        "test/click/auroc": roc_auc_score(batch["labels"]["click"][known], batch["click"][known, 0]),
        "test/rating/mse": losses["rating"],
    }
    data, task = loader(rows(batch), size), MultiTask(Given(), heads())
    assert trainer(tmp_path).test(task, data, verbose=False)[0] == pytest.approx(expected, rel=2e-6)  # float32 sums
    assert trainer(tmp_path).test(task, data, verbose=False)[0] == pytest.approx(expected, rel=2e-6)  # counted anew


class Scaled(nn.Module):
    """Parts that are given as inputs, times a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, **parts):
        return {name: self.scale * part for name, part in parts.items()}


def test_names_that_are_logged_and_their_values(tmp_path):
    batch = samples(12)
    task = MultiTask(Scaled(), heads(), optimizer=lambda p: torch.optim.SGD(p, 0.0))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(task, loader(rows(batch), 4), loader(rows(batch), 4))
    shared = {"loss", "class/loss", "class/accuracy", "click/loss", "click/accuracy", "rating/loss", "rating/mse"}
    assert set(run.callback_metrics) == {f"{stage}/{name}" for stage in ("train", "val") for name in shared} | {"val/click/auroc"}
    # nothing learns here: the last epoch of two is the whole set, once
    losses, hits = literal(batch)
    for stage in ("train", "val"):
        for name, value in hits.items():
            assert float(run.callback_metrics[f"{stage}/{name}/accuracy"]) == pytest.approx(value)
        assert float(run.callback_metrics[f"{stage}/rating/mse"]) == pytest.approx(losses["rating"], rel=1e-6)
    assert float(run.callback_metrics["val/rating/loss"]) == pytest.approx(losses["rating"], rel=1e-6)
    last, _ = literal(pick(batch, slice(8, None)))
    assert float(run.callback_metrics["train/class/loss"]) == pytest.approx(last["class"], rel=1e-6)


def test_a_task_without_labels_in_an_epoch_reports_nan_and_the_sum_is_of_the_others(tmp_path):
    batch = samples(12, missing=0.0)
    del batch["labels"]["click"]
    task = MultiTask(Given(), heads())
    result = trainer(tmp_path).test(task, loader(rows(batch), 4), verbose=False)[0]
    assert {name for name, value in result.items() if math.isnan(value)} == {
        f"test/click/{m}" for m in ("loss", "accuracy", "auroc")
    }
    assert result["test/loss"] == pytest.approx(2 * result["test/class/loss"] + 0.1 * result["test/rating/loss"], rel=1e-6)
    assert task.task_losses["test"]["click"].isnan().all()


def test_metrics_and_loss_of_ones_own(tmp_path):
    seen = []

    def absolute(predictions, labels):
        seen.append((predictions, labels))
        return (predictions - labels).abs()

    metric = MeanAbsoluteError()
    tasks = {
        "rating": TaskHead("regression", loss=absolute, metrics={"mae": metric}),
        "click": TaskHead("binary", loss=nn.SoftMarginLoss(reduction="none"), metrics={"f1": BinaryF1Score(validate_args=True)}),
    }
    batch = samples(30, seed=2)
    del batch["class"], batch["labels"]["class"]
    keep = ~(batch["labels"]["rating"].isnan() & batch["labels"]["click"].isnan())
    batch = pick(batch, keep)
    task = MultiTask(Given(), tasks)
    result = trainer(tmp_path).test(task, loader(rows(batch), 4), verbose=False)[0]
    assert set(result) == {"test/loss", "test/rating/loss", "test/rating/mae", "test/click/loss", "test/click/f1"}
    y, x = batch["labels"]["rating"], batch["rating"][:, 0]
    mean = float((x - y).abs().nanmean())
    assert (result["test/rating/loss"], result["test/rating/mae"]) == (
        pytest.approx(mean, rel=1e-6),
        pytest.approx(mean, rel=1e-6),
    )
    known = ~batch["labels"]["click"].isnan()
    f1 = BinaryF1Score()(batch["click"][known, 0].sigmoid(), batch["labels"]["click"][known].long())
    assert result["test/click/f1"] == pytest.approx(float(f1), rel=1e-6)
    assert all(y.isfinite().all() for _, y in seen)  # a loss never sees NaN
    own = [tasks["rating"].metrics(stage)["mae"] for stage in ("train", "val", "test")]
    assert len({id(m) for m in (metric, *own)}) == 4  # each stage has a copy


# ---------------------------------------------------------------------- what a network may return


def test_every_form_of_output_gives_the_same():
    x, names = torch.randn(5, 4, 3), ("a", "b", "c")
    tasks = lambda: {"a": TaskHead("regression", 3), "b": TaskHead("regression", 3, count=2), "c": TaskHead("classification", 3)}  # noqa: E731
    labels = {"a": torch.randn(5, 3), "b": torch.randn(5, 2, 3), "c": torch.tensor([0, 1, 2, 0, 1])}
    parts = [x[:, 0], x[:, 1:3], x[:, 3]]

    class Output:
        logits = x

    forms = [x, parts, tuple(parts), dict(zip(names, parts, strict=True)), {"logits": x, "hidden": x}, Output()]
    losses = []
    for form in forms:

        class Net(nn.Module):
            def forward(self, x, form=form):
                return form

        losses.append(float(MultiTask(Net(), tasks()).training_step((x, labels), 0)))
    assert len(set(losses)) == 1


def test_shared_features_go_to_every_tower():
    tasks = {
        "a": TaskHead("regression", tower=nn.Linear(3, 1)),
        "b": TaskHead("regression", count=2, tower=TaskTowers(2, [3, 1])),
    }
    task, x = MultiTask(nn.Identity(), tasks), torch.randn(5, 3)
    out = task(x)
    assert torch.equal(out["a"], tasks["a"].tower(x)[:, 0])
    assert torch.equal(out["b"], tasks["b"].tower(torch.stack([x, x], 1))[..., 0])


@pytest.mark.parametrize(
    ("output", "error", "said"),
    [
        (torch.zeros(5, 3, 1), ValueError, r"shape \(5, 3, 1\) for 4 tasks \(a, b: 2, c\)"),
        (torch.zeros(5, 4, 2, 2), ValueError, r"shape \(5, 4, 2, 2\) for 4 tasks"),
        (torch.zeros(5), ValueError, r"shape \(5,\) for 4 tasks"),
        ([torch.zeros(5, 1)] * 4, ValueError, r"returned 4 parts for 3 tasks \(a, b: 2, c\)"),
        ({"a": torch.zeros(5, 1), "c": torch.zeros(5, 1)}, ValueError, r"dict with \['a', 'c'\], without the tasks \['b'\]"),
        ([torch.zeros(5, 1), torch.zeros(5, 3, 1), torch.zeros(5, 1)], ValueError, r"\(5, 3, 1\) for 'b'; its 2 tasks"),
        ([torch.zeros(5, 1), 3.0, torch.zeros(5, 1)], TypeError, "a float for the task 'b'"),
        ("text", TypeError, "returned a str"),
        (torch.zeros(5, 4, 2), ValueError, r"Task 'a': the network gives a tensor of shape \(5, 2\).*must be \(batch, 1\)"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(output, error, said):
    class Net(nn.Module):
        def forward(self, x):
            return output

    task = MultiTask(Net(), {"a": TaskHead("regression"), "b": TaskHead("regression", count=2), "c": TaskHead("regression")})
    with pytest.raises(error, match=said):
        task(torch.zeros(5, 3))


def test_predictions_are_probabilities_and_numbers():
    batch = samples(4)
    out = MultiTask(Given(), heads()).predict_step(batch)
    assert torch.equal(out["class"], batch["class"].softmax(-1))
    assert torch.equal(out["click"], batch["click"][:, 0].sigmoid())
    assert torch.equal(out["rating"], batch["rating"][:, 0])


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"kind": "ranking"}, ValueError, "kind='ranking'.*classification, binary, regression"),
        ({"kind": "classification"}, ValueError, r"outputs=1\): a classification needs its number of classes"),
        ({"kind": "binary", "outputs": 2}, ValueError, "a binary task has 1; several questions at once are count=2"),
        ({"outputs": 0}, ValueError, "both must be at least 1"),
        ({"count": 0}, ValueError, "both must be at least 1"),
        ({"weight": -0.1}, ValueError, r"weight=-0.1\): a finite number, 0 or more"),
        ({"weight": NAN}, ValueError, "weight=nan"),
        ({"weight": math.inf}, ValueError, "weight=inf"),
        ({"kind": "binary", "ignore_index": 0}, ValueError, "0 and 1 are the labels of a binary task"),
        ({"loss": 3}, TypeError, "loss=3"),
        ({"metrics": {"mae": torch.nn.L1Loss()}}, TypeError, "L1Loss and no torchmetrics.Metric"),
        ({"metrics": {"loss": MeanAbsoluteError()}}, ValueError, "choose another"),
        ({"metrics": {"a.b": MeanAbsoluteError()}}, ValueError, "'a.b' cannot be the name of a metric"),
    ],
)
def test_wrong_arguments_of_a_head_are_refused(kwargs, error, said):
    with pytest.raises(error, match=said):
        TaskHead(**{"kind": "regression", **kwargs})


def test_wrong_tasks_are_refused():
    head = TaskHead("regression")
    for tasks, error, said in (
        ({}, ValueError, "give a dict with a gp.TaskHead"),
        ([head], ValueError, "give a dict with a gp.TaskHead"),
        ({"a/b": head}, ValueError, "'a/b' cannot be the name of a task"),
        ({"": head}, ValueError, "'' cannot be the name"),
        ({"values": head}, ValueError, "'values' cannot be the name"),
        ({"a": nn.Linear(1, 1)}, TypeError, "it is a Linear, and must be a gp.TaskHead"),
        ({"a": head, "b": head}, ValueError, "one head cannot be that of two tasks"),
    ):
        with pytest.raises(error, match=said):
            MultiTask(nn.Identity(), tasks)
    with pytest.raises(TypeError, match="SGD.* is an object that was built already"):
        MultiTask(nn.Identity(), {"a": head}, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))


def test_a_head_may_be_given_by_its_arguments():
    task = MultiTask(nn.Identity(), {"a": {"kind": "classification", "outputs": 3}})
    assert (task.heads["a"].kind, task.heads["a"].outputs) == ("classification", 3)


@pytest.mark.parametrize(
    ("labels", "error", "said"),
    [
        (None, TypeError, r"labels are missing; they must be a dict of tensors by task \(class, click, rating\)"),
        (torch.zeros(2), TypeError, "labels are a Tensor; they must be a dict"),
        ({"klass": torch.zeros(2)}, ValueError, r"labels of \['klass'\], which are no tasks. Did you mean 'class'"),
        ({}, ValueError, "Batch 5 of train has no label of any task"),
        ({"class": [0, 1]}, TypeError, "Task 'class': its labels are a list"),
        ({"class": torch.zeros(2, dtype=torch.complex64)}, TypeError, "Task 'class': its labels have dtype torch.complex64"),
        ({"class": torch.tensor([0, 3])}, ValueError, "Task 'class': Labels go from 0 to 3, but must lie in 0 … 2"),
        ({"class": torch.tensor([0, -1])}, ValueError, "Task 'class': Labels go from -1 to 0"),
        ({"class": torch.tensor([0, 1.5])}, ValueError, "Task 'class': a label is 1.5; classes are whole"),
        ({"class": torch.tensor([[0], [1]])}, ValueError, r"Task 'class': labels have shape \(2, 1\) and must have \(2,\)"),
        ({"class": torch.tensor([0])}, ValueError, r"labels have shape \(1,\) and must have \(2,\)"),
        ({"click": torch.tensor([0.0, 0.5])}, ValueError, "Task 'click': a label is 0.5; labels must be 0 or 1, or -100 or NaN"),
        ({"rating": torch.tensor([0.0, math.inf])}, ValueError, "Task 'rating': a label is inf; labels must be finite"),
    ],
)
def test_wrong_labels_are_refused(labels, error, said):
    batch = {k: v for k, v in samples(2).items() if k != "labels"}
    with pytest.raises(error, match=said):
        MultiTask(Given(), heads()).training_step({**batch, "labels": labels} if labels is not None else batch, 5)


@pytest.mark.parametrize("returned", [torch.zeros(()), 3.0, torch.zeros(2, 1)])
def test_a_loss_that_is_not_one_for_each_sample_is_refused(returned):
    task = MultiTask(Given(), {"a": TaskHead("regression", loss=lambda x, y: returned)})
    with pytest.raises(ValueError, match=r"its loss returned .* for labels of shape \(2,\).*reduction='none'"):
        task.training_step({"a": torch.zeros(2, 1), "labels": {"a": torch.zeros(2)}}, 0)


# ---------------------------------------------------------------------- ways to run it


def half_labelled():
    """Batches of 4: of every second one, the right task has no label."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 4, generator=g), torch.randn(16, 2, generator=g)
    y[(torch.arange(16) // 4) % 2 == 1, 1] = NAN
    return [(a, {"left": b[0], "right": b[1]}) for a, b in zip(x, y, strict=True)]


def train(folder, devices=1, **options):
    """Two epochs of batches of 4: one for each of two processes, or two that are accumulated."""
    L.seed_everything(1, verbose=False)
    task = two_towers()
    kind = {"strategy": "ddp", "devices": 2} if devices == 2 else {"accumulate_grad_batches": 2}
    run = trainer(folder, **{"max_epochs": 2, "use_distributed_sampler": False, **kind, **options})
    data, rank = half_labelled(), run.global_rank
    mine = [s for i, s in enumerate(data) if devices == 1 or (i // 4) % 2 == rank]
    run.fit(task, loader(mine, 4))
    result = run.test(task, loader(data[rank * 4 :: 2] if devices == 2 else data[::2] + data[4::2], 4), verbose=False)[0]
    return task, result


def train_ddp(folder: Path, devices: int) -> None:
    """What each of two processes runs: on the second one, the right task never has a label in training."""
    task, result = train(folder, devices)
    if task.global_rank == 0:
        torch.save({"weights": task.state_dict(), "result": result, "tasks": task.task_losses["test"]}, folder / "two.pt")


def test_two_processes_are_one_that_accumulates(tmp_path):
    task, result = train(tmp_path)
    two_processes(train_ddp, tmp_path)
    two = torch.load(tmp_path / "two.pt")
    start = two_towers().state_dict()
    for name, weight in task.state_dict().items():
        # the same sums in another order
        assert torch.allclose(two["weights"][name], weight, rtol=0, atol=1e-6)
        assert not torch.allclose(start[name], weight, rtol=0, atol=1e-3)
    assert two["result"] == pytest.approx(result, rel=1e-5)
    assert all(torch.allclose(two["tasks"][name], value, rtol=1e-5) for name, value in task.task_losses["test"].items())


def test_accumulated_gradients_are_the_mean_of_the_batches(tmp_path):
    reference, data = two_towers(), half_labelled()
    x = torch.stack([a for a, _ in data])
    y = {name: torch.stack([b[name] for _, b in data]) for name in ("left", "right")}
    for first in (0, 8):
        for rows_ in (slice(first, first + 4), slice(first + 4, first + 8)):
            losses = [
                (head.tower(reference.net(x[rows_]))[:, 0] - y[name][rows_]).square() for name, head in reference.heads.items()
            ]
            sum(loss.mean() for loss in losses if loss.isfinite().all()).div(2).backward()
        with torch.no_grad():
            for p in reference.parameters():
                p.sub_(0.1 * p.grad)
                p.grad = None
    task, _ = train(tmp_path, max_epochs=1)
    for ours, theirs in zip(task.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def dropping():
    torch.manual_seed(3)
    tasks = {name: TaskHead("regression", tower=nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 1))) for name in ("left", "right")}
    return MultiTask(nn.Linear(4, 3), tasks, optimizer=lambda p: torch.optim.AdamW(p, 0.05))


def test_a_resumed_run_is_bit_for_bit_one_that_was_not_stopped(tmp_path):
    def fit(ckpt=None):
        task = dropping()
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)  # 6: in the middle of the second epoch
        run = trainer(tmp_path, max_epochs=3, callbacks=[gp.ExactResume(0), saver], enable_checkpointing=True)
        run.fit(task, gp.exact_loader(half_labelled(), batch_size=4, seed=0), ckpt_path=ckpt, weights_only=True)
        return task, run

    whole, run = fit()
    torch.manual_seed(999)  # a new process has other random states
    resumed, again = fit(tmp_path / "step=6.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert not torch.equal(whole.net.weight, dropping().net.weight)
    assert run.global_step == again.global_step == 12


def test_runs_in_bf16_and_loss_stays_float32(tmp_path):
    task = two_towers()
    task.heads["left"].tower.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    dtypes, losses = [], []
    step = task.training_step
    task.training_step = lambda batch, batch_idx: losses.append(step(batch, batch_idx)) or losses[-1]
    run = trainer(tmp_path, precision="bf16-mixed")
    run.fit(task, loader(half_labelled(), 4), loader(half_labelled(), 4))
    assert set(dtypes) == {torch.bfloat16}
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert run.callback_metrics["val/loss"].isfinite()


def test_a_compiled_network_and_unknown_columns():
    class Net(nn.Module):
        def forward(self, x):
            return 2 * x

    task = MultiTask(torch.compile(Net(), backend="eager"), {"a": TaskHead("regression")})
    x, y = torch.randn(3, 1), torch.randn(3)
    loss = task.training_step({"x": x, "index": y, "labels": {"a": y}}, 0)
    assert float(loss) == pytest.approx(float(F.mse_loss(2 * x[:, 0], y)))


def test_folds_to_a_plain_network_that_exports_with_any_batch():
    task = two_towers()
    x = torch.randn(5, 4)
    plain = gp.fold(task)
    assert not isinstance(plain, L.LightningModule)
    expected = task.eval()(x)
    assert all(torch.equal(value, expected[name]) for name, value in plain(x).items())
    program = torch.export.export(plain, (x[:2],), dynamic_shapes={"args": ({0: torch.export.Dim.AUTO},)}).module()
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in program(x).items())


YAML = """\
model:
  class_path: MultiTask
  init_args:
    net: {class_path: tests.tasks.nets.Trunk, init_args: {width: 16}}
    tasks:
      digit: %s
      parity: %s
    optimizer: {class_path: AdamW, init_args: {lr: 1.0e-2}}
data: {class_path: tests.tasks.nets.DigitAndParity, init_args: {batch_size: 64}}
trainer: {max_epochs: 3, accelerator: cpu, enable_model_summary: false}
"""
DIGIT = (
    "{kind: classification, outputs: 10, tower: {class_path: torch.nn.Linear, init_args: {in_features: 16, out_features: 10}}}"
)
PARITY = (
    "{kind: binary, weight: 0.5, tower: {class_path: TaskTowers, init_args: {count: 1, widths: [16, 4, 1]}},"
    " loss: {class_path: torch.nn.BCEWithLogitsLoss, init_args: {reduction: none}},"
    " metrics: {f1: {class_path: torchmetrics.classification.BinaryF1Score}}}"
)
FORMS = {
    "class_path": tuple(f"{{class_path: TaskHead, init_args: {arguments}}}" for arguments in (DIGIT, PARITY)),
    "arguments alone": (DIGIT, PARITY),
}


@pytest.mark.parametrize("form", FORMS)
def test_from_yaml_to_a_checkpoint_that_opens_by_itself(form, tmp_path, monkeypatch):
    from gateplug.cli import main
    from tests.tasks.nets import Trunk

    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(YAML % FORMS[form])
    assert main(["fit", "-c", "two.yaml"]) == 0
    path = tmp_path / "runs/two/version_0/checkpoints/last.ckpt"
    task = gp.load(path, register=[Trunk, BinaryF1Score])
    assert (type(task), task.heads["parity"].weight) == (MultiTask, 0.5)
    data = gp.Digits(batch_size=64)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    found = task.predict_step({"pixel_values": batch["pixel_values"]})
    # it has learnt, so these are the trained weights: by chance 0.1 and 0.5
    assert float((found["digit"].argmax(-1) == batch["labels"]).float().mean()) > 0.6
    assert float(((found["parity"] > 0.5) == batch["labels"] % 2).float().mean()) > 0.75
    assert main(["predict", "-c", "two.yaml", f"--ckpt_path={path}"]) == 0
    stored = torch.load(tmp_path / "runs/two/version_1/predictions.pt", weights_only=True)
    assert {name: value.shape for name, value in stored[0].items()} == {"digit": (64, 10), "parity": (64,)}


def test_a_wrong_task_in_yaml_is_said_in_one_paragraph(tmp_path, monkeypatch, capsys):
    from gateplug.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(YAML % (DIGIT.replace("10}}}", "10}}, weight: -1}"), PARITY))
    assert main(["fit", "-c", "two.yaml"]) == 2
    assert "TaskHead(weight=-1.0): a finite number, 0 or more" in capsys.readouterr().err

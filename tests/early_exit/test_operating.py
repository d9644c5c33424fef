"""Operating points of a runner: fitted once on validation data, by cost, accuracy or measured time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.early_exit import functional as E
from gateplug.early_exit.fitting import costs_of
from gateplug.early_exit.latency import Times, dear_exits, exit_times, in_turns, taken
from tests.early_exit.nets import NETS, run
from tests.early_exit.test_runner import with_exits


def validation(name: str, batches: int = 4, rows: int = 6) -> list[Any]:
    torch.manual_seed(5)
    found = []
    for _ in range(batches):
        batch, labels = NETS[name][1](rows), torch.randint(0, 4, (rows,))
        found.append({**batch, "labels": labels} if isinstance(batch, dict) else (*batch, labels))
    return found


def everything(runner: gp.ExitRunner, batches: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, correctness and costs, with the functions of the room alone."""
    scores, correct = [], []
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else batch[:-1]
        labels = batch["labels"] if isinstance(batch, dict) else batch[-1]
        logits, gates = runner.everything(**inputs) if isinstance(batch, dict) else runner.everything(*inputs)
        rule = {"confidence": E.confidence_scores, "entropy": E.entropy_scores, "patience": E.patience_scores}
        scores.append(E.exit_scores(gates, runner.mode) if runner.gate == "jei" else rule[runner.gate](logits[:, :-1]))
        correct.append(logits.argmax(-1) == labels[:, None])
    return torch.cat(scores), torch.cat(correct), runner.costs


@pytest.mark.parametrize("gate", ["jei", "confidence", "entropy", "patience"])
@pytest.mark.parametrize("name", ["bert", "resnet", "sequential", "stacked"])
def test_the_threshold_is_that_of_the_formula(name: str, gate: str) -> None:
    net, batches = with_exits(name), validation(name)
    runner = gp.ExitRunner(net, gate, operating_point={"cost": 0.8}, validation=batches)
    scores, correct, cost = everything(runner, batches)
    assert runner.threshold == E.fit_threshold(scores, cost.double(), target_cost=0.8)
    spent = [run(runner, {k: v for k, v in b.items() if k != "labels"} if isinstance(b, dict) else b[:-1]).cost for b in batches]
    assert float(torch.cat(spent).mean()) <= 0.8 + 1e-6, "what is run costs what was promised"
    best = float(correct[:, -1].double().mean())  # by letting nobody leave, if not by less
    again = gp.ExitRunner(net, gate, operating_point={"accuracy": best}, validation=batches)
    assert again.threshold == E.fit_threshold(scores, cost.double(), correct=correct, target_accuracy=best)


def test_costs_that_no_training_has_counted_are_those_that_one_would_count() -> None:
    runner = gp.ExitRunner(with_exits("sequential"))
    batch = (torch.randn(3, 6),)
    gate = 9 * 4 + 6
    steps = [6 * 16 + 16 * 4 + gate, 16 * 4 + gate, 16 * 12 + 12 * 4 + gate, 12 * 4 + gate, 12 * 4]
    total = torch.tensor(steps, dtype=torch.float64).cumsum(0)
    assert torch.allclose(costs_of(runner, (batch, {}), 3), total / total[-1], atol=1e-6)


class Slow(nn.Module):
    """A block that takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(8, 8), seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds * len(x))
        return self.linear(x).tanh()


def slow() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(Slow(0.002), Slow(0.004), Slow(0.008), nn.Linear(8, 4))
    gp.EarlyExit().attach(net)
    return net.eval()


def test_times_are_those_of_what_is_run_and_follow_the_size() -> None:
    runner = gp.ExitRunner(slow())
    times = exit_times(runner, ((torch.randn(3, 8),), {}), 3, batch=2)
    assert times.median.shape == times.high.shape == (4,)
    assert times.head.shape == (3,)
    for seconds, least in zip(times.median.tolist(), (0.004, 0.012, 0.028, 0.028), strict=True):
        assert least <= seconds < 3 * least + 0.05
    assert float(times.head.max()) < 0.012, "the head alone, without the blocks"
    assert bool((times.high >= times.median).all())


def test_a_latency_is_met_by_the_most_accurate_threshold_that_can_be_afforded() -> None:
    net = slow()
    batches = [(torch.randn(8, 8), torch.randint(0, 4, (8,))) for _ in range(4)]
    runner = gp.ExitRunner(net, "confidence", operating_point={"latency": 0.012, "batch": 1}, validation=batches)
    begin = time.perf_counter()
    for batch in batches:
        for row in batch[0]:
            runner(row[None])
    mean = (time.perf_counter() - begin) / 32
    assert mean < 0.02, "twelve thousandths were asked for, the whole network takes fourteen and more"
    scores, _, _ = everything(runner, batches)
    exits = E.first_exit(scores, runner.threshold)
    assert 0 < float(exits.double().mean()) < 3, "some go on"
    with pytest.raises(ValueError, match="out of reach: the smallest mean cost"):
        gp.ExitRunner(net, operating_point={"latency": 1e-6}, validation=batches)


def test_an_exit_that_costs_more_than_it_saves_is_found() -> None:
    times = Times(1, torch.tensor([0.1, 0.2, 1.0]), torch.zeros(3), torch.tensor([0.05, 0.05]))
    left = torch.tensor([0.5, 0.01, 0.49])
    ((exit, head, saved),) = dear_exits(times, left)
    assert exit == 1
    assert head == pytest.approx(0.05)
    assert saved == pytest.approx(0.02 * 0.8), "one of the fifty that come leaves, and saves what is left"
    assert dear_exits(times, torch.tensor([1.0, 0.0, 0.0])) == [], "nobody comes to it"


def test_rows_are_repeated_to_any_size_and_only_what_is_of_the_rows() -> None:
    call = ((torch.arange(3), torch.zeros(1, 5)), {"mask": torch.arange(6).view(3, 2)})
    args, kwargs = taken(call, 3, 5, start=2)
    assert args[0].tolist() == [2, 0, 1, 2, 0]
    assert args[1].shape == (1, 5)
    assert kwargs["mask"].shape == (5, 2)
    assert in_turns([lambda: time.sleep(0.01), lambda: None]).median(0).values[0] >= 0.01


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"operating_point": {"cost": 0.5}}, ValueError, "needs validation="),
        ({"operating_point": {"cost": 0.5}, "validation": []}, ValueError, "no sample with a label"),
        ({"operating_point": {"cost": 2}}, ValueError, "in \\[0, 1\\]"),
        ({"operating_point": {"cost": 0.5, "batch": 2}}, ValueError, "must be"),
        ({"operating_point": {"latency": 0.1, "batch": 0}}, ValueError, "must be"),
        ({"operating_point": {"speed": 1}}, ValueError, "must be"),
        ({"operating_point": {"cost": 0.5}, "threshold": 0.2}, ValueError, "not both"),
        (
            {"operating_point": {"cost": 1e-4}, "validation": [(torch.randn(2, 6), torch.tensor([0, 1]))]},
            ValueError,
            "out of reach",
        ),
        (
            {"operating_point": {"accuracy": 0.9}, "validation": [(torch.randn(2, 6),)]},
            ValueError,
            "labels are missing|the class of",
        ),
        ({"gate": "confidense"}, ValueError, "Did you mean 'confidence'"),
        ({"mode": "cdff"}, ValueError, "Did you mean 'cdf'"),
        ({"threshold": "0.5"}, TypeError, "threshold"),
    ],
)
def test_bad_arguments_of_a_runner_are_told(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gp.ExitRunner(with_exits("sequential"), **arguments)

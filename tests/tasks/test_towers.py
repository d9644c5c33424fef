"""Batched towers are what a loop over ordinary networks is."""

import math

import pytest
import torch
from torch import nn

from gateplug.core.activations import ACTIVATIONS
from gateplug.tasks import TaskTowers


def loop(towers: TaskTowers, x: torch.Tensor) -> torch.Tensor:
    """The same from a stack of `nn.functional.linear` for each task."""
    results = []
    for task in range(towers.count):
        y = x[:, task]
        for layer, weight in enumerate(towers.weights):
            y = ACTIVATIONS[towers.activation](y) if layer else y
            bias = None if towers.biases is None else towers.biases[layer][task]
            y = nn.functional.linear(y, weight[task].T, bias)
        results.append(y)
    return torch.stack(results, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("widths", "activation"), [([3, 1], "relu"), ([3, 5, 2], "tanh"), ([1, 1], "relu"), ([1, 4, 2], "gelu"), ([4, 1, 3], "silu")]
)
def test_equal_to_a_loop_in_values_and_gradients(widths, activation, bias):
    torch.manual_seed(0)
    towers = TaskTowers(4, widths, activation, bias).double()
    x = torch.randn(6, 4, widths[0], dtype=torch.float64, requires_grad=True)
    assert towers(x).shape == (6, 4, widths[-1])
    # float64, and only the order of sums differs
    assert torch.allclose(towers(x), loop(towers, x), rtol=0, atol=1e-12)
    ways = [torch.autograd.grad(f.square().sum(), [x, *towers.parameters()]) for f in (towers(x), loop(towers, x))]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(*ways, strict=True))


def test_fresh_weights_are_those_of_linear_layers():
    torch.manual_seed(0)
    towers = TaskTowers(300, [9, 4, 2])
    for layer, size in enumerate((9, 4)):
        bound = 1 / math.sqrt(size)
        reference = nn.Linear(size, 4000)
        for ours, theirs in ((towers.weights[layer], reference.weight), (towers.biases[layer], reference.bias)):
            assert float(ours.detach().abs().max()) <= bound
            # at least 600 uniform numbers: the standard deviation is known to some 2 %, six of them allowed
            assert float(ours.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.12)
            assert float(theirs.detach().abs().max()) <= bound
    assert not torch.equal(towers.weights[0][0], towers.weights[0][1])


def test_a_scale_and_an_offset_for_each_task():
    towers = TaskTowers(128, [1, 1])
    assert sum(p.numel() for p in towers.parameters()) == 256
    x = torch.randn(3, 128, 1)
    assert torch.equal(towers(x), x * towers.weights[0].reshape(128, 1) + towers.biases[0])


@pytest.mark.parametrize(("width", "bias"), [(1, True), (3, True), (3, False)])
def test_identity_is_the_start_and_learns(width, bias):
    towers, x = TaskTowers(5, [width, width], bias=bias, identity=True), torch.randn(2, 5, width)
    assert torch.equal(towers(x), x)
    assert all(p.requires_grad for p in towers.parameters())


def test_one_task_takes_and_gives_what_a_linear_layer_does():
    towers, x = TaskTowers(1, [4, 3, 2]), torch.randn(5, 4)
    assert torch.equal(towers(x), towers(x[:, None])[:, 0])


def test_runs_under_autocast():
    towers = TaskTowers(2, [4, 3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert towers(torch.randn(5, 2, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"count": 0}, r"count=0\): there must be at least 1"),
        ({"widths": [3]}, r"widths=\[3\]\): give the size of the input"),
        ({"widths": [3, 0, 1]}, r"widths=\[3, 0, 1\]"),
        ({"activation": "swish"}, "activation='swish'.*allowed are sigmoid, linear, relu"),
        ({"widths": [3, 3, 3], "identity": True}, "only one layer as wide as its input"),
        ({"widths": [3, 2], "identity": True}, "only one layer as wide as its input"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        TaskTowers(**{"count": 2, "widths": [3, 1], **kwargs})


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3), (5, 2, 4, 1)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"takes \(batch, 2, 4\), got "):
        TaskTowers(2, [4, 1])(torch.zeros(shape))

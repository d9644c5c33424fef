"""Small networks of one shape side by side, each with weights of its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gateplug.core.activations import ACTIVATIONS
from gateplug.core.errors import whole_numbers


class TaskTowers(nn.Module):
    """A multilayer perceptron for each of several tasks: equal shapes, own weights, one batched product a layer.

    ``TaskTowers(count, [1, 1], identity=True)`` is a scale and an offset for each task, 1 and 0 at the start.

    Args:
        count: Number of tasks, at least 1.
        widths: Size of the input, of every hidden layer, and of the output: at least two numbers, each at least 1.
        activation: Name of the function between two layers: one of ``gateplug.core.activations.ACTIVATIONS``. There is none
            after the last layer.
        bias: Whether the layers have offsets.
        identity: Start as the identity: for a single layer as wide as its input. Towers of random sign would have tasks that
            share an expert pull it in opposite directions.

    Raises:
        ValueError: If an argument is out of its range, or the activation is unknown.

    Example:
        >>> TaskTowers(count=3, widths=[8, 4, 1])(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 1])
    """

    def __init__(
        self, count: int, widths: Sequence[int], activation: str = "relu", bias: bool = True, identity: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(widths, Sequence) or isinstance(widths, str):
            raise TypeError(f"TaskTowers(widths={widths!r}): a list of whole numbers, [8, 1] is one layer.")
        whole_numbers(count=count, **{f"widths[{i}]": width for i, width in enumerate(widths)})
        if count < 1:
            raise ValueError(f"TaskTowers(count={count}): there must be at least 1 task.")
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"TaskTowers(widths={list(widths)}): give the size of the input, then of each layer's output: [8, 1] is one"
                " layer, [8, 4, 1] are two; each at least 1."
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"TaskTowers(activation={activation!r}): allowed are {', '.join(ACTIVATIONS)}.")
        if identity and (len(widths) != 2 or widths[0] != widths[1]):
            raise ValueError(
                f"TaskTowers(widths={list(widths)}, identity=True): only one layer as wide as its input can be that."
            )
        self.count, self.widths, self.activation, self.bias = count, list(widths), activation, bias
        self.identity = identity
        shapes = list(zip(self.widths, self.widths[1:], strict=False))
        self.weights = nn.ParameterList(torch.empty(count, fan_in, fan_out) for fan_in, fan_out in shapes)
        self.biases = nn.ParameterList(torch.empty(count, fan_out) for _, fan_out in shapes) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and offsets as ``nn.Linear`` does, uniformly within ±1/√(a layer's input size), or be the identity."""
        if self.identity:
            with torch.no_grad():
                self.weights[0].zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)
            if self.biases is not None:
                nn.init.zeros_(self.biases[0])
            return
        for layer, fan_in in enumerate(self.widths[:-1]):
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(self.weights[layer], -bound, bound)
            if self.biases is not None:
                nn.init.uniform_(self.biases[layer], -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Run every task's tower.

        Args:
            x: ``(batch, count, widths[0])``; of a single task ``(batch, widths[0])`` too.

        Returns:
            ``(batch, count, widths[-1])``, without the second dimension where ``x`` has none.

        Raises:
            ValueError: If ``x`` has another shape.
        """
        if self.count == 1 and x.dim() == 2:
            single: Tensor = self(x[:, None])
            return single[:, 0]
        if x.dim() != 3 or x.shape[1:] != (self.count, self.widths[0]):
            raise ValueError(f"TaskTowers takes (batch, {self.count}, {self.widths[0]}), got {tuple(x.shape)}.")
        for layer, weight in enumerate(self.weights):
            if layer:
                x = ACTIVATIONS[self.activation](x)
            x = _product(x, weight, None if self.biases is None else self.biases[layer])
        return x

    def extra_repr(self) -> str:
        """The arguments."""
        return f"count={self.count}, widths={self.widths}, activation={self.activation!r}, bias={self.bias}"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer of every task: ``(batch, count, in)``, ``(count, in, out)`` and ``(count, out)`` to ``(batch, count, out)``."""
    if weight.shape[1] == 1:  # a product of 1×1 matrices for each task is many times slower than the same by elements
        y = x * weight[:, 0]
        return y if bias is None else y + bias
    rows = x.transpose(0, 1)
    y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
    return y.transpose(0, 1)

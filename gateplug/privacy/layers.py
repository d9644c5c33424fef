"""Activations for private training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gateplug.privacy.functional import tempered_sigmoid


class TemperedSigmoid(nn.Module):
    """Activation s · σ(T x) - o, bounded, so that per-sample gradients are clipped less (arXiv 2007.14191).

    Args:
        scale: s.
        temperature: T > 0.
        offset: o. The defaults (2, 2, 1) make tanh; (1, 1, 0) the logistic function.
        trainable: make s, T and o parameters (0-dim, one set per layer); otherwise the layer has no state.

    Raises:
        ValueError: temperature ≤ 0, or a value that is not finite.
    """

    scale: float | nn.Parameter
    temperature: float | nn.Parameter
    offset: float | nn.Parameter

    def __init__(self, scale: float = 2.0, temperature: float = 2.0, offset: float = 1.0, trainable: bool = False) -> None:
        super().__init__()
        values = {"scale": scale, "temperature": temperature, "offset": offset}
        for name, value in values.items():
            if not isinstance(value, int | float):
                raise TypeError(f"{name}={value!r} must be a number")
            if not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a finite number")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be > 0: with 0 the activation is constant")
        self.trainable = trainable
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(float(value))) if trainable else float(value))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise, any shape."""
        return tempered_sigmoid(x, self.scale, self.temperature, self.offset)

    def extra_repr(self) -> str:
        """The three numbers."""
        s, t, o = (float(torch.as_tensor(v).detach()) for v in (self.scale, self.temperature, self.offset))
        return f"scale={s:g}, temperature={t:g}, offset={o:g}" + (", trainable" if self.trainable else "")

"""Formulas of private training (Papernot et al., "Tempered Sigmoid Activations …", arXiv 2007.14191)."""

from __future__ import annotations

import torch
from torch import Tensor


def tempered_sigmoid(
    x: Tensor, scale: float | Tensor = 2.0, temperature: float | Tensor = 2.0, offset: float | Tensor = 1.0
) -> Tensor:
    """Bounded activation s · σ(T x) - o (arXiv 2007.14191, eq. 1).

    Args:
        x: any shape.
        scale: s, a number or a 0-dim tensor; the output spans an interval of this length.
        temperature: T > 0; slope.
        offset: o; the output lies in (-o, s - o).

    Returns:
        Of the shape of `x`. With (2, 2, 1) this is tanh, with (1, 1, 0) the logistic function.
    """
    return scale * torch.sigmoid(temperature * x) - offset

"""The gate of one exit: a linear reading of how unsure that exit is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from gateplug.core.errors import nearest
from gateplug.core.gate import Gate
from gateplug.early_exit.functional import FEATURES, uncertainty_features

_ALL = list(range(len(FEATURES)))


class ExitGate(Gate):
    """a = w · u(z) + b: the logit of leaving here, from four numbers of the exit's own logits (JEI-DNN, arXiv 2310.09163).

    Sends no gradient to the exit. Computed outside of autocast, in float32 or wider. Parameters: `linear.weight` (1, F) and
    `linear.bias` (1,), with PyTorch's initial values.

    Args:
        features: names out of :data:`gateplug.early_exit.functional.FEATURES`, in the order of the weight's columns.

    Raises:
        ValueError: an unknown name, one given twice, or none.
    """

    room: ClassVar[str] = "early_exit"
    axes: ClassVar[tuple[str, ...]] = ("exit",)

    def __init__(self, features: Sequence[str] = FEATURES) -> None:
        super().__init__()
        names = tuple(features)
        allowed = ", ".join(map(repr, FEATURES))
        for name in names:
            if name not in FEATURES:
                raise ValueError(f"features={names}: {name!r} is none of {allowed}.{nearest(name, FEATURES)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"features={names} must name at least one of {allowed}, and none twice")
        self.features = names
        self._columns = [FEATURES.index(name) for name in names]
        self.linear = nn.Linear(len(names), 1)

    def forward(self, logits: Tensor) -> Tensor:
        """Gate logits: (…, C) to (…).

        Raises:
            ValueError: C < 2.
        """
        kind = logits.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            weight, bias = self.linear.weight, self.linear.bias
            u = uncertainty_features(logits)
            u = u.to(torch.promote_types(u.dtype, weight.dtype))
            if self._columns != _ALL:
                u = torch.stack([u[..., column] for column in self._columns], -1)
            a = nn.functional.linear(u, weight.to(u), bias.to(u)).squeeze(-1)
        if self.recording:
            self.record(a.sigmoid().unsqueeze(-1))
        return a

    def extra_repr(self) -> str:
        """The features."""
        return f"features={self.features}"

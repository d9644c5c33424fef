"""Rows of a gate: their precision, and those that a mask leaves out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scores(part: nn.Parameter | nn.Linear, rows: Tensor) -> Tensor:
    """What a gate reads its choice from: a linear layer of the rows, in their precision; or parameters, whatever the rows."""
    if isinstance(part, nn.Parameter):
        return at_least_float32(part)
    bias = None if part.bias is None else part.bias.to(rows.dtype)
    return nn.functional.linear(rows, part.weight.to(rows.dtype), bias)


def check_mask(mask: Tensor | None, lead: torch.Size) -> None:
    """Raise ValueError for a mask of another shape than the rows', TypeError for one that does not say yes or no."""
    if mask is None:
        return
    if mask.is_floating_point():
        raise TypeError(
            f"mask is {mask.dtype}; it must be bool (True: the row counts) or whole numbers. An additive mask is `mask == 0`"
        )
    if mask.shape != lead:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} does not go with rows of shape {tuple(lead)}")


def cleared(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros where the mask over its leading dimensions is False, whatever stood there, NaN as well."""
    return x.masked_fill(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())) == 0, 0)


def counted_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` (T, …) with zeros for padding, in which anything may stand, NaN as well."""
    return x if mask is None else cleared(x, mask)


def masked(items: Tensor, rows: Tensor, mask: Tensor | None, run: Callable[[Tensor, Tensor, bool], Tensor]) -> Tensor:
    """`run(items, rows, without_padding)` on the rows that the mask leaves, and zeros for the others."""
    if mask is None:
        return run(items, rows, False)
    taking = mask.reshape(-1).nonzero().squeeze(-1)
    y = run(items.index_select(0, taking), rows.index_select(0, taking), True)
    return y.new_zeros(len(items), *y.shape[1:]).index_copy(0, taking, y)

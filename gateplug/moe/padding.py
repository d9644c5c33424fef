"""Which rows of a router are padding: read from the batch, as routers see rows of all samples in one tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from gateplug.moe.families import Seen
from gateplug.moe.routers import Side


class Counted:
    """Which rows of a router count, and what its terms need of that: the same for all routers of a batch, so computed once."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        """(T,) bool."""
        self._choices: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def number(self) -> Tensor:
        """Rows that count, a scalar in float32."""
        return self.mask.sum().float()

    @cached_property
    def ones(self) -> Tensor:
        """(T,) float32: 1 for a row that counts, 0 for padding."""
        return self.mask.float()

    def choices(self, k: int) -> tuple[Tensor, Tensor]:
        """Of k choices a row: (T · k,) float32, 1 for one that counts; and their number, at least 1, a scalar."""
        if k not in self._choices:
            self._choices[k] = self.ones[:, None].expand(-1, k).flatten(), (self.number * k).clamp_min(1)
        return self._choices[k]

    @cached_property
    def share(self) -> Tensor:
        """(T,) float32: the part of each row in a mean over those that count, 0 for padding and where none counts."""
        return self.ones / self.number.clamp_min(1)


class Padding:
    """The masks of the batch that is being trained on, shared by all routers of a model.

    Rows (samples · positions) are matched to a mask by their number. A router that sees one row a sample has no padding. Any
    other number of rows (a cache, a model that cuts its input) cannot be matched: that router is left out for the batch, with a
    warning.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.samples = 0
        self._counted: dict[tuple[str, int], tuple[Tensor, Counted]] = {}
        self._warned = False

    def read(self, batch: Any) -> None:
        """Take the masks of a batch: `attention_mask`; for a decoder `decoder_attention_mask`, else labels other than -100."""
        self.clear()
        for part in _mappings(batch):
            mask = part.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                self.masks["encoder"], self.samples = mask.reshape(-1).bool(), len(mask)
            decoder, labels = part.get("decoder_attention_mask"), part.get("labels")
            if isinstance(decoder, Tensor) and decoder.dim() == 2:
                self.masks["decoder"] = decoder.reshape(-1).bool()
            elif isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
                self.masks["decoder"] = labels.reshape(-1) != -100

    def clear(self) -> None:
        """Forget the batch."""
        self.masks, self.samples, self._counted = {}, 0, {}

    def of(self, seen: Seen, side: Side, router: str, tasks: int = 1) -> tuple[bool, Counted | None]:
        """Whether rows can be told from padding, and which of them count if not all do.

        Args:
            seen: what the router did.
            side: of the model.
            router: its name, for the warning.
            tasks: rows of the router for each row of the batch.
        """
        mask, rows = self.masks.get(side), seen.rows // tasks
        if seen.masked or mask is None or rows == self.samples:
            return True, None
        if mask.numel() == rows:
            source, counted = self._counted.get((side, tasks), (None, None))
            if source is not mask or counted is None:
                counted = Counted(mask if tasks == 1 else mask.repeat_interleave(tasks))
                self._counted[side, tasks] = mask, counted
            return True, counted
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"router {router!r} sees {rows} rows and the batch's mask has {mask.numel()}: what is padding cannot be told, so "
                "this router is neither regularised nor counted in such batches. Give the batch a mask of the length that the "
                "model works on",
                stacklevel=2,
            )
        return False, None


def _mappings(batch: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        yield batch
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _mappings(part)

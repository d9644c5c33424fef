"""Which rows of a router are padding: read from the batch, as routers see rows of all samples in one tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from gateplug.moe.families import Seen
from gateplug.moe.routers import Side


class Padding:
    """The masks of the batch that is being trained on, shared by all routers of a model.

    Rows (samples · positions) are matched to a mask by their number. A router that sees one row a sample has no padding. Any
    other number of rows (a cache, a model that cuts its input) cannot be matched: that router is left out for the batch, with a
    warning.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.samples = 0
        self._warned = False

    def read(self, batch: Any) -> None:
        """Take the masks of a batch: `attention_mask`; for a decoder `decoder_attention_mask`, else labels other than -100."""
        self.masks, self.samples = {}, 0
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
        self.masks, self.samples = {}, 0

    def of(self, seen: Seen, side: Side, router: str, tasks: int = 1) -> tuple[bool, Tensor | None]:
        """Whether rows can be told from padding, and their mask `(rows,)` if there is one.

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
            return True, mask if tasks == 1 else mask.repeat_interleave(tasks)
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

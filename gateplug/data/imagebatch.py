"""Images as they are stored and read, and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gateplug.data.augment import Augmentation
from gateplug.data.module import as_it_is
from gateplug.data.pixels import Decoder


class ToPixels:
    """Batch of stored images to what the network sees: float in [0, 1], augmented, then normalised.

    Args:
        augment: Random change, or None.
        mean: Per channel, in units of [0, 1]; None: 0.
        std: Per channel, > 0; None: 1.
    """

    def __init__(
        self, augment: Augmentation | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        self.augment, self.mean, self.std = augment, mean, std

    def __call__(self, batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        """Make the network's input of a batch with stored ``pixel_values`` ``(batch, channels, height, width)``."""
        images = batch["pixel_values"]
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        if self.augment is not None:
            images = self.augment(images, keys)
        if self.mean is not None:
            images = images - torch.tensor(self.mean)[:, None, None]
        if self.std is not None:
            images = images / torch.tensor(self.std)[:, None, None]
        return {**batch, "pixel_values": images}


class LazyImages(Dataset[Any]):
    """Images that are decoded when they are read, for data sets that do not fit into memory.

    Args:
        data: ``datasets.Dataset`` with the undecoded image column alone.
        column: Its name.
        rows: Row numbers in it: int64 ``(n,)``.
        labels: int64 ``(n,)``.
        decoder: Value to pixels.
        split: Name for error messages.
    """

    collate_fn = staticmethod(as_it_is)

    def __init__(self, data: Any, column: str, rows: Tensor, labels: Tensor, decoder: Decoder, split: str) -> None:
        self.data, self.column, self.rows, self.labels = data, column, rows, labels
        self.decoder, self.split = decoder, split

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = self.rows[torch.tensor(indices)].tolist()
        values = self.data[rows][self.column]
        images = [self.decoder(v, f"split {self.split!r}, row {r}") for v, r in zip(values, rows, strict=True)]
        return {"pixel_values": torch.stack(images), "labels": self.labels[torch.tensor(indices)]}


def is_encoded(feature: Any) -> bool:
    """Whether a column holds image files (``datasets.Image``, bytes, ``{bytes, path}`` or paths), not pixel lists."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", "") in ("binary", "large_binary", "string")

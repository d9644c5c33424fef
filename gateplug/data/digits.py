"""scikit-learn's handwritten digits: the data set that is on every machine where gateplug is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateplug.data.augment import Augmentation, augmentation
from gateplug.data.imagebatch import ToPixels
from gateplug.data.module import ExactDataModule, Split, TensorRows, as_it_is, parts


class Digits(ExactDataModule):
    """1,797 grey images of handwritten digits, 8×8, bundled with scikit-learn: the default of the recipes.

    Batches are ``{"pixel_values": float (batch, 1, size, size) in [0, 1], "labels": int64 (batch,) in [0, 10)}``. With
    the default fractions 1,258 images train, 180 validate and 359 test. The data come from the UCI repository's
    "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, CC BY 4.0), its test part.

    Args:
        batch_size: Images per process and step, ≥ 1.
        seed: Of split, order and augmentation.
        val_fraction: Share of all images for validation, in [0, 1).
        test_fraction: Share of all images for the test, in [0, 1).
        augment: ``"affine"``, ``"crop"``, ``"cutout"``, ``"flip"``, an :class:`~gateplug.data.Augmentation`, a list of
            these, or None. Training images only.
        num_workers: Processes that read, ≥ 0; 0 is fastest here.
        image_size: Side in pixels, ≥ 1, to which the images are resized (bilinear); None: 8.

    Raises:
        ValueError: For an argument outside its range.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        augment: str | Augmentation | list[str | Augmentation] | None = None,
        num_workers: int = 0,
        image_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, val_fraction, test_fraction)
        if image_size is not None and image_size < 1:
            raise ValueError(f"Digits(image_size={image_size}): it must be at least 1 pixel, or None for 8.")
        self.image_size = image_size or 8
        self.augment = augmentation(augment, self.image_size, self.image_size)

    def read(self, split: Split) -> TensorRows | None:
        """Read one part: pixels in [0, 1] and labels."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        rows = parts(len(labels), self.seed, self.val_fraction, self.test_fraction)[split]
        if not len(rows):
            return None
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)[rows] / 16  # the data set counts from 0 to 16
        if self.image_size != 8:
            images = F.interpolate(images, size=[self.image_size] * 2, mode="bilinear", antialias=True)
        return TensorRows(pixel_values=images, labels=torch.from_numpy(labels).long()[rows])

    def collate(self, split: Split) -> Callable[[Any], Any]:
        """Items come as a batch."""
        return as_it_is

    def augmented(self, split: Split) -> Callable[[Any, Tensor], Any]:
        """Augment the training images."""
        return ToPixels(self.augment if split == "train" else None)

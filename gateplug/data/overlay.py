"""Two images in one, and the class of each to be named: the multi-task set that every image set can become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gateplug.data.imagebatch import ToPixels
from gateplug.data.module import ExactDataModule, Split, as_it_is
from gateplug.data.randomness import mix, permutation

_PAIRS = 0x9A12  # keeps the pairs' random numbers apart from other uses of the same seed
_RIGHT = 0x2  # and a second image's augmentation apart from the first one's
_NUMBER: dict[Split, int] = {"train": 0, "val": 1, "test": 2}


class OverlaidImages(ExactDataModule):
    """Pairs of images that overlap, the first at the top left and the second at the bottom right: two tasks in one image.

    Of images ``(channels, height, width)`` a pair makes a canvas ``(channels, height + shift, width + shift)``, zero where
    no image lies, and where both lie the brighter pixel. Batches are ``{"pixel_values": float (batch, channels,
    height + shift, width + shift), "labels": {"left": int64 (batch,), "right": int64 (batch,)}}``. With Fashion-MNIST this
    is Multi-Fashion: 28×28 pixels become 36×36, of which 20×20 have both images.

    Pairs of a split are made of that split's images alone, so no training pair shares an image with a validation or test
    pair. No pair comes twice and none has one image twice, and all images are used equally often, up to one. Pixels are
    kept once and pairs are put together when a batch is read. Augmentation changes each image before they are laid over
    each other, normalisation comes last; both are those of ``data``.

    Args:
        data: The images, such as ``Digits()`` or ``ImageData(...)``. Its split, limit, augmentation, mean and std count;
            its ``batch_size`` and ``num_workers`` do not.
        train_pairs: Number of training pairs, from 1 to n(n-1) for n images.
        val_pairs: Number of validation pairs; there are none where ``data`` has no validation set.
        test_pairs: Number of test pairs; the same.
        shift: Pixels between the two images' corners, down and to the right, ≥ 1.
        batch_size: Pairs per process and step, ≥ 1.
        seed: Of pairs, order and augmentation; the split is that of ``data`` and its seed.
        num_workers: Processes that read, ≥ 0.

    Raises:
        TypeError: If ``data`` is no data module of gateplug with images and one class each.
        ValueError: For an argument outside its range, or more pairs than the images of a split allow.

    Source: MultiMNIST of Sabour et al. 2017, arXiv 1710.09829; with Fashion-MNIST in Lin et al. 2019, arXiv 1912.12854.
    """

    def __init__(
        self,
        data: ExactDataModule,
        train_pairs: int = 60_000,
        val_pairs: int = 6_000,
        test_pairs: int = 10_000,
        shift: int = 8,
        batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        if not isinstance(data, ExactDataModule):
            raise TypeError(f"OverlaidImages(data={type(data).__name__}): a data module of images, gp.ImageData or gp.Digits.")
        self.pairs: dict[Split, int] = {"train": train_pairs, "val": val_pairs, "test": test_pairs}
        for split, count in self.pairs.items():
            if count < 1:
                raise ValueError(f"OverlaidImages({split}_pairs={count}): it must be at least 1.")
        if shift < 1:
            raise ValueError(f"OverlaidImages(shift={shift}): at least 1 pixel, else nothing tells the two images apart.")
        self.data, self.shift = data, shift

    @property
    def num_classes(self) -> int:
        """Number of classes of each of the two tasks."""
        count = getattr(self.data, "num_classes", None)
        if count is None:
            raise AttributeError(f"OverlaidImages: {type(self.data).__name__} does not say its num_classes.")
        return int(count)

    def prepare_data(self) -> None:
        """Fetch the images once per machine."""
        self.data.prepare_data()

    def read(self, split: Split) -> ImagePairs | None:
        """Read a split's images and draw its pairs."""
        images = self.data.find(split)
        if images is None:
            return None
        if not _is_images(images[0]) or not isinstance(self.data.augmented(split), ToPixels):
            raise TypeError(
                f"OverlaidImages(data={type(self.data).__name__}): its samples are not images with one class each; give "
                "gp.ImageData or gp.Digits."
            )
        n, count = len(images), self.pairs[split]
        if count > n * (n - 1):
            raise ValueError(
                f"OverlaidImages({split}_pairs={count}): the {n} images of the {split} set make at most {n * (n - 1)} pairs; "
                f"set {split}_pairs to that or less, or give data a larger {split} set."
            )
        return ImagePairs(images, draw_pairs(n, count, self.seed, _PAIRS, _NUMBER[split]))

    def dataset(self, split: Split) -> ImagePairs:
        """The pairs of a split, read if they were not yet.

        Raises:
            ValueError: If ``data`` has no such split.
        """
        self.data.dataset(split)  # its own message says how to get that split
        found = super().dataset(split)
        assert isinstance(found, ImagePairs)
        return found

    def collate(self, split: Split) -> Callable[[Any], Any]:
        """Items come as a batch; :meth:`augmented` lays the images over each other."""
        return as_it_is

    def augmented(self, split: Split) -> Callable[[Any, Tensor], Any]:
        """Augment each image, overlay the pairs, normalise."""
        pixels = self.data.augmented(split)
        assert isinstance(pixels, ToPixels)
        return Overlay(pixels, self.shift)


class ImagePairs(Dataset[Any]):
    """Pairs of a data set's images: ``pixel_values`` ``(2, channels, height, width)`` and ``labels`` ``left``, ``right``.

    Args:
        images: Data set with ``__getitems__`` and items ``{"pixel_values", "labels"}``.
        pairs: Index of the first and the second image of each pair: int64 ``(pairs, 2)``.
    """

    collate_fn = staticmethod(as_it_is)

    def __init__(self, images: Any, pairs: Tensor) -> None:
        self.images, self.pairs = images, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        return {
            "pixel_values": batch["pixel_values"][0],
            "labels": {task: label[0] for task, label in batch["labels"].items()},
        }

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        found = self.images.__getitems__(self.pairs[torch.tensor(indices)].flatten().tolist())
        pixels, labels = found["pixel_values"].unflatten(0, (-1, 2)), found["labels"].unflatten(0, (-1, 2))
        return {"pixel_values": pixels, "labels": {"left": labels[:, 0], "right": labels[:, 1]}}


class Overlay:
    """Batch of pairs to a batch of canvases: each image augmented, the two overlaid, the canvas normalised.

    Args:
        pixels: The images' own augmentation and normalisation.
        shift: Pixels between the corners.
    """

    def __init__(self, pixels: ToPixels, shift: int) -> None:
        self.change = None if pixels.augment is None else ToPixels(pixels.augment)
        self.normalise = ToPixels(None, pixels.mean, pixels.std)
        self.shift = shift

    def __call__(self, batch: dict[str, Any], keys: Tensor) -> dict[str, Any]:
        """Make canvases of stored ``pixel_values`` ``(batch, 2, channels, height, width)``."""
        left, right = batch["pixel_values"].unbind(1)
        if self.change is not None:
            left = self.change({"pixel_values": left}, keys)["pixel_values"]
            others = mix(keys + _RIGHT) & torch.iinfo(torch.int64).max  # keys are not negative
            right = self.change({"pixel_values": right}, others)["pixel_values"]
        return self.normalise({**batch, "pixel_values": overlay(left, right, self.shift)}, keys)


def overlay(left: Tensor, right: Tensor, shift: int) -> Tensor:
    """Lay images over each other, ``shift`` pixels apart in both directions, the larger value where both lie.

    Args:
        left: At the top left, ``(batch, channels, height, width)``, ≥ 0.
        right: At the bottom right, of the same shape and type.
        shift: Pixels, ≥ 1.

    Returns:
        ``(batch, channels, height + shift, width + shift)`` of the same type, 0 where no image lies.
    """
    height, width = left.shape[-2:]
    canvas = left.new_zeros((*left.shape[:-2], height + shift, width + shift))
    canvas[..., :height, :width] = left
    place = canvas[..., shift:, shift:]
    torch.maximum(place, right, out=place)
    return canvas


def draw_pairs(n: int, count: int, *key: int) -> Tensor:
    """Pairs of n images by seed: no pair twice, none of an image with itself, every image equally often up to one.

    A permutation p by the key is walked through in rounds; round r pairs p[i] with p[i + r + 1], the end joined to the
    beginning. So fewer pairs are the first of more.

    Args:
        n: Number of images.
        count: Number of pairs, ≤ n(n-1).
        key: What the permutation depends on.

    Returns:
        (first, second) of each pair: int64 ``(count, 2)``.
    """
    order = permutation(n, *key)
    number = torch.arange(count)
    place, turn = number % n, number // n
    return torch.stack([order[place], order[(place + turn + 1) % n]], dim=1)


def _is_images(item: Any) -> bool:
    """Whether a data set's item is ``{"pixel_values": (channels, height, width), "labels": one class}``."""
    pixels, label = (item.get(name) if isinstance(item, dict) else None for name in ("pixel_values", "labels"))
    return isinstance(pixels, Tensor) and pixels.dim() == 3 and isinstance(label, Tensor) and label.dim() == 0

"""Augmentation of image batches as a function of each sample's key, on torch alone.

Every class here takes ``images`` float ``(batch, channels, height, width)`` and ``keys`` int64 ``(batch,)`` (from
(seed, epoch, index), :func:`gateplug.data.sample_keys`), and treats a sample the same in whatever batch it comes.
Pixels that come in from outside are zero, so augment before normalising.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gateplug.data.randomness import uniform


class Augmentation(ABC):
    """A random change of images that depends on the samples' keys alone."""

    @abstractmethod
    def __call__(self, images: Tensor, keys: Tensor, stream: int = 0) -> Tensor:
        """Change the images; several augmentations in a row use different streams."""


class RandomCrop(Augmentation):
    """Shift by up to ``padding`` pixels in each direction: pad with zeros, cut the old size out at a random place.

    Args:
        padding: Pixels, ≥ 1; 4 is usual for images of 32×32.
    """

    def __init__(self, padding: int = 4) -> None:
        if padding < 1:
            raise ValueError(f"RandomCrop(padding={padding}): it must be at least 1 pixel.")
        self.padding = padding

    def __call__(self, images: Tensor, keys: Tensor, stream: int = 0) -> Tensor:
        """Crop each image at its own place."""
        height, width = images.shape[-2:]
        offset = (uniform(keys, 2, stream) * (2 * self.padding + 1)).long()
        rows = offset[:, :1] + torch.arange(height)
        columns = offset[:, 1:] + torch.arange(width)
        padded = F.pad(images, [self.padding] * 4)
        sample = torch.arange(len(images))[:, None, None, None]
        channel = torch.arange(images.shape[1])[:, None, None]
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


class RandomFlip(Augmentation):
    """Mirror left and right.

    Args:
        probability: In [0, 1].
    """

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"RandomFlip(probability={probability}): it must lie in [0, 1].")
        self.probability = probability

    def __call__(self, images: Tensor, keys: Tensor, stream: int = 0) -> Tensor:
        """Flip each image or not."""
        flip = uniform(keys, 1, stream)[:, :, None, None] < self.probability
        return torch.where(flip, images.flip(-1), images)


class Cutout(Augmentation):
    """Set a square to zero, its centre anywhere in the image (DeVries and Taylor 2017, arXiv 1708.04552).

    Args:
        size: Side in pixels, ≥ 1; what lies outside the image is cut off.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"Cutout(size={size}): it must be at least 1 pixel.")
        self.size = size

    def __call__(self, images: Tensor, keys: Tensor, stream: int = 0) -> Tensor:
        """Cut a square out of each image."""
        height, width = images.shape[-2:]
        start = (uniform(keys, 2, stream) * torch.tensor([height, width])).long() - self.size // 2
        row, column = torch.arange(height) - start[:, :1], torch.arange(width) - start[:, 1:]
        hit = ((row >= 0) & (row < self.size))[:, :, None] & ((column >= 0) & (column < self.size))[:, None, :]
        return images.masked_fill(hit[:, None], 0.0)


class RandomAffine(Augmentation):
    """Turn, shift and scale a little, bilinear with zero fill; each amount uniform in its range.

    Args:
        degrees: Rotation in [-degrees, degrees], ≥ 0.
        translate: Shift in [-translate, translate] of the image's side, in [0, 1].
        scale: Scale factor in [1 - scale, 1 + scale], in [0, 1).
    """

    def __init__(self, degrees: float = 10.0, translate: float = 0.08, scale: float = 0.1) -> None:
        if degrees < 0 or not 0 <= translate <= 1 or not 0 <= scale < 1:
            raise ValueError(
                f"RandomAffine(degrees={degrees}, translate={translate}, scale={scale}): degrees must be >= 0, translate "
                "in [0, 1] and scale in [0, 1)."
            )
        self.degrees, self.translate, self.scale = degrees, translate, scale

    def __call__(self, images: Tensor, keys: Tensor, stream: int = 0) -> Tensor:
        """Move each image by its own map."""
        draw = uniform(keys, 4, stream).double() * 2 - 1
        angle, zoom = draw[:, 0] * math.radians(self.degrees), 1 + self.scale * draw[:, 1]
        shift = 2 * self.translate * draw[:, 2:]  # grid coordinates reach from -1 to 1
        height, width = images.shape[-2:]
        y = ((torch.arange(height, dtype=torch.float64) * 2 + 1) / height - 1)[:, None]
        x = ((torch.arange(width, dtype=torch.float64) * 2 + 1) / width - 1)[None, :]
        cos, sin = ((f(angle) / zoom)[:, None, None] for f in (torch.cos, torch.sin))
        ratio = height / width  # turn in pixels, not in the grid's units, which differ in an oblong image
        grid_x = cos * x - sin * ratio * y + shift[:, 0, None, None]
        grid_y = sin / ratio * x + cos * y + shift[:, 1, None, None]
        # affine_grid multiplies matrices, whose rounding may depend on the batch size; float64 products do not show it
        grid = torch.stack([grid_x, grid_y], dim=-1).to(images.dtype)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class Compose(Augmentation):
    """Several augmentations in a row, each with random numbers of its own.

    Args:
        steps: Augmentations, applied from first to last.
    """

    def __init__(self, steps: Sequence[Augmentation]) -> None:
        self.steps = list(steps)

    def __call__(self, images: Tensor, keys: Tensor, stream: int = 0) -> Tensor:
        """Apply the augmentations one after the other."""
        for number, step in enumerate(self.steps):
            images = step(images, keys, stream + number + 1)
        return images


NAMES = ("affine", "crop", "cutout", "flip")


def augmentation(spec: str | Augmentation | Sequence[str | Augmentation] | None, height: int, width: int) -> Augmentation | None:
    """The augmentation that a data module's ``augment`` argument stands for.

    Args:
        spec: A name, an augmentation, or a list of them. ``crop`` pads by an eighth of the shorter side and ``cutout``
            cuts a square of half of it; ``affine`` and ``flip`` have their class's defaults.
        height: Of the images, pixels.
        width: Of the images, pixels.

    Raises:
        ValueError: For an unknown name.
    """
    side = min(height, width)
    if spec is None or isinstance(spec, Augmentation):
        return spec
    if not isinstance(spec, str):
        steps = [augmentation(part, height, width) for part in spec]
        return Compose([step for step in steps if step is not None])
    if spec == "affine":
        return RandomAffine()
    if spec == "crop":
        return RandomCrop(max(1, side // 8))
    if spec == "cutout":
        return Cutout(max(1, side // 2))
    if spec == "flip":
        return RandomFlip()
    raise ValueError(f"augment={spec!r}: the names are {', '.join(NAMES)}; or pass an Augmentation, or a list of them.")

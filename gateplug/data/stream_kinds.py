"""What makes the tasks of a stream differ: one permutation of the pixels, one angle, one group of classes, one set of labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateplug.core.stream import permutation
from gateplug.data.randomness import permutation as shuffled

_CLASSES = 0xC1A5  # keeps the order of the classes apart from other uses of the same seed
LABELS = ("labels", "label")
ELSEWHERE = "give the tasks as a list of data modules of your own (tasks=…)"


class Permute:
    """The pixels of a task of a permuted stream: one permutation for all samples, the channels together.

    Args:
        seed: Of the stream.
        task: Its number; task 0 is left as it is.
    """

    def __init__(self, seed: int, task: int) -> None:
        self.seed, self.task = seed, task
        self._orders: dict[int, Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Permute images ``(B, C, H, W)`` or ``(B, H, W)`` by pixel, or vectors ``(B, n)``."""
        if images.dim() not in (2, 3, 4) or not (images.is_floating_point() or images.dtype == torch.uint8):
            raise ValueError(
                "kind='permuted' permutes pixels: images (B, C, H, W) or (B, H, W), or vectors (B, n), of floats or uint8. "
                f"This batch has {tuple(images.shape)} of {images.dtype}; text has no pixels: {ELSEWHERE}."
            )
        if self.task == 0:
            return images
        flat = images if images.dim() == 2 else images.flatten(-2)
        n = flat.shape[-1]
        if n not in self._orders:
            self._orders[n] = permutation(self.seed, self.task, n)
        # gather is some three times as fast as an index or index_select on the last axis
        return flat.gather(-1, self._orders[n].to(flat.device).expand_as(flat)).reshape(images.shape)


class Rotate:
    """The images of a task of a rotated stream, turned counterclockwise; what comes in from outside is black.

    Args:
        degrees: The angle; 0 leaves the images as they are.
        mean: By which the images were normalised, per channel in units of [0, 1]; None: 0.
        std: The same, > 0; None: 1.
    """

    def __init__(self, degrees: float, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        self.degrees, self.mean, self.std = degrees, mean, std

    def __call__(self, images: Tensor) -> Tensor:
        """Turn images ``(B, C, H, W)`` or ``(B, H, W)``, bilinear."""
        if images.dim() not in (3, 4) or not images.is_floating_point():
            raise ValueError(
                "kind='rotated' turns images (B, C, H, W) or (B, H, W) of floats. This batch has "
                f"{tuple(images.shape)} of {images.dtype}: a vector has no rows to turn. Have the data module give images and "
                f"flatten them in the network, or {ELSEWHERE}."
            )
        if self.degrees == 0:
            return images
        if images.dim() == 3:
            return self(images[:, None])[:, 0]
        black = self._black(images)
        # turning is linear, so it may be done on what was normalised, if black is 0 there
        grid = self._grid(*images.shape[-2:]).to(images).expand(len(images), -1, -1, -1)
        return F.grid_sample(images - black, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + black

    def _black(self, images: Tensor) -> Tensor:
        black = torch.zeros(1, 1, 1, dtype=images.dtype, device=images.device)
        if self.mean is not None:
            black = black - images.new_tensor(self.mean)[:, None, None]
        return black if self.std is None else black / images.new_tensor(self.std)[:, None, None]

    def _grid(self, height: int, width: int) -> Tensor:
        """Where each pixel is read: ``(1, H, W, 2)``, turned in pixels, which are not square in the grid's units."""
        y = ((torch.arange(height, dtype=torch.float64) * 2 + 1) / height - 1)[:, None]
        x = ((torch.arange(width, dtype=torch.float64) * 2 + 1) / width - 1)[None, :]
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        ratio = height / width
        return torch.stack([cos * x - sin * ratio * y, sin / ratio * x + cos * y], dim=-1)[None]


def class_groups(classes: int, num_tasks: int, seed: int | None, uneven: bool = False) -> list[list[int]]:
    """Cut the classes 0 … K−1 into T groups.

    Args:
        classes: K.
        num_tasks: T.
        seed: The classes are shuffled by it first; None: they stay in order.
        uneven: Let the first groups have one class more where T does not divide K.

    Returns:
        The classes of each task, ascending.

    Raises:
        ValueError: T does not divide K and ``uneven`` is not set, or there are fewer classes than tasks.
    """
    if classes < num_tasks or (classes % num_tasks and not uneven):
        even = [t for t in range(2, classes + 1) if classes % t == 0]
        more = "" if classes < num_tasks else " Or set uneven=True, for groups whose sizes differ by one."
        raise ValueError(f"num_tasks={num_tasks} does not cut {classes} classes into groups of one size; these do: {even}.{more}")
    order = torch.arange(classes) if seed is None else shuffled(classes, seed, _CLASSES)
    return [sorted(group.tolist()) for group in order.tensor_split(num_tasks)]


class View:
    """A batch as a task shows it.

    Args:
        task: Its number.
        change: Of the images, or None.
        relabel: Old label to new, int64 ``(K,)``; or what is added to the labels; or None to leave them.
        tagged: Whether the batch names its task.
    """

    def __init__(
        self, task: int, change: Callable[[Tensor], Tensor] | None, relabel: Tensor | int | None = None, tagged: bool = False
    ) -> None:
        self.task, self.change, self.relabel, self.tagged = task, change, relabel, tagged

    def __call__(self, batch: Any) -> Any:
        """The batch in the form that it has: a mapping, or (inputs, labels).

        Raises:
            ValueError: For a batch in which images or labels are not found.
        """
        if isinstance(batch, Mapping):
            out = self._images(dict(batch))
            key = next((k for k in LABELS if k in out), None)
            if key is not None:
                out[key] = self._labels(out[key])
            elif self.relabel is not None:
                self._labels(None)
            return {**out, "task": self._tag(out)} if self.tagged else out
        if isinstance(batch, tuple | list) and len(batch) == 2:
            inputs, labels = batch
            inputs = self._images(dict(inputs)) if isinstance(inputs, Mapping) else self._changed(inputs)
            parts = [inputs, self._labels(labels), *([self._tag(labels)] if self.tagged else [])]
            return tuple(parts) if isinstance(batch, tuple) else parts
        if self.change is None and self.relabel is None and not self.tagged:
            return batch
        raise ValueError(
            f"A stream needs batches that are a mapping with 'labels', or (inputs, labels); this one is a {type(batch).__name__}"
            + (f" of {len(batch)}." if isinstance(batch, tuple | list) else ".")
        )

    def _images(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.change is None:
            return batch
        if "pixel_values" not in batch:
            raise ValueError(
                f"Permuted and rotated streams change images, under 'pixel_values'; this batch has {sorted(map(str, batch))}. "
                f"For text and other inputs, {ELSEWHERE}."
            )
        return {**batch, "pixel_values": self._changed(batch["pixel_values"])}

    def _changed(self, inputs: Any) -> Any:
        if self.change is None:
            return inputs
        if not isinstance(inputs, Tensor):
            raise ValueError(f"Permuted and rotated streams change images; these inputs are a {type(inputs).__name__}.")
        return self.change(inputs)

    def _labels(self, labels: Any) -> Any:
        if self.relabel is None:
            return labels
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            what = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise ValueError(f"The classes of a task need labels that are whole numbers (B,), and these are {what}.")
        return labels + self.relabel if isinstance(self.relabel, int) else self.relabel[labels]

    def _tag(self, like: Any) -> Tensor:
        tensors = [t for t in (like.values() if isinstance(like, Mapping) else [like]) if isinstance(t, Tensor) and t.dim()]
        return torch.full((len(tensors[0]) if tensors else 1,), self.task, dtype=torch.int64)

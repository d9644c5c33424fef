"""Any Hugging Face image data set as a data module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gateplug.data.augment import Augmentation, augmentation
from gateplug.data.imagebatch import LazyImages, ToPixels, is_encoded
from gateplug.data.labels import LabelCode, class_names
from gateplug.data.module import ExactDataModule, Split, TensorRows, as_it_is, check_limits, limited, parts
from gateplug.data.pixels import Decoder
from gateplug.data.source import check_columns, check_source, load_splits, pick_split

# per channel over the training images; computed by the data sets' users everywhere, in units of [0, 1]
STATISTICS: dict[str, tuple[list[float], list[float]]] = {
    "mnist": ([0.1307], [0.3081]),
    "fashion_mnist": ([0.2860], [0.3530]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
}


class ImageData(ExactDataModule):
    """Images and their classes from any Hugging Face data set, on the hub or in a local folder.

    Batches are ``{"pixel_values": float (batch, channels, height, width), "labels": int64 (batch,)}``. The images are
    decoded once, into one uint8 tensor that workers share; normalisation and augmentation work on the batch. Order,
    split and augmentation are functions of (seed, epoch, index).

    Args:
        name: Hub id, such as ``ylecun/mnist``. A folder of that name, or of its last part, under the environment variable
            ``GATEPLUG_DATA`` is used instead of the hub.
        path: Local folder of parquet, arrow, csv or json files, or one that ``save_to_disk`` wrote.
        config: Configuration of the hub data set.
        image_column: Column of encoded bytes, ``{bytes, path}``, paths, ``datasets.Image`` or nested lists.
        label_column: Column of class numbers or names.
        mode: ``"L"`` (1 channel) or ``"RGB"`` (3). Transparent images are pasted on white, 16 bits become 8.
        image_size: Side in pixels, or [height, width], to resize to; None: all images must have the same size.
        mean: Per channel in units of [0, 1]; None: the published one for MNIST, Fashion-MNIST and CIFAR-10, else none.
        std: Per channel, > 0; None: the same.
        augment: ``"crop"``, ``"flip"``, ``"cutout"``, ``"affine"``, an :class:`~gateplug.data.Augmentation`, a list of
            these, or None. Training images only.
        train_split: Name of the training split.
        val_split: Name of the validation split; None: ``val_fraction`` of the training rows, drawn by seed.
        test_split: Name of the test split; None: ``test_fraction`` of the training rows.
        val_fraction: In [0, 1); ignored with ``val_split``.
        test_fraction: In [0, 1); ignored with ``test_split``.
        train_samples: At most so many training rows, drawn by seed; None: all.
        num_classes: Number of classes K; None: as declared by the data set, else the largest label + 1.
        batch_size: Images per process and step, ≥ 1.
        seed: Of split, limit, order and augmentation.
        num_workers: Processes that read, ≥ 0; 0 is mostly fastest where the images are in memory.
        in_memory: Decode all at once; False: decode when read.

    Raises:
        ValueError: For an argument outside its range, both or neither of ``name`` and ``path``, a split, column or label
            that is not there, or an image that cannot be read; the text says what was found.
        FileNotFoundError: If the folder is missing, or a hub id is neither local nor can be reached.
    """

    def __init__(
        self,
        name: str | None = None,
        path: str | None = None,
        config: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        mode: Literal["L", "RGB"] = "RGB",
        image_size: int | tuple[int, int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: str | Augmentation | list[str | Augmentation] | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        train_samples: int | None = None,
        num_classes: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        in_memory: bool = True,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, 0.0 if val_split else val_fraction, 0.0 if test_split else test_fraction)
        check_source("ImageData", name, path)
        if mode not in ("L", "RGB"):
            raise ValueError(f"ImageData(mode={mode!r}): 'L' (grey) or 'RGB'.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"ImageData(image_size={image_size!r}): a side, or height and width, of at least 1 pixel.")
        check_limits("ImageData", train_samples=train_samples, num_classes=num_classes)
        channels = 1 if mode == "L" else 3
        known = STATISTICS.get(Path(name or path or "").name.lower().replace("-", "_"), (None, None))
        mean, std = (given or (k if k and len(k) == channels else None) for given, k in zip((mean, std), known, strict=True))
        self.mean, self.std = mean, std
        for what, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) != channels or (what == "std" and min(values) <= 0)):
                rule = f"one number per channel, {channels} for mode {mode!r}" + (", above 0" if what == "std" else "")
                raise ValueError(f"ImageData({what}={values}): {rule}, in units of pixels in [0, 1].")
        augmentation(augment, 1, 1)  # refuses unknown names here, before anything is read
        self.name, self.path, self.config, self.mode, self.image_size = name, path, config, mode, size
        self.image_column, self.label_column, self.augment = image_column, label_column, augment
        self.splits: dict[Split, str | None] = {"train": train_split, "val": val_split, "test": test_split}
        self.train_samples, self.in_memory, self._given = train_samples, in_memory, num_classes
        self._source: tuple[dict[str, Any], Path | None] | None = None
        self._code: LabelCode | None = None
        self._decoder: Decoder | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes K; reads the training labels if ``setup`` has not."""
        return self._given or self._labels().count

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers; empty if the data set has none."""
        return self._labels().names

    def prepare_data(self) -> None:
        """Fetch the data set once per machine, and check splits and columns before any process reads."""
        self._table("train")
        self._source = None  # Lightning calls this in one process; each keeps what it reads in setup

    def _table(self, split: Split) -> Any:
        if self._source is None:
            self._source = load_splits("ImageData", self.name, self.path, self.config)
        data = pick_split("ImageData", self._source[0], self.splits[split] or str(self.splits["train"]), f"{split}_split")
        check_columns("ImageData", data, image_column=self.image_column, label_column=self.label_column)
        return data

    def _labels(self) -> LabelCode:
        if self._code is None:
            data = self._table("train")
            names, values = class_names(data.features[self.label_column]), list(data[self.label_column])
            self._code = LabelCode.learn("ImageData", self.label_column, values, names, self._given)
            if self._code.kind != "class":
                raise ValueError(
                    f"ImageData(label_column={self.label_column!r}): the labels are {type(values[0]).__name__}; an image has "
                    "one class, an int or a str."
                )
        return self._code

    def read(self, split: Split) -> TensorRows | LazyImages | None:
        """Read a split: choose the rows, encode the labels, decode the images."""
        import datasets

        code, data = self._labels(), self._table(split)
        rows = torch.arange(len(data))
        if self.splits[split] is None or split == "train":
            rows = parts(len(data), self.seed, self.val_fraction, self.test_fraction)[split]
        if split == "train":
            rows = limited(rows, self.train_samples, self.seed)
        if not len(rows):
            return None
        used = self.splits[split] or str(self.splits["train"])
        labels = code.encode("ImageData", self.label_column, list(data[self.label_column]), used)[rows]
        raw = data.select_columns([self.image_column])
        if is_encoded(data.features[self.image_column]):
            raw = raw.cast_column(self.image_column, datasets.Image(decode=False))
        if self._decoder is None:
            folder = self._source[1] if self._source else None
            self._decoder = Decoder(self.mode, self.image_size, folder)
        lazy = LazyImages(raw, self.image_column, rows, labels, self._decoder, used)
        if not self.in_memory:
            return lazy
        first = lazy[0]["pixel_values"]
        images = first.new_empty((len(rows), *first.shape))
        for start in range(0, len(rows), 1000):  # encoded bytes of 1,000 images at a time
            block = range(start, min(start + 1000, len(rows)))
            images[block.start : block.stop] = lazy.__getitems__(block)["pixel_values"]
        return TensorRows(pixel_values=images, labels=labels)

    def collate(self, split: Split) -> Callable[[Any], Any]:
        """Items come as a batch."""
        return as_it_is

    def augmented(self, split: Split) -> Callable[[Any, Tensor], Any]:
        """Augment the training images, normalise all."""
        height, width = self.dataset(split)[0]["pixel_values"].shape[-2:]
        return ToPixels(augmentation(self.augment, height, width) if split == "train" else None, self.mean, self.std)

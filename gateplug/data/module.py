"""What the data modules share: splits by seed, loaders that resume exactly, checked arguments."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from gateplug.data.loader import ExactLoader, exact_loader
from gateplug.data.randomness import permutation

Split = Literal["train", "val", "test"]
_SPLIT, _LIMIT = 0x5B, 0x11  # keep the random numbers of split and limit apart from other uses of the seed
_STAGES: dict[str | None, tuple[Split, ...]] = {
    None: ("train", "val", "test"),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


class ExactDataModule(L.LightningDataModule):
    """Base of gateplug's data modules: three splits, and loaders that resume within an epoch.

    A subclass reads one split in :meth:`read`. What is read is kept, so ``setup`` may be called any number of times.

    Args:
        batch_size: Samples per process and step, ≥ 1.
        seed: Of split, order and augmentation.
        num_workers: Processes that read, ≥ 0.
        val_fraction: Share of the training samples that becomes the validation set, in [0, 1).
        test_fraction: Share of them that becomes the test set, in [0, 1).

    Raises:
        ValueError: For an argument outside its range.
    """

    def __init__(
        self, batch_size: int, seed: int, num_workers: int, val_fraction: float = 0.0, test_fraction: float = 0.0
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if batch_size < 1:
            raise ValueError(f"{name}(batch_size={batch_size}): it must be at least 1.")
        if num_workers < 0:
            raise ValueError(f"{name}(num_workers={num_workers}): it must be 0 or more.")
        if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"{name}(val_fraction={val_fraction}, test_fraction={test_fraction}): each must lie in [0, 1), and their "
                "sum below 1, so that samples are left to train on."
            )
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._sets: dict[Split, Any] = {}

    @abstractmethod
    def read(self, split: Split) -> Any:
        """Read a split: a map-style data set, or None where there is none."""

    def collate(self, split: Split) -> Callable[[Any], Any] | None:
        """What makes a batch of a split's items; None where items come as a batch."""
        return None

    def augmented(self, split: Split) -> Callable[[Any, Tensor], Any] | None:
        """The change of a batch by its samples' keys; None for none."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that the stage (``fit``, ``validate``, ``test``, ``predict`` or None for all) needs."""
        for split in _STAGES[stage]:
            self.find(split)

    def find(self, split: Split) -> Any:
        """The data set of a split, read if it was not yet, or None if there is no such split."""
        if split not in self._sets:
            self._sets[split] = self.read(split)
        return self._sets[split]

    def dataset(self, split: Split) -> Any:
        """The data set of a split, read if it was not yet.

        Raises:
            ValueError: If there is no such split.
        """
        found = self.find(split)
        if found is None:
            raise ValueError(
                f"{type(self).__name__} has no {split} set: name its split with {split}_split, or set {split}_fraction to "
                "take a share of the training samples."
            )
        return found

    def _loader(self, split: Split) -> ExactLoader:
        return exact_loader(
            self.dataset(split),
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=self.collate(split) or as_it_is,
            augment=self.augmented(split),
            reseed=False,  # nothing here draws from a global generator
            persistent_workers=True,
        )

    def train_dataloader(self) -> ExactLoader:
        """Training batches in an order of (seed, epoch)."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Validation batches in the data set's order; empty if there is no validation set."""
        self.setup("validate")
        return [] if self.find("val") is None else self._loader("val")

    def test_dataloader(self) -> ExactLoader:
        """Test batches in the data set's order."""
        return self._loader("test")

    def predict_dataloader(self) -> ExactLoader:
        """The test batches."""
        return self._loader("test")


def as_it_is(batch: Any) -> Any:
    """Collate what is a batch already."""
    return batch


def parts(n: int, seed: int, val_fraction: float, test_fraction: float) -> dict[Split, Tensor]:
    """Cut n samples into train, val and test at random, by seed.

    Args:
        n: Number of samples.
        seed: The cut is a function of (n, seed, fractions).
        val_fraction: In [0, 1); at least one sample where it is above 0.
        test_fraction: The same.

    Returns:
        Row numbers of each part, ascending: int64 ``(size,)``.

    Raises:
        ValueError: If no sample is left to train on.
    """
    return cut(permutation(n, seed, _SPLIT), val_fraction, test_fraction)


def cut(order: Tensor, val_fraction: float, test_fraction: float) -> dict[Split, Tensor]:
    """Cut rows into test, val and train, in this order.

    Args:
        order: Row numbers, those to test on first: int64 ``(n,)``.
        val_fraction: As in :func:`parts`.
        test_fraction: As in :func:`parts`.

    Returns:
        Row numbers of each part, ascending: int64 ``(size,)``.

    Raises:
        ValueError: If no sample is left to train on.
    """
    n = len(order)
    test, val = (max(1, round(n * f)) if f > 0 else 0 for f in (test_fraction, val_fraction))
    if n - test - val < 1:
        raise ValueError(f"Of {n} samples, val_fraction={val_fraction} and test_fraction={test_fraction} leave none to train on.")
    pieces: dict[Split, Tensor] = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
    return {split: rows.sort()[0] for split, rows in pieces.items()}


def limited(rows: Tensor, limit: int | None, seed: int) -> Tensor:
    """At most ``limit`` of the rows, drawn by seed, ascending; a smaller limit draws a part of a larger one's rows."""
    if limit is None or limit >= len(rows):
        return rows
    return rows[permutation(len(rows), seed, _LIMIT)[:limit]].sort()[0]


def check_limits(owner: str, **limits: int | None) -> None:
    """Raise for a count below 1."""
    for what, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{owner}({what}={value}): it must be at least 1, or None.")


class TensorRows(torch.utils.data.Dataset[Any]):
    """Tensors of equal length that are read a batch at a time.

    Worker processes share them: a forked worker sees the same memory, and to a spawned one torch passes tensors through
    shared memory.

    Args:
        columns: Name to tensor ``(samples, …)``.
    """

    collate_fn = staticmethod(as_it_is)

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.tensor(indices)
        return {name: column[rows] for name, column in self.columns.items()}


class TaskRows(TensorRows):
    """Tensors that are read a batch at a time, with a label for each of several tasks.

    Args:
        labels: Task to tensor ``(samples, …)``; a batch has them as a dict under ``labels``.
        columns: Name to tensor ``(samples, …)``, the inputs.
    """

    def __init__(self, labels: Mapping[str, Tensor], **columns: Tensor) -> None:
        super().__init__(**columns)
        self.labels = TensorRows(**labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        return {**super().__getitems__(indices), "labels": self.labels.__getitems__(indices)}

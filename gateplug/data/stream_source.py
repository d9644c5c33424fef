"""Where a stream's batches come from: somebody's data loader, as one that can be placed at any batch of any pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from gateplug.data.imagebatch import ToPixels
from gateplug.data.loader import ExactLoader, KeyedCollate, KeyedDataset
from gateplug.data.module import ExactDataModule, Split
from gateplug.data.order import EpochSampler


class GroupSampler(EpochSampler):
    """The order of some rows of a data set, which rows being changed between two iterations.

    Args:
        groups: Row numbers of each group: int64 ``(size,)`` each, sizes ≥ 0.
        like: All else is its.
    """

    def __init__(self, groups: Sequence[Tensor], like: EpochSampler) -> None:
        super().__init__(like.samples, like.batch_size, like.shuffle, like.seed, like.drop_last, training=like.training)
        self._place, self.groups = like._place, groups
        self.select(0)

    def select(self, group: int) -> None:
        """From the next iteration on it is this group."""
        self.rows = self.groups[group]
        self.samples = len(self.rows)

    def order(self, epoch: int) -> Tensor:
        """The group's rows in the order of an epoch."""
        return self.rows[super().order(epoch)]


class Source:
    """The batches of one data module, of which a task may have some rows alone.

    Args:
        loader: Made by :func:`exact`.
        owner: Class of the data module, for errors.
    """

    def __init__(self, loader: ExactLoader, owner: str) -> None:
        assert isinstance(loader.sampler, EpochSampler)
        self.loader, self.owner, self.sampler = loader, owner, loader.sampler
        self._lengths: dict[tuple[int, int], int] = {}

    def length(self, task: int) -> int:
        """Batches of a pass over a task, on each process."""
        key = (task if isinstance(self.sampler, GroupSampler) else 0, self.sampler.place[1])
        if key not in self._lengths:
            sampler = copy.copy(self.sampler)  # an iteration may be under way
            if isinstance(sampler, GroupSampler):
                sampler.select(task)
            share, size = len(sampler) if sampler.samples else 0, sampler.batch_size
            self._lengths[key] = share // size if sampler.drop_last else -(-share // size)
        return self._lengths[key]

    def batches(self, task: int, epoch: int, first: int = 0) -> Iterator[Any]:
        """The batches of one pass over a task, from number ``first`` on; one iteration at a time."""
        if first >= self.length(task):
            return
        sampler = self.sampler
        if isinstance(sampler, GroupSampler):
            sampler.select(task)
        sampler.set_epoch(epoch)
        place = {"epoch": sampler.epoch, "position": first * sampler.step, "seed": sampler.seed, "samples": sampler.samples}
        self.loader.load_state_dict(place)
        yield from self.loader

    def close(self) -> None:
        """Give up worker processes."""
        if (iterator := getattr(self.loader, "_iterator", None)) is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None


def loader_of(module: LightningDataModule, split: Split) -> Any:
    """What a data module, which is set up, gives for a split; None where it has no such split."""
    if isinstance(module, ExactDataModule):
        there = module.find(split) is not None
    else:
        there = is_overridden(f"{split}_dataloader", module, LightningDataModule)
    made = getattr(module, f"{split}_dataloader")() if there else []
    return None if split != "train" and isinstance(made, list | tuple) and not made else made


def exact(loader: Any, owner: str, seed: int, training: bool) -> ExactLoader:
    """A loader that can be placed at any batch, of a data module's loader.

    Args:
        loader: An ExactLoader, which is taken as it is, or a DataLoader over a map-style data set.
        owner: Class of the data module, for errors.
        seed: Of the order of a DataLoader that shuffles.
        training: Whether it is for training; else the data set's own order is kept.

    Raises:
        TypeError: For anything else; says what and what to do.
    """
    if isinstance(loader, list | tuple) and len(loader) == 1:
        loader = loader[0]
    if isinstance(loader, ExactLoader) and isinstance(loader.sampler, EpochSampler):
        return loader
    if reason := _refused(loader):
        raise TypeError(
            f"{owner}'s loader {reason}, so it cannot be placed at a batch of its own when a run is resumed. Make it with "
            "gp.exact_loader(dataset, batch_size), or as a DataLoader over a map-style data set with just batch_size and shuffle."
        )
    shuffle = training and isinstance(loader.sampler, RandomSampler)
    sampler = EpochSampler(len(loader.dataset), loader.batch_size, shuffle, seed, loader.drop_last, training=training)
    return rebuilt(loader, KeyedDataset(loader.dataset, seed), sampler, KeyedCollate(loader.collate_fn, seed, None, True))


def _refused(loader: Any) -> str:  # noqa: PLR0911  # a reason each
    """Why a loader cannot be used; nothing where it can."""
    if not isinstance(loader, DataLoader):
        return f"is a {type(loader).__name__}"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"is a {type(loader).__name__}, which iterates in a way of its own"
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return f"reads an iterable-style data set ({type(loader.dataset).__name__})"
    if loader.batch_size is None:
        return "has a batch_sampler of its own, or makes no batches"
    sampler = loader.sampler
    if type(sampler) is RandomSampler and (sampler.replacement or sampler.num_samples != len(loader.dataset)):
        return "draws with replacement, or not every sample once"
    if type(sampler) not in (RandomSampler, SequentialSampler):
        return f"has a sampler of its own ({type(sampler).__name__})"
    return "" if len(loader.dataset) else "has an empty data set"


def rebuilt(like: DataLoader[Any], dataset: Any, sampler: EpochSampler, collate: Any, persistent: bool = True) -> ExactLoader:
    """A loader with another order or another way to make batches; worker processes and memory as in ``like``."""
    workers: dict[str, Any] = {}
    if like.num_workers:
        workers = {"prefetch_factor": like.prefetch_factor, "persistent_workers": like.persistent_workers and persistent}
    return ExactLoader(
        dataset,
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=like.num_workers,
        collate_fn=collate,
        drop_last=like.drop_last,
        pin_memory=like.pin_memory,
        timeout=like.timeout,
        worker_init_fn=like.worker_init_fn,
        multiprocessing_context=like.multiprocessing_context,
        generator=torch.Generator(),
        **workers,
    )


def grouped(loader: ExactLoader, groups: Sequence[Tensor]) -> ExactLoader:
    """The loader for one of several groups of rows at a time."""
    assert isinstance(loader.sampler, EpochSampler)
    return rebuilt(loader, loader.dataset, GroupSampler(groups, loader.sampler), loader.collate_fn)


def measuring(loader: ExactLoader) -> ExactLoader:
    """A loader of its own over the same samples in the same orders, without the augmentation of gateplug's image modules."""
    collate = loader.collate_fn
    assert isinstance(loader.sampler, EpochSampler)
    if isinstance(collate, KeyedCollate) and isinstance(collate.augment, ToPixels):
        plain = ToPixels(None, collate.augment.mean, collate.augment.std)
        collate = KeyedCollate(collate.collate, collate.seed, plain, collate.reseed)
    # a copy, because the training may be in the middle of the loader's own
    return rebuilt(loader, loader.dataset, copy.copy(loader.sampler), collate, persistent=False)

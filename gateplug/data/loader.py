"""A data loader that resumes within an epoch, exactly, for any map-style data set."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import default_collate

from gateplug.core.resume import step_seed
from gateplug.data.order import EpochSampler
from gateplug.data.randomness import sample_keys

_SAMPLE = 0x5A  # keeps the samples' random numbers apart from other uses of the same seed


class ExactLoader(DataLoader[Any]):
    """A ``DataLoader`` over an :class:`~gateplug.data.EpochSampler` whose state is (epoch, samples delivered).

    As the sampler's order is a function of (seed, epoch), nothing else has to be saved: no generator, no state of a
    worker. The state counts what was *delivered*, so batches that workers have read ahead are read again. It does not
    depend on the number of workers, and it stays after ``fit`` has returned. Made by :func:`exact_loader`.
    """

    _resume: tuple[int, int] | None = None
    _position: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over the rest of the resumed epoch, or over a whole one.

        It is a generator, so nothing happens before the first batch is asked for: Lightning makes the iterator before it
        has said ``set_epoch``, and workers would start to read the wrong epoch.
        """
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Lightning rebuilds a loader for predict and for overfit_batches
            yield from super().__iter__()
            return
        epoch, position = sampler.begin(self._resume)
        self._resume, self._position = None, (epoch, position)
        if self.generator is not None:  # the base seed of the workers; the global generator is not drawn from
            self.generator.manual_seed(step_seed(sampler.seed, epoch))
        for batch in super().__iter__():
            position = min(position + sampler.step, sampler.samples)
            self._position = (epoch, position)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, samples delivered in it over all processes, and what the order depends on."""
        sampler = self.sampler
        assert isinstance(sampler, EpochSampler)
        epoch, position = self._resume or self._position or (sampler.epoch, 0)
        return {"epoch": epoch, "position": position, "seed": sampler.seed, "samples": sampler.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Remember where to continue; the next iteration does.

        Raises:
            ValueError: If the state is another loader's.
        """
        if not {"epoch", "position", "seed", "samples"} <= state.keys():
            raise ValueError(
                f"The checkpoint's loader state has {sorted(state)} and was not written by gateplug.exact_loader: "
                "resume with the loader that wrote it, or load the weights alone."
            )
        sampler = self.sampler
        assert isinstance(sampler, EpochSampler)
        for what, now in (("seed", sampler.seed), ("samples", sampler.samples)):
            if state[what] != now:
                rank_zero_warn(
                    f"The checkpoint's data order has {what}={state[what]}, this loader's has {what}={now}: the order is "
                    "another one, so in the rest of this epoch some samples come twice and some not at all."
                )
        self._resume = (int(state["epoch"]), int(state["position"]))


class KeyedDataset(Dataset[Any]):
    """Hands a batch's items together with their (epoch, index), which the collate function needs.

    Args:
        dataset: A map-style data set, with ``__getitems__`` if it reads a batch at once.
        seed: Seed of the global generators around each item, or None to leave them alone.
    """

    def __init__(self, dataset: Any, seed: int | None) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with seeded(self.seed, getattr(index, "epoch", 0), index):
            return self.dataset[int(index)]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, list[int], list[int]]:
        """(items, epochs, indices) of a batch."""
        plain, epochs = [int(i) for i in indices], [int(getattr(i, "epoch", 0)) for i in indices]
        if callable(getattr(self.dataset, "__getitems__", None)):
            with seeded(self.seed, epochs[0], plain[0]):
                return self.dataset.__getitems__(plain), epochs, plain
        return [self[index] for index in indices], epochs, plain


class KeyedCollate:
    """Collates the items of a :class:`KeyedDataset` and augments the batch with the keys of its samples.

    Args:
        collate: Items to batch.
        seed: Any integer.
        augment: ``(batch, keys) -> batch``, keys int64 ``(batch,)`` from (seed, epoch, index); or None.
        reseed: Whether the global generators are set for ``collate`` too.
    """

    def __init__(
        self, collate: Callable[[Any], Any], seed: int, augment: Callable[[Any, Tensor], Any] | None, reseed: bool
    ) -> None:
        self.collate, self.seed, self.augment, self.reseed = collate, seed, augment, reseed

    def __call__(self, fetched: Any) -> Any:
        """Collate what :meth:`KeyedDataset.__getitems__` returned, then augment."""
        items, epochs, indices = fetched
        with seeded(self.seed if self.reseed else None, epochs[0], indices[0], 1):
            batch = self.collate(items)
        return batch if self.augment is None else self.augment(batch, sample_keys(self.seed, epochs, indices))


@contextlib.contextmanager
def seeded(seed: int | None, *numbers: int) -> Iterator[None]:
    """Global generators set by a hash while the block runs, and put back after it unless in a worker process."""
    if seed is None:
        yield
        return
    import numpy as np

    outside = None if get_worker_info() else (torch.get_rng_state(), random.getstate(), np.random.get_state())
    # fork_rng would copy every CUDA device's state per item; a data set has no business on a GPU
    torch.default_generator.manual_seed(value := step_seed(seed, _SAMPLE, *numbers))
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    try:
        yield
    finally:
        if outside is not None:
            torch.set_rng_state(outside[0])
            random.setstate(outside[1])
            np.random.set_state(outside[2])


def exact_loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    collate_fn: Callable[[Any], Any] | None = None,
    augment: Callable[[Any, Tensor], Any] | None = None,
    drop_last: bool = False,
    reseed: bool = True,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    training: bool | None = None,
) -> ExactLoader:
    """A loader for your own data set that a Lightning run can be resumed from within an epoch, bit for bit.

    Order and augmentation are functions of (seed, epoch, index), so they depend neither on the number of workers nor on
    what ran before. Under a distributed strategy the loader splits the data itself and Lightning adds no sampler of its
    own: batch k over W processes holds the samples of batch k of one process with batch size W·batch_size (see
    :class:`~gateplug.data.EpochSampler`). Together with :class:`gateplug.ExactResume` the whole run is exact.

    Args:
        dataset: A map-style data set of at least one sample: ``__len__`` and ``__getitem__``.
        batch_size: Samples per process and step, ≥ 1.
        shuffle: A new random order in every epoch. False (validation, test): the data set's own order.
        seed: Any integer.
        num_workers: Processes that read, ≥ 0.
        collate_fn: Items to batch; None: the data set's own `collate_fn` if it has one, else torch's default.
        augment: ``(batch, keys) -> batch`` on the collated batch; ``keys`` int64 ``(batch,)`` are what
            :func:`gateplug.data.uniform` makes random numbers from.
        drop_last: Leave out the last batch if it is not full.
        reseed: Set torch's CPU generator, ``random`` and NumPy's global one before each item from (seed, epoch, index),
            so that random transforms inside the data set are resumed exactly as well. Costs about 0.1 ms an item without
            workers; turn it off for a data set that draws nothing.
        persistent_workers: Keep the workers from epoch to epoch.
        pin_memory: As in ``torch.utils.data.DataLoader``.
        training: False (evaluation): random numbers are those of epoch 0 each time, and where the processes cannot share
            the samples evenly none comes twice if that can be helped. None: as ``shuffle``.

    Raises:
        TypeError: For an iterable-style data set, which has no order to choose.
        ValueError: For an empty data set, ``batch_size`` < 1 or ``num_workers`` < 0.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"exact_loader needs a map-style data set (__len__ and __getitem__), {type(dataset).__name__} is not one. For "
            "a stream, torchdata's StatefulDataLoader keeps the position if the data set has a state_dict of its own."
        )
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers}: it must be 0 or more.")
    return ExactLoader(
        KeyedDataset(dataset, seed if reseed else None),
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), batch_size, shuffle, seed, drop_last, training=training),
        num_workers=num_workers,
        collate_fn=KeyedCollate(collate_fn or getattr(dataset, "collate_fn", None) or default_collate, seed, augment, reseed),
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers and num_workers > 0,
        generator=torch.Generator(),
    )

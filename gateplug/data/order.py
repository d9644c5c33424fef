"""The order of the samples as a function of (seed, epoch), and each process's share of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data.distributed import DistributedSampler

from gateplug.data.randomness import permutation

_ORDER = 0x0DE5  # keeps the order's random numbers apart from other uses of the same seed


class EpochIndex(int):
    """An index that knows its epoch, so that it reaches a worker process together with it.

    It is an ``int`` wherever one is expected. The epoch cannot be told to the data set instead: persistent workers hold
    a copy of it that was made in epoch 0, and workers that read ahead are already in the next epoch.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int = 0) -> EpochIndex:
        """Join the two; pickle calls this with the index alone and then sets the epoch."""
        self = super().__new__(cls, index)
        self.epoch = epoch
        return self


class EpochSampler(DistributedSampler[Any]):
    """Samples in an order that depends on (seed, epoch) alone, split among the processes of a distributed run.

    With W processes, process r takes every W-th sample of the one order, beginning at its r-th. Batch k of B samples in
    each process then holds, over all processes, what batch k of one process with batch size W·B holds.

    Where W does not divide the number of samples n, all processes still make the same number of steps, else they would
    wait for each other for ever:

    - training: the order is filled up with its own first samples, at most W-1 of them, or with
      ``drop_last`` cut. With drop_last, or where W divides n, W processes see exactly what one process sees.
    - evaluation: shares differ by one sample and no sample comes twice, unless some process would
      have no sample for the last step; then up to W-1 samples come twice (:attr:`repeated` says how many).

    It is a ``DistributedSampler`` so that Lightning does not put one of its own around it. Rank and world size are read
    when an iteration begins, because a loader may be made before the process group.

    Args:
        samples: Number of samples n, ≥ 1.
        batch_size: Samples per process and step B, ≥ 1.
        shuffle: Whether the order is random; else 0 … n-1 in every epoch.
        seed: Any integer.
        drop_last: Whether the last, incomplete global batch is left out.
        rank: Number of this process; None: that of ``torch.distributed``. Pass both where the processes that share the
            data are not all processes (tensor parallelism).
        world_size: Number of processes W.
        training: False (evaluation): the epoch stays 0 whatever ``set_epoch`` says, so that what is random in an
            evaluation is the same each time. None: as ``shuffle``.

    Raises:
        ValueError: For n < 1, B < 1, or a rank that is not in [0, world_size).
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        training: bool | None = None,
    ) -> None:
        if samples < 1:
            raise ValueError(f"The data set is empty ({samples} samples): there is nothing to make an order of.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1.")
        if (rank is None) != (world_size is None) or not 0 <= (rank or 0) < (world_size or 1):
            raise ValueError(f"rank={rank}, world_size={world_size}: give both, with 0 <= rank < world_size, or neither.")
        super().__init__(range(samples), num_replicas=1, rank=0, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
        self.samples, self.batch_size = samples, batch_size
        self.training = shuffle if training is None else training
        self._place = None if rank is None else (rank, int(world_size or 1))
        self._start: tuple[int, int] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world size) of this process."""
        if self._place is not None:
            return self._place
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    @property
    def step(self) -> int:
        """Samples that all processes together take in one step."""
        return self.batch_size * self.place[1]

    @property
    def repeated(self) -> int:
        """How many samples come twice in an epoch, over all processes."""
        world = self.place[1]
        if self.drop_last:
            return 0
        # In evaluation only where the shorter shares would end a step before the longer ones.
        needed = self.training or (self.samples // world) % self.batch_size == 0
        return -self.samples % world if needed else 0

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that the next iteration is; Lightning calls this, in a loop of your own you do."""
        self.epoch = epoch if self.training else 0

    def order(self, epoch: int) -> torch.Tensor:
        """The order of all samples in an epoch, before it is shared out: int64 ``(n,)``."""
        if not self.shuffle:
            return torch.arange(self.samples)
        return permutation(self.samples, self.seed, _ORDER, epoch)

    def begin(self, resume: tuple[int, int] | None = None) -> tuple[int, int]:
        """Settle where the next iteration starts.

        Args:
            resume: (epoch, samples taken by all processes together) of a checkpoint, or None.

        Returns:
            (epoch, position): the resumed one; the following epoch's start if nothing is left of it; or the start of the
            epoch that ``set_epoch`` named, if there is nothing to resume or that epoch is a later one (a run with
            ``limit_train_batches`` leaves an epoch before its end).
        """
        start = (self.epoch, 0)
        if resume is not None and self.epoch <= resume[0]:
            least = self.step if self.drop_last else 1
            start = resume if resume[1] + least <= self.samples else (resume[0] + 1, 0)
        self._start = start
        return start

    def __iter__(self) -> Iterator[EpochIndex]:
        """Yield this process's indices from where :meth:`begin` said, or the epoch's start."""
        epoch, position = self._start or (self.epoch, 0)
        self._start = None
        rank, world = self.place
        order = self.order(epoch)
        rest = order[position:]
        if self.drop_last:
            rest = rest[: len(rest) // world * world]
        elif self.repeated:
            fill = order.repeat(-(-world // len(order)))[: -len(rest) % world]  # n may be smaller than W
            rest = torch.cat([rest, fill])
        for index in rest[rank::world].tolist():
            yield EpochIndex(index, epoch)

    def __len__(self) -> int:
        """Samples of this process in a whole epoch, also where an iteration starts within one."""
        rank, world = self.place
        if self.drop_last:
            return self.samples // world
        return (self.samples + self.repeated - rank + world - 1) // world

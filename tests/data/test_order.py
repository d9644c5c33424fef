"""The order of the samples: a function of (seed, epoch), shared out among processes."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from gateplug.data import EpochIndex, EpochSampler, exact_loader

sizes = {"n": st.integers(1, 60), "batch": st.integers(1, 9), "world": st.integers(1, 5), "seed": st.integers(0, 99)}


def shares(n, batch, world, **kwargs):
    return [EpochSampler(n, batch, rank=r, world_size=world, **kwargs) for r in range(world)]


def steps(sampler, drop_last=False):
    return [list(map(int, b)) for b in torch.utils.data.BatchSampler(sampler, sampler.batch_size, drop_last)]


@given(**sizes, epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(n, batch, world, seed, epoch):
    sampler = EpochSampler(n, batch, seed=seed)
    sampler.set_epoch(epoch)
    first = list(sampler)
    torch.rand(3)
    assert sorted(first) == list(range(n))
    other = EpochSampler(n, batch + 1, seed=seed)
    other.set_epoch(epoch)
    assert list(other) == list(sampler) == first


def test_epochs_and_seeds_give_different_orders():
    orders = set()
    for seed in range(3):
        sampler = EpochSampler(50, 4, seed=seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 12


@given(**sizes, kind=st.sampled_from(["train", "drop", "eval"]))
def test_all_processes_make_the_same_number_of_steps(n, batch, world, seed, kind):
    parts = shares(n, batch, world, seed=seed, shuffle=kind != "eval", drop_last=kind == "drop")
    assert len({len(steps(p, kind == "drop")) for p in parts}) == 1
    assert all(len(p) == len(list(p)) for p in parts)


@given(**sizes, drop_last=st.booleans())
def test_a_global_batch_holds_the_samples_of_one_process_with_the_whole_batch(n, batch, world, seed, drop_last):
    n = n * world if not drop_last else n  # else the last step is filled up
    one = steps(EpochSampler(n, batch * world, seed=seed, drop_last=drop_last), drop_last)
    many = [steps(p, drop_last) for p in shares(n, batch, world, seed=seed, drop_last=drop_last)]
    assert len({len(m) for m in many}) == 1
    assert [sorted(i for part in together for i in part) for together in zip(*many, strict=True)] == [sorted(b) for b in one]


@given(**sizes)
def test_evaluation_sees_every_sample_and_repeats_only_what_repeated_says(n, batch, world, seed):
    parts = shares(n, batch, world, shuffle=False)
    seen = sorted(i for p in parts for i in p)
    assert set(seen) == set(range(n))
    assert len(seen) - n == parts[0].repeated < world
    # enough samples for every process in the last step: none comes twice
    if n % (batch * world) >= world or n % (batch * world) == 0:
        assert parts[0].repeated == 0


@settings(max_examples=50)
@given(**sizes, epoch=st.integers(0, 3), done=st.integers(0, 8), drop_last=st.booleans())
def test_resuming_continues_where_it_stopped(n, batch, world, seed, epoch, done, drop_last):
    for sampler in shares(n, batch, world, seed=seed, drop_last=drop_last):
        sampler.set_epoch(epoch)
        whole = steps(sampler, drop_last)
        position = min(done * sampler.step, n)
        fresh = EpochSampler(n, batch, seed=seed, drop_last=drop_last, rank=sampler.place[0], world_size=world)
        start = fresh.begin((epoch, position))
        if done < len(whole):
            assert steps(fresh, drop_last) == whole[done:]
            assert start == (epoch, position)
        else:
            assert start == (epoch + 1, 0)  # nothing is left of the epoch, whatever set_epoch said


def test_a_later_epoch_wins_over_the_resumed_one():
    sampler = EpochSampler(10, 2)
    sampler.set_epoch(3)
    assert sampler.begin((2, 4)) == (3, 0)


def test_an_index_is_an_integer_that_takes_its_epoch_along():
    index = pickle.loads(pickle.dumps(EpochIndex(7, 3)))
    assert (index, index.epoch) == (7, 3)
    assert torch.arange(10)[index] == 7
    assert "abcdefgh"[index] == "h"


def test_lightning_takes_it_for_a_distributed_sampler():
    assert isinstance(exact_loader(range(5), 2).sampler, DistributedSampler)


@pytest.mark.parametrize("kwargs", [{"samples": 0, "batch_size": 1}, {"samples": 1, "batch_size": 0}])
def test_nothing_to_order_is_refused(kwargs):
    with pytest.raises(ValueError, match=r"empty|at least 1"):
        EpochSampler(**kwargs)


@pytest.mark.parametrize("place", [(0, None), (2, 2), (-1, 2)])
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(ValueError, match="rank="):
        EpochSampler(4, 1, rank=place[0], world_size=place[1])


class Noisy(Dataset):
    """A user's data set that draws from all global generators."""

    def __len__(self):
        return 14

    def __getitem__(self, index):
        import random

        import numpy as np

        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()], dtype=torch.float64)


def batches(loader, epochs=(0, 1)):
    out = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        out.append(list(loader))
    return out


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("persistent", [False, True])
def test_random_numbers_of_a_users_data_set_do_not_depend_on_workers(persistent):
    alone = batches(exact_loader(Noisy(), 4, seed=3))
    many = batches(exact_loader(Noisy(), 4, seed=3, num_workers=2, persistent_workers=persistent))
    assert all(equal(a, b) for a, b in zip(alone, many, strict=True))
    assert not equal(*alone)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(exact_loader(Noisy(), 4))
    list(exact_loader(Noisy(), 4, num_workers=2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (0, 2), (2, 0)])
@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_loader_continues_after_what_was_delivered(workers, done):
    before, after = (exact_loader(Noisy(), 4, seed=1, num_workers=w) for w in workers)
    whole = batches(exact_loader(Noisy(), 4, seed=1), (2, 3))
    before.sampler.set_epoch(2)
    iterator = iter(before)
    for _ in range(done):
        next(iterator)
    state = before.state_dict()
    assert state == {"epoch": 2, "position": min(4 * done, 14), "seed": 1, "samples": 14}
    after.load_state_dict(state)
    assert after.state_dict() == state  # a checkpoint may be written before the first batch
    iter(after)  # Lightning makes iterators that it does not use
    assert equal(list(after), whole[0][done:] if done < 4 else whole[1])


def test_evaluation_is_the_same_in_every_epoch():
    loader = exact_loader(Noisy(), 4, shuffle=False)
    assert equal(*batches(loader))


def test_a_state_of_another_order_is_reported():
    loader = exact_loader(range(5), 2, seed=1)
    with pytest.warns(UserWarning, match="seed=0, this loader's has seed=1"):
        loader.load_state_dict(exact_loader(range(5), 2, seed=0).state_dict())
    with pytest.warns(UserWarning, match="samples=6, this loader's has samples=5"):
        loader.load_state_dict(exact_loader(range(6), 2, seed=1).state_dict())
    with pytest.raises(ValueError, match=r"not written by gateplug\.exact_loader"):
        loader.load_state_dict({"_num_yielded": 3})


def test_a_loader_of_a_stream_is_refused():
    with pytest.raises(TypeError, match="map-style"):
        exact_loader(iter([1]), 2)
    with pytest.raises(ValueError, match="num_workers=-1"):
        exact_loader([1], 2, num_workers=-1)
    with pytest.raises(ValueError, match="empty"):
        exact_loader([], 2)


def test_it_is_a_data_loader_of_the_right_length():
    loader = exact_loader(range(14), 4, drop_last=True)
    assert isinstance(loader, DataLoader)
    assert len(loader) == len(list(loader)) == 3

"""Random numbers and augmentation: functions of (seed, epoch, index), whatever the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateplug.core.resume import step_seed
from gateplug.data import Compose, Cutout, Digits, RandomAffine, RandomCrop, RandomFlip, sample_keys, uniform
from gateplug.data.augment import augmentation

ALL = [RandomCrop(2), RandomFlip(), Cutout(3), RandomAffine(20, 0.2, 0.2), Compose([RandomFlip(), RandomAffine(), Cutout(2)])]
integers = st.integers(-(2**63), 2**63 - 1)


@given(integers, integers, st.lists(integers, min_size=1, max_size=5))
def test_keys_are_step_seeds(seed, epoch, indices):
    assert sample_keys(seed, [epoch] * len(indices), indices).tolist() == [step_seed(seed, epoch, i) for i in indices]


def test_uniform_numbers_are_uniform_and_independent():
    draws = uniform(sample_keys(0, [0] * 5000, range(5000)), 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    # 5 standard errors of a mean of 5,000 uniform numbers: 5·0.289/√5000 = 0.020
    assert torch.allclose(draws.mean(0), torch.tensor(0.5), atol=0.02)
    assert torch.allclose(draws.var(0), torch.tensor(1 / 12), atol=0.01)
    off_diagonal = torch.corrcoef(draws.T) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / 5000**0.5
    assert torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1].abs() < 5 / 5000**0.5


def test_more_draws_do_not_change_the_first_ones_and_streams_differ():
    keys = sample_keys(1, [2, 2], [3, 4])
    assert torch.equal(uniform(keys, 3), uniform(keys, 9)[:, :3])
    assert not torch.equal(uniform(keys, 3, stream=1), uniform(keys, 3, stream=2))


def images(n=12, side=8):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("augment", ALL, ids=lambda a: type(a).__name__)
def test_a_sample_is_changed_the_same_in_any_batch(augment):
    x, keys = images(), sample_keys(0, [1] * 12, range(12))
    whole = augment(x, keys)
    alone = torch.cat([augment(x[i : i + 1], keys[i : i + 1]) for i in range(12)])
    assert torch.equal(whole, alone)
    assert torch.equal(augment(x.flip(0), keys.flip(0)), whole.flip(0))
    assert whole.shape == x.shape


@pytest.mark.parametrize("augment", ALL, ids=lambda a: type(a).__name__)
def test_epochs_differ_and_the_global_generator_is_left_alone(augment):
    x = images()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (augment(x, sample_keys(0, [epoch] * 12, range(12))) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_crop_is_a_shift_with_zeros():
    x = images(200, 5)
    keys = sample_keys(0, [0] * 200, range(200))
    padded = torch.nn.functional.pad(x, [1] * 4)
    seen = set()
    for image, frame in zip(RandomCrop(1)(x, keys), padded, strict=True):
        places = [(i, j) for i in range(3) for j in range(3) if torch.equal(image, frame[:, i : i + 5, j : j + 5])]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


def test_flip_mirrors_about_its_share():
    x, keys = images(400), sample_keys(0, [0] * 400, range(400))
    out = RandomFlip(0.25)(x, keys)
    flipped = torch.tensor([torch.equal(o, i.flip(-1)) for o, i in zip(out, x, strict=True)])
    kept = torch.tensor([torch.equal(o, i) for o, i in zip(out, x, strict=True)])
    assert (flipped ^ kept).all()
    assert 0.25 - 0.11 < flipped.float().mean() < 0.25 + 0.11  # 5 standard errors


def test_cutout_removes_at_most_its_square_and_at_least_a_quarter_of_it():
    x = torch.ones(200, 1, 8, 8)
    gone = (Cutout(4)(x, sample_keys(0, [0] * 200, range(200))) == 0).flatten(1).sum(1)
    assert set(gone.tolist()) <= {a * b for a in (2, 3, 4) for b in (2, 3, 4)}
    assert gone.max() == 16


def test_an_affine_map_of_nothing_is_the_identity():
    x = images()
    same = RandomAffine(0, 0, 0)(x, sample_keys(0, [0] * 12, range(12)))
    assert torch.allclose(same, x, atol=1e-6)  # bilinear weights are rounded


@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_an_affine_map_is_that_of_affine_grid(shape):
    x = torch.rand(5, 2, *shape)
    keys = sample_keys(3, [0] * 5, range(5))
    draw = uniform(keys, 4).double() * 2 - 1
    angle, zoom, shift = draw[:, 0] * torch.pi / 6, 1 + 0.2 * draw[:, 1], 0.4 * draw[:, 2:]
    height, width = shape
    rows = [
        torch.stack([angle.cos() / zoom, -angle.sin() / zoom * height / width, shift[:, 0]], 1),
        torch.stack([angle.sin() / zoom * width / height, angle.cos() / zoom, shift[:, 1]], 1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1).float(), list(x.shape), align_corners=False)
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=False)
    assert torch.allclose(RandomAffine(30, 0.2, 0.2)(x, keys), expected, atol=1e-5)


def epochs(data):
    data.setup("fit")
    loader, out = data.train_dataloader(), []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        out.append(torch.cat([b["pixel_values"] for b in loader]))
    return out


def test_workers_that_stay_alive_know_the_epoch():
    alone, many = (epochs(Digits(augment=["crop", "affine"], num_workers=w, batch_size=256)) for w in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, many, strict=True))


def test_augmentation_does_not_depend_on_the_batch_size():
    sizes = [epochs(Digits(augment="affine", batch_size=b)) for b in (7, 300)]
    assert all(torch.equal(a, b) for a, b in zip(*sizes, strict=True))


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (RandomCrop, {"padding": 0}),
        (RandomFlip, {"probability": 1.5}),
        (Cutout, {"size": 0}),
        (RandomAffine, {"degrees": -1}),
        (RandomAffine, {"scale": 1.0}),
    ],
)
def test_amounts_out_of_range_are_refused(cls, kwargs):
    with pytest.raises(ValueError, match=r"at least 1|must lie|must be >= 0"):
        cls(**kwargs)


def test_names_stand_for_augmentations_of_the_images_size():
    chain = augmentation(["crop", "flip", Cutout(5)], 32, 40)
    assert isinstance(chain, Compose)
    assert [type(s).__name__ for s in chain.steps] == ["RandomCrop", "RandomFlip", "Cutout"]
    assert chain.steps[0].padding == 4
    assert augmentation(None, 8, 8) is None
    with pytest.raises(ValueError, match="the names are affine, crop, cutout, flip"):
        augmentation("mixup", 8, 8)

"""gp.OverlaidImages against a canvas painted pixel by pixel, and what its pairs promise."""

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import nn

from gateplug.data import Digits, EpochSampler, ImageData, OverlaidImages, RandomAffine, TextData
from gateplug.data.overlay import draw_pairs, overlay
from tests.data import test_exact_resume as exact
from tests.data.test_images import _own_cache, grey, parquet, png  # noqa: F401


def overlaid(data=None, **kwargs):
    kwargs = {"train_pairs": 300, "val_pairs": 50, "test_pairs": 70, **kwargs}
    return OverlaidImages(data or Digits(), **kwargs)


def whole(loader):
    batches = list(loader)
    pixels = torch.cat([b["pixel_values"] for b in batches])
    return pixels, *(torch.cat([b["labels"][task] for b in batches]) for task in ("left", "right"))


def painted(left, right, shift):
    """A canvas, one pixel after the other."""
    channels, height, width = left.shape
    canvas = torch.zeros(channels, height + shift, width + shift)
    for c in range(channels):
        for y in range(height + shift):
            for x in range(width + shift):
                here = [left[c, y, x]] if y < height and x < width else []
                here += [right[c, y - shift, x - shift]] if y >= shift and x >= shift else []
                canvas[c, y, x] = max(here, default=0.0)
    return canvas


@pytest.mark.parametrize("shift", [1, 3, 8, 11])
def test_batches_are_what_a_literal_construction_paints(shift):
    """8×8 digits: shift 8 touches at a corner, 11 leaves a gap."""
    data = overlaid(shift=shift, test_pairs=12)
    pixels, left, right = whole(data.test_dataloader())
    images, labels = data.data.dataset("test").columns.values()
    pairs = data.dataset("test").pairs
    assert pixels.shape == (12, 1, 8 + shift, 8 + shift)
    assert pixels.dtype == torch.float32
    assert left.dtype == right.dtype == torch.int64
    for canvas, a, b, (i, j) in zip(pixels, left, right, pairs, strict=True):
        assert torch.equal(canvas, painted(images[i], images[j], shift))
        assert (a, b) == (labels[i], labels[j])


def test_stored_pixels_are_overlaid_before_they_are_normalised(tmp_path):
    images = [grey(10 * i, (28, 28)) for i in range(1, 13)]
    parquet(tmp_path / "set", images, [i % 3 for i in range(12)])
    path = str(parquet(tmp_path / "set", images[:4], [0, 1, 2, 0], "test"))
    data = OverlaidImages(ImageData(path=path, mode="L", mean=[0.5], std=[0.25]), 20, 2, 5)
    data.prepare_data()
    pixels = whole(data.test_dataloader())[0]
    assert pixels.shape == (5, 1, 36, 36)
    value = torch.tensor([[10, 20, 30, 40][i] for i in data.dataset("test").pairs.flatten()]).reshape(5, 2) / 255
    assert torch.allclose(pixels[:, 0, 0, 0], (value[:, 0] - 0.5) / 0.25)
    assert torch.allclose(pixels[:, 0, -1, -1], (value[:, 1] - 0.5) / 0.25)
    both = (value.max(1).values - 0.5) / 0.25
    assert torch.allclose(pixels[:, 0, 8:28, 8:28], both[:, None, None].expand(5, 20, 20))  # the overlap is 20×20
    assert torch.allclose(pixels[:, 0, :8, 28:], torch.tensor(-2.0))  # nothing there: black, normalised
    assert data.dataset("test")[0]["pixel_values"].dtype == torch.uint8
    assert data.num_classes == 3


def test_images_that_are_read_lazily_give_the_same_pairs(tmp_path):
    images = [png(grey(10 * i)) for i in range(1, 13)]
    path = str(parquet(tmp_path / "set", images, [i % 3 for i in range(12)]))
    kwargs = {"path": path, "mode": "L", "test_split": None, "test_fraction": 0.3, "augment": "crop"}
    a, b = (OverlaidImages(ImageData(in_memory=memory, **kwargs), 30, 1, 5) for memory in (True, False))
    for name in ("train_dataloader", "test_dataloader"):
        for x, y in zip(whole(getattr(a, name)()), whole(getattr(b, name)()), strict=True):
            assert torch.equal(x, y)


def test_the_default_numbers_are_those_of_multi_fashion():
    data = OverlaidImages(Digits())
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [60_000, 6_000, 10_000]
    assert data.shift == 8


@given(st.integers(2, 40), st.data())
def test_no_pair_comes_twice_none_is_of_one_image_and_all_images_are_used_alike(n, draw):
    count = draw.draw(st.integers(1, n * (n - 1)))
    pairs = draw_pairs(n, count, 5)
    assert len({tuple(p) for p in pairs.tolist()}) == count
    assert not (pairs[:, 0] == pairs[:, 1]).any()
    for side in pairs.T:
        uses = torch.bincount(side, minlength=n)
        assert uses.max() - uses.min() <= 1
    assert torch.equal(draw_pairs(n, 1 + count // 2, 5), pairs[: 1 + count // 2])


def test_pairs_say_nothing_about_each_others_class():
    """The classes of first and second image are as good as independent: else one task would help to cheat in the other."""
    data = overlaid(train_pairs=5000)
    labels = data.data.dataset("train").columns["labels"][data.dataset("train").pairs]
    table = torch.zeros(10, 10).index_put_((labels[:, 0], labels[:, 1]), torch.tensor(1.0), accumulate=True)
    expected = table.sum(1, keepdim=True) * table.sum(0) / 5000
    # chi-squared with 81 degrees of freedom: 135 is its 99.98 % quantile
    assert ((table - expected) ** 2 / expected).sum() < 135


def test_no_image_is_in_pairs_of_two_splits():
    data = overlaid(train_pairs=3000, val_pairs=400, test_pairs=800)
    seen = {}
    for split in ("train", "val", "test"):
        rows = data.dataset(split)
        used = rows.images.columns["pixel_values"][rows.pairs.flatten().unique()]
        seen[split] = {image.numpy().tobytes() for image in used}
        assert len(seen[split]) == len(data.data.dataset(split))  # with so many pairs, every image
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


def test_pairs_are_a_function_of_the_seed_and_differ_between_splits():
    same, again, other = overlaid(), overlaid(), overlaid(seed=1)
    for split in ("train", "val", "test"):
        assert torch.equal(same.dataset(split).pairs, again.dataset(split).pairs)
        assert not torch.equal(same.dataset(split).pairs, other.dataset(split).pairs)
    half = Digits(val_fraction=0.4, test_fraction=0.4)  # as many images to validate as to test
    data = overlaid(half, val_pairs=70)
    assert not torch.equal(data.dataset("val").pairs, data.dataset("test").pairs)
    for a, b in zip(whole(same.train_dataloader()), whole(again.train_dataloader()), strict=True):
        assert torch.equal(a, b)


def test_only_training_pairs_are_shuffled_and_augmented():
    plain, moved = overlaid(), overlaid(Digits(augment="affine"))
    a, b = whole(plain.train_dataloader()), whole(moved.train_dataloader())
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0])
    assert not torch.equal(a[1], plain.data.dataset("train").columns["labels"][plain.dataset("train").pairs[:, 0]])
    for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        assert torch.equal(whole(getattr(plain, name)())[0], whole(getattr(moved, name)())[0])


def test_the_two_images_of_a_pair_are_augmented_apart():
    """Side by side without overlap, each is one image turned by its own angle."""
    data = overlaid(Digits(augment=RandomAffine(degrees=90)), shift=8, batch_size=300)
    (batch,) = data.train_dataloader()
    left, right = batch["pixel_values"][..., :8, :8], batch["pixel_values"][..., 8:, 8:]
    order = data.train_dataloader().sampler.order(0)
    stored = data.data.dataset("train").columns["pixel_values"][data.dataset("train").pairs[order]]
    assert not torch.equal(left, stored[:, 0])
    assert not torch.equal(right, stored[:, 1])

    class One(RandomAffine):
        def __call__(self, images, keys, stream=0):
            return keys[:, None, None, None].float().expand_as(images)

    (keyed,) = overlaid(Digits(augment=One()), shift=8, batch_size=300).train_dataloader()
    first, second = keyed["pixel_values"][:, 0, 0, 0], keyed["pixel_values"][:, 0, -1, -1]
    assert not (first == second).any()
    assert len(set(first.tolist()) | set(second.tolist())) > 590  # 600 keys; float32 makes few of them equal


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
def test_overlaying_black_changes_nothing(height, width, shift):
    image = torch.rand(2, 3, height, width)
    black = torch.zeros_like(image)
    assert torch.equal(overlay(image, black, shift)[..., :height, :width], image)
    assert torch.equal(overlay(black, image, shift)[..., shift:, shift:], image)
    assert overlay(image, black, shift).count_nonzero() == image.count_nonzero()


def test_workers_and_the_batch_size_do_not_matter():
    alone, many = (overlaid(Digits(augment="affine"), **kwargs) for kwargs in ({}, {"num_workers": 2, "batch_size": 37}))
    for a, b in zip(whole(alone.train_dataloader()), whole(many.train_dataloader()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"train_pairs": 0}, r"OverlaidImages\(train_pairs=0\): it must be at least 1"),
        ({"val_pairs": 0}, r"val_pairs=0"),
        ({"test_pairs": -1}, r"test_pairs=-1"),
        ({"shift": 0}, r"shift=0\): at least 1 pixel"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"num_workers": -1}, r"num_workers=-1"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text):
        overlaid(**kwargs)


def test_what_is_no_set_of_images_is_refused():
    with pytest.raises(TypeError, match=r"OverlaidImages\(data=str\): a data module of images"):
        OverlaidImages("digits")
    with pytest.raises(TypeError, match=r"data=TextData\): its samples are not images with one class each"):
        overlaid(TextData("python-stdlib", task="causal_lm", max_bytes=3000, block_size=32, val_fraction=0.0)).setup("fit")
    with pytest.raises(TypeError, match=r"data=OverlaidImages\): its samples are not images"):
        overlaid(overlaid()).setup("fit")


def test_more_pairs_than_images_make_are_refused():
    few = Digits(val_fraction=0.003)  # 5 images
    with pytest.raises(ValueError, match=r"val_pairs=21\): the 5 images of the val set make at most 20 pairs; set val_pairs"):
        overlaid(few, val_pairs=21).setup("fit")
    assert len(overlaid(few, val_pairs=20).dataset("val")) == 20
    with pytest.raises(ValueError, match="the 1 images of the val set make at most 0 pairs"):
        overlaid(Digits(val_fraction=0.0001)).setup("fit")


def test_splits_that_the_images_lack_are_lacking():
    data = overlaid(Digits(val_fraction=0.0, test_fraction=0.0))
    data.setup()
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"Digits has no test set: .*set test_fraction"):
        data.test_dataloader()


def test_a_loader_is_shared_by_processes():
    """Batch k of two processes is batch k of one: the pairs come from the data module, the order from the sampler."""
    data = overlaid(train_pairs=64)
    orders = [list(EpochSampler(64, 8, seed=0, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(orders[0] + orders[1]) == list(range(64))
    first, second = (data.dataset("train").__getitems__(order[:8]) for order in orders)
    (one, *_) = overlaid(train_pairs=64, batch_size=16).train_dataloader()
    both = torch.stack([first["labels"]["left"], second["labels"]["left"]], dim=1).flatten()
    assert torch.equal(both, one["labels"]["left"])


@pytest.mark.filterwarnings("ignore:.*instantiate_classes")
def test_it_can_be_written_in_yaml():
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    inner = {"class_path": "gateplug.data.Digits", "init_args": {"augment": "affine"}}
    yaml = {"class_path": "gateplug.data.OverlaidImages", "init_args": {"data": inner, "train_pairs": 100, "shift": 4}}
    data = parser.instantiate_classes(parser.parse_object({"data": yaml})).data
    assert isinstance(data.data, Digits)
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (100, 1, 12, 12)


class TwoTasks(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 20))

    def training_step(self, batch, batch_idx):
        logits = self.net(batch["pixel_values"]).unflatten(1, (2, 10))
        tasks = (batch["labels"]["left"], batch["labels"]["right"])
        return sum(nn.functional.cross_entropy(logits[:, i], labels) for i, labels in enumerate(tasks))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_within_an_epoch_is_resumed_exactly(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(exact, "Net", TwoTasks)

    def small():
        return overlaid(Digits(augment=["affine", "crop"]), train_pairs=72, shift=4, batch_size=16, num_workers=workers)

    unbroken = exact.run(tmp_path / "whole", small())
    assert exact.run(tmp_path, small(), kill=7) is None  # after 5 + 2 batches
    assert exact.same(unbroken, exact.run(tmp_path, small(), resume=tmp_path / "last.ckpt"))

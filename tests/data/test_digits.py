"""gp.Digits, and what all data modules share."""

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser

from gateplug.data import Digits, EpochSampler, RandomAffine
from gateplug.data.module import limited, parts


def whole(loader):
    batches = list(loader)
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def test_the_documented_sizes_and_ranges():
    data = Digits()
    data.setup()
    sizes = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        got = whole(loader)
        sizes.append(len(got["labels"]))
        assert got["pixel_values"].shape[1:] == (1, 8, 8)
        assert got["pixel_values"].dtype == torch.float32
        assert got["labels"].dtype == torch.int64
        assert got["pixel_values"].min() == 0
        assert got["pixel_values"].max() == 1
        assert set(got["labels"].tolist()) == set(range(data.num_classes))
    assert sizes == [1258, 180, 359]


def test_the_split_is_a_function_of_the_seed_and_has_no_overlap():
    def fingerprints(seed, split):
        data = Digits(seed=seed)
        data.setup()
        return {image.numpy().tobytes() for image in data.dataset(split).columns["pixel_values"]}

    assert fingerprints(0, "test") == fingerprints(0, "test") != fingerprints(1, "test")
    assert not fingerprints(0, "test") & fingerprints(0, "train")
    assert not fingerprints(0, "val") & (fingerprints(0, "train") | fingerprints(0, "test"))


def test_only_training_images_are_augmented_and_only_they_are_shuffled():
    plain, moved = Digits(), Digits(augment="affine")
    for data in (plain, moved):
        data.setup()
    assert not torch.equal(whole(plain.train_dataloader())["pixel_values"], whole(moved.train_dataloader())["pixel_values"])
    for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        a, b = (whole(getattr(data, name)()) for data in (plain, moved))
        assert torch.equal(a["pixel_values"], b["pixel_values"])
    assert torch.equal(whole(plain.test_dataloader())["labels"], plain.dataset("test").columns["labels"])
    assert not torch.equal(whole(plain.train_dataloader())["labels"], plain.dataset("train").columns["labels"])


def test_setup_reads_once():
    data = Digits()
    data.setup("fit")
    first = data.dataset("train")
    data.setup("fit")
    data.setup()
    assert data.dataset("train") is first


def test_images_are_resized():
    data = Digits(image_size=14)
    data.setup("test")
    got = whole(data.test_dataloader())["pixel_values"]
    assert got.shape[1:] == (1, 14, 14)
    assert got.min() >= 0
    assert got.max() <= 1


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"batch_size": 0}, r"Digits\(batch_size=0\): it must be at least 1"),
        ({"num_workers": -1}, r"num_workers=-1"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0.*each must lie in \[0, 1\)"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "sum below 1"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"augment": "flop"}, "the names are affine, crop, cutout, flip"),
        ({"image_size": 0}, "at least 1 pixel"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text):
        Digits(**kwargs)


def test_a_set_that_is_not_there_is_named():
    data = Digits(test_fraction=0.0, val_fraction=0.0)
    data.setup()
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"Digits has no test set: .*set test_fraction"):
        data.test_dataloader()


def test_parts_leave_something_to_train_on():
    assert {k: len(v) for k, v in parts(10, 0, 0.01, 0.2).items()} == {"test": 2, "val": 1, "train": 7}
    with pytest.raises(ValueError, match="leave none to train on"):
        parts(2, 0, 0.4, 0.4)


def test_a_smaller_limit_draws_from_a_larger_ones_rows():
    rows = torch.arange(100, 200)
    small, large = (set(limited(rows, n, 3).tolist()) for n in (10, 40))
    assert small < large < set(rows.tolist())
    assert torch.equal(limited(rows, None, 3), rows)


@pytest.mark.filterwarnings("ignore:.*instantiate_classes")
def test_it_can_be_written_in_yaml():
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    yaml = {
        "class_path": "gateplug.data.Digits",
        "init_args": {"augment": ["flip", {"class_path": "gateplug.data.RandomAffine", "init_args": {"degrees": 5}}]},
    }
    data = parser.instantiate_classes(parser.parse_object({"data": yaml})).data
    assert isinstance(data.augment.steps[1], RandomAffine)
    assert data.augment.steps[1].degrees == 5


class Predict(L.LightningModule):
    def training_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return None

    def test_step(self, batch, batch_idx):
        self.log("n", float(len(batch["labels"])), reduce_fx="sum")

    def predict_step(self, batch, batch_idx):
        return batch["labels"]


def test_the_trainer_predicts_and_overfits_with_it():
    """Lightning rebuilds the loader for predict and for overfit_batches."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    data = Digits()
    trainer = L.Trainer(accelerator="cpu", **quiet)
    labels = torch.cat(trainer.predict(Predict(), data))
    assert torch.equal(labels, data.dataset("test").columns["labels"])
    assert trainer.test(Predict(), data, verbose=False) == [{"n": 359.0}]
    L.Trainer(accelerator="cpu", overfit_batches=2, max_epochs=2, **quiet).fit(Predict(), data)
    assert isinstance(data.train_dataloader().sampler, EpochSampler)

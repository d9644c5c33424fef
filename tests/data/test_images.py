"""gp.ImageData on tiny folders of every layout, and on images of every kind."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gateplug.data import ImageData
from gateplug.data.source import pick_split


def png(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def grey(value, size=(4, 4)):
    return Image.fromarray(np.full(size, value, dtype=np.uint8))


def parquet(folder, images, labels, split="train", **columns):
    folder.mkdir(parents=True, exist_ok=True)
    raw = [{"bytes": png(i) if isinstance(i, Image.Image) else i, "path": None} for i in images]
    table = pa.table({"image": raw, "label": labels, **columns})
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("GATEPLUG_DATA", raising=False)


@pytest.fixture
def folder(tmp_path):
    """40 training and 6 test images whose every pixel is the row number, of 3 classes."""
    parquet(tmp_path / "set", [grey(i) for i in range(40)], [i % 3 for i in range(40)])
    return parquet(tmp_path / "set", [grey(100 + i) for i in range(6)], [0, 1, 2] * 2, "test")


def read(data, split="train"):
    return data.dataset(split).columns if hasattr(data.dataset(split), "columns") else data.dataset(split).__getitems__(
        range(len(data.dataset(split)))
    )  # fmt: skip


def test_splits_are_read_and_cut_by_seed(folder):
    data = ImageData(path=str(folder), mode="L", val_fraction=0.2)
    data.prepare_data()
    data.setup()
    train, val, test = (read(data, split) for split in ("train", "val", "test"))
    rows = {name: set(part["pixel_values"][:, 0, 0, 0].tolist()) for name, part in (("train", train), ("val", val))}
    assert rows["train"] | rows["val"] == set(range(40))
    assert len(rows["val"]) == 8
    assert len(rows["train"]) == 32
    assert rows["val"] != set(range(32, 40))  # drawn, not cut off the end
    assert test["pixel_values"][:, 0, 0, 0].tolist() == [100, 101, 102, 103, 104, 105]
    for part in (train, val):
        assert torch.equal(part["labels"], part["pixel_values"][:, 0, 0, 0].long() % 3)
    assert data.num_classes == 3


def test_batches_are_pixels_in_0_1_or_normalised(folder):
    data = ImageData(path=str(folder), mode="L", batch_size=6)
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert torch.equal(batch["pixel_values"][:, 0, 0, 0], torch.arange(100, 106) / 255)
    normal = ImageData(path=str(folder), mode="L", batch_size=6, mean=[0.25], std=[0.5])
    (other,) = normal.test_dataloader()
    assert torch.allclose(other["pixel_values"], (batch["pixel_values"] - 0.25) / 0.5)
    (same,) = normal.predict_dataloader()
    assert torch.equal(same["pixel_values"], other["pixel_values"])


def test_lazy_reading_gives_the_same_batches(folder):
    kwargs = {"path": str(folder), "mode": "RGB", "augment": ["crop", "flip"], "batch_size": 7}
    for workers in (0, 2):
        a, b = ImageData(**kwargs), ImageData(**kwargs, in_memory=False, num_workers=workers)
        for x, y in zip(a.train_dataloader(), b.train_dataloader(), strict=True):
            assert torch.equal(x["pixel_values"], y["pixel_values"])
            assert torch.equal(x["labels"], y["labels"])


def test_a_limit_draws_training_rows_by_seed(folder):
    def rows(seed, n):
        data = ImageData(path=str(folder), mode="L", seed=seed, train_samples=n)
        return read(data)["pixel_values"][:, 0, 0, 0].tolist()

    assert len(rows(0, 10)) == 10
    assert rows(0, 10) == rows(0, 10) != rows(1, 10)
    assert set(rows(0, 5)) < set(rows(0, 10))


def test_known_sets_are_normalised_by_their_published_statistics(tmp_path, monkeypatch):
    parquet(tmp_path / "root" / "fashion_mnist", [grey(0), grey(255)] * 5, [0, 1] * 5)
    monkeypatch.setenv("GATEPLUG_DATA", str(tmp_path / "root"))
    data = ImageData("zalando-datasets/fashion_mnist", mode="L", test_split=None)
    assert (data.mean, data.std) == ([0.2860], [0.3530])
    lowest = min(b["pixel_values"].min().item() for b in data.train_dataloader())
    assert lowest == pytest.approx(-0.2860 / 0.3530)
    assert ImageData("zalando-datasets/fashion_mnist", mode="RGB").mean is None


@pytest.mark.parametrize("name", ["someone/our_set", "our_set", "someone/our-set"])
def test_a_local_copy_of_a_hub_id_is_found(tmp_path, monkeypatch, name):
    parquet(tmp_path / "root" / "our_set", [grey(i) for i in range(10)], [0, 1] * 5)
    monkeypatch.setenv("GATEPLUG_DATA", str(tmp_path / "root"))
    data = ImageData(name, mode="L", test_split=None, test_fraction=0.3)
    data.setup()
    assert [len(data.dataset(s)) for s in ("train", "val", "test")] == [6, 1, 3]


def rgba():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2] = (255, 0, 0, 255)  # opaque red above, transparent black below
    return Image.fromarray(pixels, "RGBA")


def palette():
    image = rgba().convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    return image


RED, WHITE, BLACK = [255, 0, 0], [255, 255, 255], [0, 0, 0]
LUMA = 76  # PIL's grey of pure red: 0.299·255


@pytest.mark.parametrize(
    ("image", "above", "below", "above_grey"),
    [
        (rgba(), RED, WHITE, LUMA),
        (palette(), RED, BLACK, LUMA),
        (grey(7), [7] * 3, [7] * 3, 7),
        (Image.fromarray(np.full((4, 4), 0x1234, dtype=np.uint16)), [0x12] * 3, [0x12] * 3, 0x12),
        (Image.new("LA", (4, 4), (9, 0)), WHITE, WHITE, 255),
        (Image.new("1", (4, 4), 1), WHITE, WHITE, 255),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), WHITE, WHITE, 255),
    ],
    ids=["rgba", "palette", "grey", "16-bit", "grey+alpha", "1-bit", "cmyk"],
)
def test_every_kind_of_image_is_converted(tmp_path, image, above, below, above_grey):
    raw = png(image, "TIFF" if image.mode == "CMYK" else "PNG")
    path = str(parquet(tmp_path / "set", [raw] * 2, [0, 1]))
    rgb = read(ImageData(path=path, mode="RGB", val_fraction=0.0))["pixel_values"][0]
    assert rgb.shape == (3, 4, 4)
    assert rgb[:, 0, 0].tolist() == above
    assert rgb[:, 3, 3].tolist() == below
    assert read(ImageData(path=path, mode="L", val_fraction=0.0))["pixel_values"][0, 0, 0, 0] == above_grey


def test_a_transparent_palette_is_pasted_on_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = 0
    path = str(parquet(tmp_path / "set", [image] * 2, [0, 1]))
    assert (read(ImageData(path=path, val_fraction=0.0))["pixel_values"] == 255).all()


def test_sizes_are_made_equal_on_request(tmp_path):
    path = str(parquet(tmp_path / "set", [grey(9, (4, 4)), grey(9, (6, 8))], [0, 1]))
    for size, expected in ((5, (5, 5)), ((3, 7), (3, 7))):
        got = read(ImageData(path=path, mode="L", image_size=size, val_fraction=0.0))["pixel_values"]
        assert got.shape == (2, 1, *expected)
        assert (got == 9).all()
    with pytest.raises(ValueError, match=r"split 'train', row 1 is 6×8 pixels .* before it are 4×4: give image_size"):
        ImageData(path=path, mode="L", val_fraction=0.0).setup("fit")


def test_a_truncated_image_is_named_with_its_row(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8))
    path = str(parquet(tmp_path / "set", [noise, png(noise)[:300]], [0, 1]))
    with pytest.raises(ValueError, match=r"image in split 'train', row 1 cannot be read"):
        ImageData(path=path, mode="L", val_fraction=0.0).setup("fit")


def test_images_come_as_files_pixel_lists_or_the_image_feature(tmp_path):
    (tmp_path / "csv").mkdir()
    for i in range(4):
        grey(i).save(tmp_path / "csv" / f"{i}.png")
    (tmp_path / "csv" / "data.csv").write_text("image,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(4)))
    by_path = ImageData(path=str(tmp_path / "csv"), mode="L", val_fraction=0.0)
    assert read(by_path)["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert (by_path.num_classes, by_path.class_names) == (2, ["a", "b"])

    (tmp_path / "json").mkdir()
    lines = [f'{{"image": {np.full((4, 4), i).tolist()}, "label": {i % 2}}}' for i in range(4)]
    (tmp_path / "json" / "train.jsonl").write_text("\n".join(lines))
    lists = ImageData(path=str(tmp_path / "json"), mode="L", val_fraction=0.0)
    assert read(lists)["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    saved = datasets.Dataset.from_dict({"image": [grey(i) for i in range(4)], "label": [0, 1, 0, 1]}, features=features)
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "saved")
    hub = ImageData(path=str(tmp_path / "saved"), mode="L", val_fraction=0.0)
    assert read(hub)["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert (hub.num_classes, hub.class_names) == (3, ["x", "y", "z"])


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({}, "got neither name nor path: give name"),
        ({"name": "a/b", "path": "c"}, "got name='a/b' and path='c'"),
        ({"name": "a/b", "mode": "CMYK"}, r"mode='CMYK'\): 'L' \(grey\) or 'RGB'"),
        ({"name": "a/b", "image_size": (0, 3)}, "image_size="),
        ({"name": "a/b", "train_samples": 0}, r"train_samples=0\): it must be at least 1"),
        ({"name": "a/b", "mean": [0.1]}, "one number per channel, 3 for mode 'RGB'"),
        ({"name": "a/b", "mode": "L", "std": [0.0]}, "above 0"),
        ({"name": "a/b", "augment": "warp"}, "the names are"),
        ({"name": "a/b", "val_fraction": 2.0}, "val_fraction=2.0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text):
        ImageData(**kwargs)


def test_a_missing_folder_names_its_neighbours(folder):
    with pytest.raises(FileNotFoundError, match=r"no such folder; .* has the folders set"):
        ImageData(path=str(folder.parent / "sett"))
    (folder.parent / "empty").mkdir()
    (folder.parent / "empty" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no data file there.*found: notes.txt"):
        ImageData(path=str(folder.parent / "empty"))


def test_a_hub_id_that_cannot_be_had_says_where_it_looked(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"name='a/b'.*no route.*GATEPLUG_DATA is not set. Give path="):
        ImageData("a/b").prepare_data()
    monkeypatch.setenv("GATEPLUG_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no folder of that name"):
        ImageData("a/b").prepare_data()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"train_split": "training"}, r"train_split='training'\): no such split; found 'test' \(6 rows\), 'train' \(40 rows\)"),
        ({"image_column": "img"}, r"image_column='img'\): no such column; found image, label"),
        ({"label_column": "y"}, r"label_column='y'\): no such column; found image, label"),
    ],
)
def test_missing_splits_and_columns_list_what_was_found(folder, kwargs, text):
    with pytest.raises(ValueError, match=text):
        ImageData(path=str(folder), **kwargs).prepare_data()


@pytest.mark.parametrize(
    ("labels", "kwargs", "text"),
    [
        ([0, 1, -1, 0], {}, "labels from -1 to 1, out of range for 2 classes"),
        ([0, 1, 5, 0], {}, "not contiguous: 3 different numbers, 0, 1, 5. Renumber"),
        ([0, 1, 5, 0], {"num_classes": 3}, "from 0 to 5, out of range for 3 classes"),
        ([0, 1, None, 0], {}, "row 2 has no label in column 'label'"),
        ([0.5, 1.5, 2.5, 0.0], {}, "the labels are float; an image has one class"),
        (["a", "b", "c", "a"], {"num_classes": 2}, "has 3 classes: a, b, c"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, kwargs, text):
    path = str(parquet(tmp_path / "set", [grey(0)] * 4, labels))
    with pytest.raises(ValueError, match=text):
        ImageData(path=path, **kwargs).setup("fit")


def test_a_test_label_that_training_does_not_know_is_refused(tmp_path):
    parquet(tmp_path / "set", [grey(0)] * 4, ["a", "b"] * 2)
    path = str(parquet(tmp_path / "set", [grey(0)] * 2, ["a", "c"], "test"))
    with pytest.raises(ValueError, match=r"row 1 of split 'test' has the label 'c'.*not among the training classes \(a, b\)"):
        ImageData(path=path).setup("test")


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"no data.*files must have the same columns, and each at least one row"):
        ImageData(path=str(tmp_path / "set")).prepare_data()
    with pytest.raises(ValueError, match=r"train_split='train'\): the split is empty \(0 rows\)"):
        pick_split("ImageData", {"train": datasets.Dataset.from_dict({"image": []})}, "train", "train_split")


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    parquet(tmp_path / "set", [grey(0)], [0])
    (tmp_path / "set" / "train-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"cannot be read as one table \(.*All files must have the same columns"):
        ImageData(path=str(tmp_path / "set")).prepare_data()
    (tmp_path / "set" / "train.csv").write_text("label\n1\n")
    with pytest.raises(ValueError, match="mixes files of csv, parquet"):
        ImageData(path=str(tmp_path / "set")).prepare_data()

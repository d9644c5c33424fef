"""gp.Ratings on small tables of every layout that GroupLens uses."""

import random

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import nn

from gateplug.data import Ratings
from tests.data import test_exact_resume as exact

HEADER = "userId,movieId,rating,timestamp"


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch):
    monkeypatch.delenv("GATEPLUG_DATA", raising=False)


def some_rows(n=100, seed=0):
    """(user, movie, rating, timestamp): ids with gaps, times in no order, half stars."""
    draw = random.Random(seed)
    return [
        (draw.choice([3, 7, 20, 1000]), 10 * draw.randint(1, 12), draw.randint(1, 10) / 2, t)
        for t in draw.sample(range(10**9), n)
    ]


def csv_file(folder, rows, header=HEADER):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.csv").write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(folder)


def split_rows(data, split):
    """A split as (user, movie, rating) in the module's numbers."""
    rows = data.dataset(split)
    return list(
        zip(rows.columns["user"].tolist(), rows.columns["movie"].tolist(), rows.labels.columns["rating"].tolist(), strict=True)
    )


def numbered(rows):
    """The same of the table, by the documented rule."""
    users, movies = sorted({r[0] for r in rows}), sorted({r[1] for r in rows})
    return [(users.index(u), movies.index(m), s) for u, m, s, _ in rows]


def test_batches_have_the_documented_form(tmp_path):
    data = Ratings(path=csv_file(tmp_path, some_rows()), batch_size=16)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"user", "movie", "labels"}
    assert set(batch["labels"]) == {"rating", "click"}
    assert all(t.shape == (16,) for t in (batch["user"], batch["movie"], *batch["labels"].values()))
    assert batch["user"].dtype == batch["movie"].dtype == torch.int64
    assert batch["labels"]["rating"].dtype == batch["labels"]["click"].dtype == torch.float32
    assert data.dataset("train")[3]["labels"].keys() == {"rating", "click"}
    assert (data.num_users, data.num_movies) == (4, len({r[1] for r in some_rows()}))


def test_the_oldest_train_and_the_newest_test(tmp_path):
    rows = some_rows()
    data = Ratings(path=csv_file(tmp_path, rows))
    by_time = sorted(range(100), key=lambda i: rows[i][3])
    expected = numbered(rows)
    for split, part in (("train", by_time[:80]), ("val", by_time[80:90]), ("test", by_time[90:])):
        assert split_rows(data, split) == [expected[i] for i in sorted(part)]  # within a split, in the table's order


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 3), min_size=10, max_size=40))
def test_of_equal_times_the_earlier_row_is_the_older(tmp_path, times):
    rows = [(1, i, 3.0, t) for i, t in enumerate(times)]  # the movie's number is the row's
    data = Ratings(path=csv_file(tmp_path, rows), val_fraction=0.2, test_fraction=0.3)
    movies = {split: {m for _, m, _ in split_rows(data, split)} for split in ("train", "val", "test")}
    order = sorted(range(len(times)), key=lambda i: (times[i], i))
    test, val = max(1, round(0.3 * len(times))), max(1, round(0.2 * len(times)))
    assert movies["test"] == set(order[-test:])
    assert movies["val"] == set(order[-test - val : -test])
    assert movies["train"] == set(order[: -test - val])


def test_a_random_split_is_a_function_of_the_seed_and_has_no_overlap(tmp_path):
    path = csv_file(tmp_path, [(1, i, 3.0, i) for i in range(200)])

    def movies(split, **kwargs):
        return {m for _, m, _ in split_rows(Ratings(path=path, split="random", **kwargs), split)}

    parts = [movies(split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [160, 20, 20]
    assert set.union(*parts) == set(range(200))  # 200 in all, so none is in two
    assert movies("test") == parts[2] != movies("test", seed=1)
    assert parts[2] != set(range(180, 200))  # drawn, not the newest
    by_time = Ratings(path=path, seed=1)
    assert split_rows(by_time, "test") == split_rows(Ratings(path=path), "test")  # time knows no seed


def test_a_limit_draws_training_rows_by_seed(tmp_path):
    path = csv_file(tmp_path, [(1, i, 3.0, i) for i in range(100)])

    def movies(n, seed=0, split="train"):
        return {m for _, m, _ in split_rows(Ratings(path=path, train_samples=n, seed=seed), split)}

    assert len(movies(20)) == 20
    assert movies(20) == movies(20) != movies(20, seed=1)
    assert movies(5) < movies(20) < set(range(80))
    assert movies(5, split="test") == set(range(90, 100))
    assert Ratings(path=path, train_samples=5).num_movies == 100  # over the whole table


@pytest.mark.parametrize(("threshold", "clicks"), [(4.0, [0, 0, 1, 1]), (3.3, [0, 1, 1, 1]), (5.0, [0, 0, 0, 1]), (0.0, [1] * 4)])
def test_a_click_is_a_rating_of_the_threshold_or_more(tmp_path, threshold, clicks):
    path = csv_file(tmp_path, [(1, 1, stars, i) for i, stars in enumerate((0.5, 3.3, 4.0, 5.0))])
    data = Ratings(path=path, val_fraction=0.0, test_fraction=0.0, threshold=threshold)
    assert data.dataset("train").labels.columns["click"].tolist() == clicks
    assert data.dataset("train").labels.columns["rating"].tolist() == pytest.approx([0.5, 3.3, 4.0, 5.0])


def test_one_that_training_does_not_know_keeps_a_number(tmp_path):
    rows = [(5, 50, 3.0, t) for t in range(8)] + [(5, 50, 3.0, 8), (2, 40, 3.0, 9)]  # user 2 and movie 40 come last
    data = Ratings(path=csv_file(tmp_path, rows))
    assert (data.num_users, data.num_movies) == (2, 2)
    assert split_rows(data, "train") == [(1, 1, 3.0)] * 8
    assert split_rows(data, "test") == [(0, 0, 3.0)]
    assert data.table.user_ids.tolist() == [2, 5]
    assert data.table.movie_ids.tolist() == [40, 50]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ratings.dat", "1::20::3::5\n4::10::4.5::6\n"),
        ("u.data", "1\t20\t3\t5\n4\t10\t4.5\t6\n"),
        ("ratings.csv", '\ufefftimestamp,rating,title,movieId,userId\n5,3,"A, or\nB",20,1\n\n6,4.5,C::D,10,4\n'),
        ("ratings.csv", f"{HEADER}\r\n1,20,3,5\r\n4,10,4.5,6"),
        ("ratings.csv", f"\n\n{HEADER}\n1,20,3,5\n4,10,4.5,6\n"),
    ],
    ids=["1M and 10M", "100k", "other columns, mark, blank line", "windows", "blank lines first"],
)
def test_every_layout_is_read(tmp_path, file, text):
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    expected = [(0, 1, 3.0), (1, 0, 4.5)]
    for path in (tmp_path, tmp_path / file):  # the folder, or the file in it
        data = Ratings(path=str(path), val_fraction=0.0, test_fraction=0.0)
        assert split_rows(data, "train") == expected
        assert data.table.times.tolist() == [5.0, 6.0]
        assert data.val_dataloader() == []


def test_titles_in_another_encoding_do_not_matter(tmp_path):
    (tmp_path / "ratings.csv").write_bytes(b"userId,movieId,title,rating,timestamp\n1,2,Am\xe9lie,4,0\n")
    assert Ratings(path=str(tmp_path)).table.ratings.tolist() == [4.0]


def test_a_folder_under_gateplug_data_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("GATEPLUG_DATA", str(tmp_path))
    csv_file(tmp_path / "ml_latest_small", some_rows())
    data = Ratings("ml-latest-small")
    data.prepare_data()
    assert data.num_users == 4


def test_what_is_missing_says_the_layout_and_who_publishes_it(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"Ratings\(path='nowhere'\): no such file or folder. GroupLens publishes .*MovieLens"
    ):
        Ratings(path="nowhere")
    (tmp_path / "movies.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"has none of ratings.csv, ratings.dat, u.data; it has movies.csv. GroupLens"):
        Ratings(path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"name='ml-1m'\): GATEPLUG_DATA is not set, or has no folder of that name"):
        Ratings("ml-1m").prepare_data()
    monkeypatch.setenv("GATEPLUG_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no folder of that name"):
        Ratings("ml-1m").setup()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("1,2,good,4", "'rating': 'good'"),
        ("1,2,,4", "'rating': ''"),
        ("1,2,nan,4", "'rating': 'nan'"),
        ("1,2,3,inf", "'timestamp': 'inf'"),
        ("1.5,2,3,4", "'userId': '1.5'"),
        ("1,tt2,3,4", "'movieId': 'tt2'"),
        ("1,2,3", "'timestamp': ''"),
    ],
)
def test_a_value_that_is_no_number_is_named_with_its_line(tmp_path, line, shown):
    (tmp_path / "ratings.csv").write_text(f"{HEADER}\n1,2,3,4\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"Ratings: line 4 of .*ratings.csv has .*{shown}.*must be whole numbers"):
        Ratings(path=str(tmp_path)).setup()


@pytest.mark.parametrize("line", ["1\t2\t3", "1\t2\t3\t4\t5", "1\t2\tx\t4"])
def test_a_line_of_another_length_is_named_too(tmp_path, line):
    (tmp_path / "u.data").write_text(f"1\t2\t3\t4\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2 of .*u.data has"):
        Ratings(path=str(tmp_path)).setup()


def test_a_missing_column_is_named_with_those_there(tmp_path):
    path = csv_file(tmp_path, [(1, 2, 3)], "user,movieId,rating")
    with pytest.raises(ValueError, match=r"has no column userId, timestamp; its first line has user, movieId, rating"):
        Ratings(path=path).setup()
    with pytest.raises(ValueError, match=r"no column userId, movieId, rating, timestamp; its first line has 1, 2, 3, 4"):
        Ratings(path=csv_file(tmp_path, [], "1,2,3,4")).setup()  # no header


@pytest.mark.parametrize("text", ["", "\n", HEADER, f"{HEADER}\n\n"])
def test_an_empty_table_is_refused(tmp_path, text):
    (tmp_path / "ratings.csv").write_text(text)
    with pytest.raises(ValueError, match=r"ratings.csv is empty: it has no rating"):
        Ratings(path=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"path": None}, "Ratings got neither name nor path: give name"),
        ({"name": "ml-100k"}, "got name='ml-100k' and path="),
        ({"split": "user"}, r"split='user'\): 'time' or 'random'"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "sum below 1"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"train_samples": 0}, r"train_samples=0\): it must be at least 1"),
        ({"threshold": float("nan")}, r"threshold=nan\): a number of stars"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(tmp_path, kwargs, text):
    path = csv_file(tmp_path, some_rows())
    with pytest.raises(ValueError, match=text):
        Ratings(**{"path": path, **kwargs})


def test_too_few_rows_leave_none_to_train_on(tmp_path):
    path = csv_file(tmp_path, some_rows(2))
    for split in ("time", "random"):
        with pytest.raises(ValueError, match="Of 2 samples, .* leave none to train on"):
            Ratings(path=path, split=split).setup()


@pytest.mark.filterwarnings("ignore:.*instantiate_classes")
def test_it_can_be_written_in_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    yaml = {"class_path": "gateplug.data.Ratings", "init_args": {"path": csv_file(tmp_path, some_rows()), "split": "random"}}
    data = parser.instantiate_classes(parser.parse_object({"data": yaml})).data
    assert len(data.dataset("train")) == 80


class Embeddings(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.user, self.movie = nn.Embedding(4, 8), nn.Embedding(12, 8)
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        stars, click = self.net(torch.cat([self.user(batch["user"]), self.movie(batch["movie"])], dim=1)).T
        labels = batch["labels"]
        loss = nn.functional.binary_cross_entropy_with_logits(click, labels["click"])
        return loss + nn.functional.mse_loss(stars, labels["rating"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_within_an_epoch_is_resumed_exactly(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(exact, "Net", Embeddings)
    path = csv_file(tmp_path / "table", some_rows(90))

    def small():
        return Ratings(path=path, batch_size=16, num_workers=workers)  # 72 ratings: 5 batches an epoch

    unbroken = exact.run(tmp_path / "whole", small())
    assert exact.run(tmp_path, small(), kill=7) is None
    assert exact.same(unbroken, exact.run(tmp_path, small(), resume=tmp_path / "last.ckpt"))

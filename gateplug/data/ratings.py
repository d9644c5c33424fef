"""MovieLens, or any table of that layout, as two tasks: how a user rates a movie, and whether well."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gateplug.core.local import local_copy
from gateplug.data.module import ExactDataModule, Split, TaskRows, as_it_is, check_limits, cut, limited, parts
from gateplug.data.source import listed

FILES = ("ratings.csv", "ratings.dat", "u.data")  # the releases from 2014 on; 1M and 10M; 100k
COLUMNS = ("userId", "movieId", "rating", "timestamp")
WHERE = "GroupLens publishes the releases as MovieLens (ml-latest-small, ml-100k, ml-1m, …) in the data sets part of its site"


class Ratings(ExactDataModule):
    """Movie ratings in a file of the MovieLens layout, as a regression and a yes-or-no task.

    Batches are ``{"user": int64 (batch,), "movie": int64 (batch,), "labels": {"rating": float (batch,), "click": float
    (batch,)}}``: ``rating`` in stars as the file has it, ``click`` 1 where it is at least ``threshold``, else 0.

    Users and movies are numbered from 0 in the order of their ids, over the whole table. So one that is in no training row
    has a number of its own in validation and test, whose embedding is untrained then. An embedding
    needs ``num_users`` and ``num_movies`` rows; in a YAML file write the numbers down, or larger ones:

    ====================  ========  ========  ===========
    release               users     movies    ratings
    ====================  ========  ========  ===========
    ``ml-100k``           943       1,682     100,000
    ``ml-latest-small``   610       9,724     100,836
    the same of 2016      671       9,066     100,004
    ``ml-1m``             6,040     3,706     1,000,209
    ====================  ========  ========  ===========

    Args:
        name: Folder under the environment variable ``GATEPLUG_DATA``, such as ``ml-latest-small``. Nothing is downloaded.
        path: File, or folder with ``ratings.csv`` (a header with ``userId``, ``movieId``, ``rating``, ``timestamp``; other
            columns are left out), ``ratings.dat`` (the same four separated by ``::``, no header) or ``u.data`` (by tabs).
        split: ``"time"``: train on the oldest ratings, then validate, test on the newest; of equal times the earlier row is
            the older. ``"random"``: by seed.
        val_fraction: Share of all ratings for validation, in [0, 1).
        test_fraction: Share of all ratings for the test, in [0, 1).
        train_samples: At most so many training ratings, drawn by seed; None: all.
        threshold: Least rating that is a click, in stars.
        batch_size: Ratings per process and step, ≥ 1.
        seed: Of a random split, limit and order.
        num_workers: Processes that read, ≥ 0; 0 is mostly fastest.

    Raises:
        ValueError: For an argument outside its range, both or neither of ``name`` and ``path``, a missing column, a value
            that is not a number (with its line), or a table without rows.
        FileNotFoundError: If there is no such file.

    Source: Harper and Konstan 2015, The MovieLens Datasets, doi 10.1145/2827872.
    """

    def __init__(
        self,
        name: str | None = None,
        path: str | None = None,
        split: Literal["time", "random"] = "time",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        train_samples: int | None = None,
        threshold: float = 4.0,
        batch_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, val_fraction, test_fraction)
        if (name is None) == (path is None):
            given = f"name={name!r} and path={path!r}" if name else "neither name nor path"
            raise ValueError(f"Ratings got {given}: give name (a folder under GATEPLUG_DATA) or path (a file or folder).")
        if split not in ("time", "random"):
            raise ValueError(f"Ratings(split={split!r}): 'time' or 'random'.")
        check_limits("Ratings", train_samples=train_samples)
        if not math.isfinite(threshold):
            raise ValueError(f"Ratings(threshold={threshold}): a number of stars.")
        self.name, self.path, self.split = name, path, split
        self.train_samples, self.threshold = train_samples, threshold
        self._table: Table | None = None
        if path is not None:
            find_table(name, path)

    @property
    def num_users(self) -> int:
        """Number of users in the whole table; reads it if ``setup`` has not."""
        return len(self.table.user_ids)

    @property
    def num_movies(self) -> int:
        """Number of movies in the whole table; reads it if ``setup`` has not."""
        return len(self.table.movie_ids)

    def prepare_data(self) -> None:
        """Check that the file is there, before any process reads."""
        find_table(self.name, self.path)

    @property
    def table(self) -> Table:
        """The whole table, read at the first use."""
        if self._table is None:
            self._table = read_table(find_table(self.name, self.path))
        return self._table

    def read(self, split: Split) -> TaskRows | None:
        """Read one part of the table."""
        table, n = self.table, len(self.table.ratings)
        if self.split == "time":
            # newest first; turning a stable order round puts the later of equal rows first, as it should
            rows = cut(table.times.argsort(stable=True).flip(0), self.val_fraction, self.test_fraction)[split]
        else:
            rows = parts(n, self.seed, self.val_fraction, self.test_fraction)[split]
        if split == "train":
            rows = limited(rows, self.train_samples, self.seed)
        if not len(rows):
            return None
        stars = table.ratings[rows]
        labels = {"rating": stars.float(), "click": (stars >= self.threshold).float()}
        return TaskRows(labels, user=table.users[rows], movie=table.movies[rows])

    def collate(self, split: Split) -> Callable[[Any], Any]:
        """Items come as a batch."""
        return as_it_is


class Table(NamedTuple):
    """All ratings of a file, in its order.

    Attributes:
        users: Number of each row's user: int64 ``(rows,)``.
        movies: Number of each row's movie: int64 ``(rows,)``.
        ratings: Stars, float64 ``(rows,)``.
        times: Seconds since 1970, float64 ``(rows,)``.
        user_ids: The file's id of each user number, ascending: int64 ``(users,)``.
        movie_ids: The file's id of each movie number, ascending: int64 ``(movies,)``.
    """

    users: Tensor
    movies: Tensor
    ratings: Tensor
    times: Tensor
    user_ids: Tensor
    movie_ids: Tensor


def find_table(name: str | None, path: str | None) -> Path:
    """The file that ``name`` or ``path`` stands for.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(path) if path is not None else local_copy(name or "")
    given = f"Ratings(path={path!r})" if path is not None else f"Ratings(name={name!r})"
    if folder is not None and folder.is_file():
        return folder
    if folder is not None and folder.is_dir():
        found = next((folder / file for file in FILES if (folder / file).is_file()), None)
        if found is not None:
            return found
        what = f"{folder} has none of {', '.join(FILES)}; it has {listed(sorted(p.name for p in folder.iterdir()))}"
    else:
        what = "no such file or folder" if path is not None else "GATEPLUG_DATA is not set, or has no folder of that name"
    raise FileNotFoundError(f"{given}: {what}. {WHERE}; unpack one and give path= with its folder.")


def read_table(file: Path) -> Table:
    """Read a file of one of the three layouts.

    Raises:
        ValueError: For a missing column, a value that is not a number, or no rows.
    """
    values = array("d")
    # a byte order mark is skipped; what is no UTF-8 can only stand in columns that are not read
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        for line, row in _rows(file, lines):
            try:
                user, movie, stars, time = map(float, row)
                # false for nan and inf too, which float() takes
                good = user.is_integer() and movie.is_integer() and math.isfinite(stars) and math.isfinite(time)
            except ValueError:
                good = False
            if not good:
                raise ValueError(
                    f"Ratings: line {line} of {file} has {dict(zip(COLUMNS, row, strict=False))}; userId and movieId must be "
                    "whole numbers, rating and timestamp numbers. Repair or remove the line."
                )
            values.extend((user, movie, stars, time))
    if not values:
        raise ValueError(f"Ratings: {file} is empty: it has no rating.")
    columns: NDArray[np.float64] = np.frombuffer(values, dtype=np.float64).reshape(-1, 4).T
    user_ids, users = np.unique(columns[0].astype(np.int64), return_inverse=True)
    movie_ids, movies = np.unique(columns[1].astype(np.int64), return_inverse=True)
    # copied, because a view of one column would keep all four
    return Table(*map(torch.from_numpy, (users, movies, columns[2].copy(), columns[3].copy(), user_ids, movie_ids)))


def _rows(file: Path, lines: Any) -> Iterator[tuple[int, list[str]]]:
    """(line number, the four values as text) of each row that is not blank."""
    first = next((line for line in lines if line.strip()), "")
    lines.seek(0)
    if "::" in first or "\t" in first:
        mark = "::" if "::" in first else "\t"
        yield from ((number, line.strip().split(mark)) for number, line in enumerate(lines, 1) if line.strip())
        return
    reader = csv.reader(lines)
    header = [name.strip() for name in next((row for row in reader if row), [])]
    missing = [name for name in COLUMNS if name not in header]
    if missing and header:
        raise ValueError(
            f"Ratings: {file} has no column {', '.join(missing)}; its first line has {listed(header)}. A ratings.csv begins "
            f"with {','.join(COLUMNS)}; files without a header are separated by '::' or tabs."
        )
    places = [header.index(name) for name in COLUMNS if name in header]
    yield from ((reader.line_num, [row[i] if i < len(row) else "" for i in places]) for row in reader if row)

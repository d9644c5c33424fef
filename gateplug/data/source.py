"""Where a data set comes from: a hub id, a local folder, or a local copy of a hub id under GATEPLUG_DATA."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gateplug.core.local import local_copy

_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # what save_to_disk leaves


def check_source(owner: str, name: str | None, path: str | None) -> None:
    """Raise unless exactly one of hub id and folder is given, and the folder is there.

    Raises:
        ValueError: For both or neither.
        FileNotFoundError: For a missing folder or one without data files.
    """
    if (name is None) == (path is None):
        given = f"name={name!r} and path={path!r}" if name else "neither name nor path"
        raise ValueError(f"{owner} got {given}: give name (a Hugging Face data set id) or path (a local folder), not both.")
    if path is not None:
        find_files(Path(path), owner)


def find_files(folder: Path, owner: str) -> list[Path]:
    """Data files of a folder, those in sub-folders too, sorted.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it that can be read.
    """
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        seen = f"{folder.parent} has the folders {listed(near)}" if near else f"{folder.parent} is missing or empty too"
        kind = "a file, not a folder" if folder.is_file() else "no such folder"
        raise FileNotFoundError(f"{owner}(path={str(folder)!r}): {kind}; {seen}.")
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    files = [p for p in found if p.suffix in _FORMATS]
    if not files or all(p.name in _SAVED for p in files):
        raise FileNotFoundError(
            f"{owner}(path={str(folder)!r}): no data file there. It can read {', '.join(_FORMATS)} and folders written by "
            f"Dataset.save_to_disk; found: {listed([p.name for p in found])}."
        )
    return files


def load_splits(owner: str, name: str | None, path: str | None, config: str | None) -> tuple[dict[str, Any], Path | None]:
    """All splits of a data set, as ``datasets.Dataset``, and the local folder they came from.

    Args:
        owner: Name for error messages.
        name: Hub id; a copy under ``GATEPLUG_DATA`` is preferred.
        path: Local folder.
        config: The hub data set's configuration.

    Raises:
        FileNotFoundError: If there is neither a local copy nor a hub that can be reached.
        ValueError: If the local files do not make one table.
    """
    import datasets

    datasets.disable_progress_bars()
    folder = Path(path) if path is not None else local_copy(name or "")
    if folder is None:
        try:
            loaded = datasets.load_dataset(name, config)
        except (ConnectionError, FileNotFoundError, OSError) as error:
            root = os.environ.get("GATEPLUG_DATA")
            looked = f"GATEPLUG_DATA={root} has no folder of that name" if root else "GATEPLUG_DATA is not set"
            raise FileNotFoundError(
                f"{owner}(name={name!r}): the hub did not give it ({type(error).__name__}: {error}), and {looked}. Give "
                "path= with a local folder of parquet, arrow, csv or json files, or set GATEPLUG_DATA to the folder that "
                "holds it."
            ) from error
    else:
        files = find_files(folder, owner)
        if any((folder / mark).is_file() for mark in _SAVED):
            loaded = datasets.load_from_disk(str(folder))
        else:
            kinds = sorted({_FORMATS[p.suffix] for p in files if p.name not in _SAVED})
            if len(kinds) > 1:
                raise ValueError(
                    f"{owner}(path={str(folder)!r}): it mixes files of {', '.join(kinds)}; keep one kind in the folder."
                )
            options = {"delimiter": "\t"} if any(p.suffix == ".tsv" for p in files) else {}
            try:
                loaded = datasets.load_dataset(kinds[0], data_files=by_split(folder, files), **options)
            except (datasets.exceptions.DatasetGenerationError, ValueError) as error:  # the cause says more, if there is one
                raise ValueError(
                    f"{owner}(path={str(folder)!r}): the files cannot be read as one table ({error.__cause__ or error}). All "
                    "files must have the same columns, and each at least one row."
                ) from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {str(key): value for key, value in splits.items()}, folder


def by_split(folder: Path, files: Iterable[Path]) -> dict[str, list[str]]:
    """Sort files into splits by the words in their names, as the hub does; those without such a word are train."""
    words = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
    words |= {"dev": "validation", "test": "test", "eval": "test"}
    splits: dict[str, list[str]] = {}
    for file in files:
        text = "".join(c if c.isalnum() else " " for c in str(file.relative_to(folder)).lower())
        split = next((words[word] for word in text.split() if word in words), "train")
        splits.setdefault(split, []).append(str(file))
    return splits


def pick_split(owner: str, splits: dict[str, Any], split: str, argument: str) -> Any:
    """One split of :func:`load_splits`.

    Raises:
        ValueError: If there is no such split, or it has no row.
    """
    if split not in splits:
        found = ", ".join(f"{key!r} ({len(value)} rows)" for key, value in splits.items())
        raise ValueError(f"{owner}({argument}={split!r}): no such split; found {found}.")
    if not len(splits[split]):
        raise ValueError(f"{owner}({argument}={split!r}): the split is empty (0 rows).")
    return splits[split]


def check_columns(owner: str, data: Any, **columns: str | None) -> None:
    """Raise unless the data set has the columns.

    Raises:
        ValueError: Naming the argument, the column and what columns there are.
    """
    for argument, column in columns.items():
        if column is not None and column not in data.column_names:
            raise ValueError(f"{owner}({argument}={column!r}): no such column; found {listed(data.column_names)}.")


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first names as text, and how many more there are."""
    shown = ", ".join(names[:most]) or "nothing"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")

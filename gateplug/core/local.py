"""Local copies of what a hub has."""

from __future__ import annotations

import os
from pathlib import Path


def local_copy(name: str) -> Path | None:
    """The folder under ``GATEPLUG_DATA`` that holds a copy of a hub id: the id itself, or its last part."""
    if not (root := os.environ.get("GATEPLUG_DATA")):
        return None
    last = name.rsplit("/", 1)[-1]
    for candidate in (name, last, last.replace("-", "_")):
        if (folder := Path(root) / candidate).is_dir():
            return folder
    return None


def folder_or_id(name: str) -> str:
    """What to load from: the folder of that name, else a copy of that hub id, else the id itself."""
    return name if Path(name).is_dir() else str(local_copy(name) or name)

"""Text for language models that is on every machine: the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def stdlib_texts(max_bytes: int | None = None) -> list[str]:
    """The ``*.py`` files of the standard library, a document each, sorted by path; some 12 MB.

    They are those of the running Python, so results are comparable within one Python version. Installed packages, Python's
    own tests and caches are left out.

    Args:
        max_bytes: Read files until they come to so many bytes; the last one is cut. None: all.

    Raises:
        FileNotFoundError: If this Python has no sources on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    files = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    texts: list[str] = []
    left = max_bytes
    for file in files:
        raw = file.read_bytes()[:left]
        if raw:
            texts.append(raw.decode("utf-8", errors="replace"))
        if left is not None:
            left -= len(raw)
            if left <= 0:
                break
    if not texts:
        raise FileNotFoundError(f"name='python-stdlib': no *.py file under {root}; this Python comes without its sources.")
    return texts

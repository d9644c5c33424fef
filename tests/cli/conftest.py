"""Fixtures of the command line's tests."""

import pytest
import torch

from tests.cli.shared import BASE, RUNS


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with base.yaml in it."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "base.yaml").write_text(BASE)
    RUNS.clear()
    return tmp_path

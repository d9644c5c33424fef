"""Every test process: one thread, quiet libraries, no network."""

import logging
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _settled():
    """Tests may seed and switch warnings; the next one does not see it."""
    with warnings.catch_warnings():
        seed = os.environ.get("PL_GLOBAL_SEED")
        yield
        os.environ.pop("PL_GLOBAL_SEED", None)
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed

"""Tiny networks and loaders that the tests of the tasks share."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from gateplug.data import Digits
from gateplug.tasks import hf_model

torch.set_num_threads(1)

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32, "resid_pdrop": 0.0}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 50, "dropout_rate": 0.0}


def tiny(architecture: str, head: str, **kwargs) -> nn.Module:
    config = {"vit": VIT, "bert": BERT, "gpt2": GPT2, "t5": T5}[architecture]
    if architecture in ("gpt2", "t5"):
        config = {**config, "pad_token_id": 0, "eos_token_id": 1}
    return hf_model(architecture, head, config=config, **kwargs)


def mlp(inputs: int = 4, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes))


def trainer(tmp_path, **kwargs) -> L.Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return L.Trainer(
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**options, **kwargs},
    )


def loader(samples: list, batch_size: int) -> DataLoader:
    return DataLoader(samples, batch_size=batch_size)


def as_tuples(x: torch.Tensor, y: torch.Tensor) -> list:
    return list(zip(x, y, strict=True))


class Trunk(nn.Module):
    """Features (batch, width) that all tasks share."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())

    def forward(self, pixel_values):
        return self.body(pixel_values)


class DigitAndParity(Digits):
    """Two tasks on the digits: which one it is, and whether it is odd."""

    def collate(self, split):
        inner = super().collate(split)

        def with_parity(items):
            batch = inner(items)
            digit = batch["labels"]
            return {**batch, "labels": {"digit": digit, "parity": (digit % 2).float()}}

        return with_parity

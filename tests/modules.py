"""What the tests train: modules that are somebody else's, not gateplug's."""

from __future__ import annotations

import shutil
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification

import gateplug as gp

BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
"""Of torch.compile: without a C++ compiler everything but the last step, the making of machine code."""


class Block(nn.Module):
    """A residual feed-forward as people write them."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm(x)))))


class Net(nn.Module):
    """Rows of a digit as tokens, two blocks, a mean, a head; with a mixture of experts after the blocks if asked for."""

    def __init__(self, dropout: float = 0.0, checkpointing: str | None = None, mixture: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList([Block(16, 32, dropout) for _ in range(2)])
        self.head = nn.Linear(16, 10)
        if mixture:
            self.mixture = gp.MoE(gp.ExpertMLP(4, 16, 24, "gelu"), gp.TopKGate(4, 2, 16))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x)
        if hasattr(self, "mixture"):
            x = x + self.mixture(x)
        return self.head(x.mean(1))


class UserModule(L.LightningModule):
    """A LightningModule that knows nothing of gateplug: batches are tuples, the loss comes in a dict."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.1, **kwargs: Any) -> None:
        super().__init__()
        self.net = net if net is not None else Net(**kwargs)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out if isinstance(out, Tensor) else out.logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return {"loss": loss, "extra": y}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class LateModule(UserModule):
    """Builds its network in `configure_model`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nn.Identity())
        self.kwargs = kwargs

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net(**self.kwargs)


class SetupModule(UserModule):
    """Builds its network in `setup`."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def setup(self, stage: str) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = Net()


class Plain(nn.Module):
    """Digits as flat vectors into any network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))


def answers(folded: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits of a folded network; of one with exits when nobody leaves early."""
    if isinstance(folded, gp.ExitRunner):
        return gp.ExitRunner(folded, threshold=float("inf"))(x).logits.clone()
    out = folded(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def vit() -> nn.Module:
    """A tiny Hugging Face ViT for 8×8 digits."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, hidden_act="relu",
    )  # fmt: skip
    return ViTForImageClassification(config)


def digits(n: int = 64, image: bool = False) -> torch.utils.data.TensorDataset:
    """The first `n` digits: rows `(8, 8)`, or images `(1, 8, 8)`, in [0, 1]."""
    data = load_digits()
    x = torch.tensor(data.images[:n], dtype=torch.float32) / 16
    return torch.utils.data.TensorDataset(x[:, None] if image else x, torch.tensor(data.target[:n]))


def loader(batch_size: int = 8, n: int = 64, shuffle: bool = True, image: bool = False) -> Any:
    """Digits through the loader that resumes exactly."""
    return gp.exact_loader(digits(n, image), batch_size, shuffle=shuffle, seed=3)


def trainer(tmp: Any, **kwargs: Any) -> L.Trainer:
    """A quiet Trainer on one CPU process, 2 epochs unless said otherwise."""
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp,
    }  # fmt: skip
    return L.Trainer(**{**settings, **kwargs})

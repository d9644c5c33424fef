"""What the tests of the command line share: a small configuration, and a callback and a module of a user."""

import lightning as L
import torch
from torch import nn

from gateplug.cli import main

BASE = """\
model:
  class_path: Classifier
  init_args:
    num_classes: 10
    net:
      class_path: hf_model
      init_args:
        architecture: vit
        num_labels: 10
        config:
          hidden_size: 16
          num_hidden_layers: 1
          num_attention_heads: 2
          intermediate_size: 32
          image_size: 8
          patch_size: 4
          num_channels: 1
    optimizer:
      class_path: AdamW
      init_args: {lr: 2.0e-3}
    scheduler:
      class_path: OneCycleLR
      init_args: {max_lr: 2.0e-3}
data:
  class_path: Digits
  init_args: {batch_size: 64}
trainer:
  max_epochs: 1
  limit_train_batches: 2
  accelerator: cpu
  enable_model_summary: false
  callbacks:
    - class_path: tests.cli.shared.Counted
"""
LAST = "runs/base/version_0/checkpoints/last.ckpt"
RUNS: list["Counted"] = []


class Counted(L.Callback):
    """A callback of a user; it keeps what it saw."""

    def __init__(self, target: float = 0.5, name: str = "a"):
        if not 0 <= target <= 1:
            raise ValueError(f"target must lie in [0, 1], got {target}")
        self.target, self.name, self.trainer = target, name, None

    def setup(self, trainer, pl_module, stage):
        self.trainer = trainer
        RUNS.append(self)


class Stops(L.Callback):
    """Ends a run in its second epoch, as a lost machine does."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("the machine is lost")


class Mine(L.LightningModule):
    """A module of a user, none of gateplug's."""

    def __init__(self, width: int = 8, fails: bool = False):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.fails = fails

    def training_step(self, batch, batch_idx):
        if self.fails:
            raise ValueError("a bug of the user")
        return nn.functional.cross_entropy(self.net(batch["pixel_values"]), batch["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(*more: str) -> int:
    return main(["fit", "-c", "base.yaml", *more])


def callbacks(trainer) -> list[str]:
    return [type(c).__name__ for c in trainer.callbacks]

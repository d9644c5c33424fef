"""A training that knows nothing of gateplug, and the plugs beside it: train, be killed, resume, fold."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import gateplug as gp


class Parity(L.LightningModule):
    """Is the number of ones in a row of tokens odd? Yours would be a real task."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16, num_labels=2,
        )  # fmt: skip
        self.bert = BertForSequenceClassification(config)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        loss = F.cross_entropy(self.bert(tokens).logits, labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data() -> gp.data.ExactLoader:
    tokens = torch.randint(2, (256, 8), generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(tokens, tokens.sum(1) % 2)
    return gp.exact_loader(dataset, batch_size=16)


def trainer(folder: str, max_steps: int) -> L.Trainer:
    plugs = [gp.ExactResume(seed=1), gp.ReplaceFFN("swiglu"), gp.GateMonitor(every_n_steps=10)]
    keep = ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=1)
    return L.Trainer(
        callbacks=[*plugs, keep], max_epochs=-1, max_steps=max_steps, default_root_dir=folder, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
    )  # fmt: skip


def weights(folder: str, stops: list[int]) -> dict[str, Tensor]:
    """Train to the last of `stops`, in a run of its own up to each of them."""
    for stop in stops:
        L.seed_everything(1, verbose=False)
        module = Parity()
        resume = Path(folder, "last.ckpt")
        ckpt_path = resume if resume.exists() else None
        trainer(folder, stop).fit(module, data(), ckpt_path=ckpt_path, weights_only=True)
    return module.state_dict()


if __name__ == "__main__":
    whole, in_parts = weights("whole", [24]), weights("parts", [7, 24])  # 16 steps are an epoch
    assert all(torch.equal(whole[name], in_parts[name]) for name in whole)
    print("stopped after 7 of 24 steps and resumed: the same weights, bit for bit")

    module = gp.load("parts/last.ckpt", Parity())
    net = gp.fold(module)
    example = torch.ones(2, 8, dtype=torch.long)
    torch.testing.assert_close(net(example).logits, module.bert(example).logits)
    print(type(net).__name__, gp.cost(net, (example,)))

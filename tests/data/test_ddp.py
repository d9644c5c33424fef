"""Two processes train as one with the whole batch does, and share an evaluation without repeating a sample."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
import lightning as L, torch
from torch import nn
import gateplug.data as data
from gateplug.core.resume import ExactResume

torch.set_num_threads(1)
devices, folder = int(sys.argv[1]), sys.argv[2]

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        self.seen = []
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch["pixel_values"]), batch["labels"])
    def test_step(self, batch, batch_idx):
        self.seen.append(batch["pixel_values"])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

digits = data.Digits(batch_size=32 // devices, augment="affine", num_workers=devices - 1)
trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
                    callbacks=[ExactResume(0)], enable_checkpointing=False, enable_progress_bar=False)
net = Net()
trainer.fit(net, digits)
state = trainer.train_dataloader.state_dict()
trainer.test(net, digits, verbose=False)
name = f"{folder}/{devices}-{trainer.global_rank}.pt"
torch.save({"weights": net.state_dict(), "seen": torch.cat(net.seen), "loader": state}, name)
"""


def run(folder, devices):
    script = folder / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(devices), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{devices}-{rank}.pt") for rank in range(devices)]


def test_two_processes_equal_one(tmp_path):
    (one,), (first, second) = run(tmp_path, 1), run(tmp_path, 2)
    for key, weight in one["weights"].items():
        # 1,258 images are 39 batches of 32 and one of 10, all even: the same batches; sums are rounded in another order
        assert torch.allclose(weight, first["weights"][key], atol=1e-6, rtol=0)
        assert torch.equal(first["weights"][key], second["weights"][key])
    assert one["loader"] == first["loader"] == second["loader"] == {"epoch": 1, "position": 1258, "seed": 0, "samples": 1258}
    shared = torch.stack([first["seen"][:179], second["seen"]], dim=1).flatten(0, 1)  # 359 images: 180 and 179
    assert torch.equal(torch.cat([shared, first["seen"][179:]]), one["seen"])

"""A plug of your own: switch off the units of linear layers that a network can do without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.edit import AddGate, Edit
from gateplug.core.optim import GroupOptions


class UnitGate(gp.Gate):
    """Multiplies unit i by σ(logit_i)."""

    room = "units"

    def __init__(self, units: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((units,), 2.0))  # open at the start: σ(2) = 0.88

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit.sigmoid()

    def openness(self) -> gp.Openness:
        return gp.Openness(self.logit.detach().sigmoid(), ("unit",))


class GateUnits(gp.Plug):
    """Gates the units of linear layers; `price` is what an open unit costs."""

    room = "units"
    summary = "a gate per unit, with a price on open ones"

    def __init__(self, layers: str = "auto", price: float = 0.1, lr_scale: float = 10) -> None:
        if price < 0:
            raise ValueError(f"price={price} must be ≥ 0")
        self.layers, self.price, self.lr_scale = layers, price, lr_scale
        self.group = GroupOptions(lr_scale, weight_decay=0.0)

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        return {n: m for n, m in module.named_modules() if type(m) is nn.Linear}

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        return [AddGate(n, UnitGate(m.out_features), what="gates") for n, m in layers.items()]

    def terms(self, module: nn.Module) -> dict[str, Tensor]:
        shares = [gate.logit.sigmoid().mean() for gate in self.gates(module).values()]
        return {"open": self.price * torch.stack(shares).mean()}


def train(folder: str = "runs", epochs: int = 20, price: float = 0.1) -> gp.Classifier:
    """Train a small network on digits with gates on its hidden layer."""
    import lightning as L

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    module = gp.Classifier(net, 10, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3))
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder,
        callbacks=[GateUnits(layers="net.1", price=price), gp.GateMonitor()],
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=20,
    )  # fmt: skip
    trainer.fit(module, gp.Digits())
    return module


if __name__ == "__main__":
    module = train(epochs=2)
    print(gp.fold(module))

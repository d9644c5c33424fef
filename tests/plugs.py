"""A plug for the tests alone, with everything that a plug can have: a gate with parameters, a term and an injection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.edit import AddGate, Edit
from gateplug.core.optim import GroupOptions


class Switch(gp.Plug):
    """Changes the context of a GateON every few optimizer steps: 0, 1, 0, 1 … then a third one."""

    room: ClassVar[str] = "toy"
    summary: ClassVar[str] = "for the tests"
    attaches: ClassVar[bool] = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        (gateon,) = (c for c in trainer.callbacks if isinstance(c, gp.GateON))
        context = (0, 1, 0, 2)[trainer.global_step // 2 % 4]
        if batch_idx % trainer.accumulate_grad_batches == 0 and context != gateon.context:
            gateon.switch(pl_module, context)


class UnitGate(gp.Gate):
    """Multiplies each unit by σ(logit); the mean of its squared output is a penalty put in where it is computed."""

    room: ClassVar[str] = "toy"

    def __init__(self, units: int, weight: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.ones(units))
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.logit)
        if self.recording:
            self.record(share.expand(len(x), -1))
        out = x * share
        if self.injection is not None and self.training:
            out = self.injection.add(out, "toy/energy", lambda v: self.weight * v.square().mean())
        return out


class ToyPlug(gp.Plug):
    """Gates on linear layers."""

    room: ClassVar[str] = "toy"
    summary: ClassVar[str] = "for the tests"
    injects: ClassVar[bool] = True

    def __init__(self, layers: str = "auto", sparsity: float = 0.1, energy: float = 0.3, lr_scale: float = 0.5) -> None:
        if sparsity < 0 or energy < 0:
            raise ValueError(f"sparsity={sparsity} and energy={energy} must be ≥ 0")
        self.layers, self.sparsity, self.energy, self.lr_scale = layers, sparsity, energy, lr_scale
        self.group = GroupOptions(lr_scale, weight_decay=0.0)

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        return {n: m for n, m in module.named_modules() if n.endswith("fc2") and hasattr(m, "out_features")}

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        return [AddGate(n, UnitGate(m.out_features, self.energy), what="gate") for n, m in layers.items()]

    def terms(self, module: nn.Module) -> dict[str, Tensor]:
        gates = self.gates(module).values()
        return {"sparsity": self.sparsity * sum(torch.sigmoid(g.logit).mean() for g in gates)}

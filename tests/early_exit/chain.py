"""A chain of tanh layers with an exit after each, composed of the room's formulas: what the golden cases `network` run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gateplug.early_exit import CalibrationError
from gateplug.early_exit import functional as E

TRAINED = {"warmup": "head.", "gate": "gate.", "inference": "head."}


def loss(
    phase: str, x: Tensor, y: Tensor, cost: Tensor, pos_weight: Tensor, cost_weight: float, mode: str, weighting: str, **p: Tensor
) -> Tensor:
    """Loss of a phase: `block.l`, `head.l` for l = 0 … K and `gate.l` for l < K, each with weight and bias."""
    gates = len(cost) - 1
    h, logits = x, []
    for at in range(gates + 1):
        h = torch.tanh(h @ p[f"block.{at}.weight"].T + p[f"block.{at}.bias"])
        logits.append(h @ p[f"head.{at}.weight"].T + p[f"head.{at}.bias"])
    z = torch.stack(logits, 1)
    ce = torch.nn.functional.cross_entropy(z.transpose(1, 2), y[:, None].expand(-1, gates + 1), reduction="none")
    u = E.uncertainty_features(z[:, :gates])
    a = torch.stack([(u[:, at] @ p[f"gate.{at}.weight"].T + p[f"gate.{at}.bias"])[:, 0] for at in range(gates)], 1)
    if phase == "warmup":
        return E.warmup_loss(ce)
    if phase == "gate":
        return E.gate_loss(a, E.gate_targets(E.best_exit(ce, cost, cost_weight), gates), pos_weight)
    return E.inference_loss(ce[:, :gates], E.exit_probabilities(a.sigmoid(), mode)[:, :gates], weighting)


def reached(phase: str, **rest: Any) -> list[str]:
    """Which kinds of parameters a phase sends a gradient to."""
    tensors = {name: value.requires_grad_() for name, value in rest.items() if name.split(".")[0] in ("block", "head", "gate")}
    grads = torch.autograd.grad(loss(phase, **rest), list(tensors.values()), allow_unused=True)
    return sorted({name.split(".")[0] for name, g in zip(tensors, grads, strict=True) if g is not None and bool(g.any())})


def trained(steps: list[str], lr: float, **rest: Any) -> dict[str, Tensor]:
    """Heads and gates after these phases, each one step of SGD (momentum 0.9, weight decay 5e-4) on its own parameters alone."""
    last = f"head.{len(rest['cost']) - 1}."
    momentum: dict[str, Tensor] = {}
    for phase in steps:
        own = [name for name in rest if name.startswith(TRAINED[phase]) and not name.startswith(last)]
        now = rest | {name: rest[name].detach().requires_grad_() for name in own}
        for name, g in zip(own, torch.autograd.grad(loss(phase, **now), [now[n] for n in own]), strict=True):
            change = g + 5e-4 * rest[name]
            momentum[name] = 0.9 * momentum[name] + change if name in momentum else change
            rest[name] = rest[name] - lr * momentum[name]
    return {f"after.{name}": rest[name] for name in rest if name.startswith(("head.", "gate."))}


def decision(gates: Tensor, mode: str, threshold: float) -> Tensor:
    """Where samples leave, from their gates."""
    return E.first_exit(E.exit_scores(gates, mode), threshold)


def pooled_error(confidence: Tensor, correct: Tensor, bins: int, binning: str, split: list[int]) -> Tensor:
    """The metric's value after batches of these sizes, the empty ones too."""
    metric = CalibrationError(bins, binning).set_dtype(torch.float64)
    for some, right in zip(confidence.split(split), correct.split(split), strict=True):
        metric.update(some, right)
    return metric.compute()

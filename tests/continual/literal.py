"""EWC, SI and MAS written out for one small classifier, as the papers have them, in a loop of their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.continual.stream import Digits, PermutedDigits

Tensors = dict[str, Tensor]


class Written:
    """One list entry a task, nothing summed up or kept in another form."""

    def __init__(self, kind: str, weight: float, **options: Any) -> None:
        self.kind, self.weight, self.options = kind, weight, options
        self.anchors: list[Tensors] = []
        self.importances: list[Tensors] = []
        self.omega: Tensors = {}
        self.start: Tensors = {}

    def penalty(self, module: nn.Module) -> Tensor:
        """Σ_t λ/2 Σ F_t (θ − θ_t)² for EWC; of the last entry alone for the others, SI without the half."""
        pairs = list(zip(self.importances, self.anchors, strict=True))
        if self.kind != "ewc":
            pairs = pairs[-1:]
        factor = self.weight if self.kind == "si" else self.weight / 2
        total = torch.zeros((), dtype=torch.float64)
        for importance, anchor in pairs:
            for name, p in module.named_parameters():
                total = total + factor * (importance[name] * (p - anchor[name]) ** 2).sum()
        return total

    def measure(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensors:
        """Mean over samples of the squared gradient of ln p(y|x), or of |∂‖f‖²|, one backward pass a sample."""
        sums = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
        for i in range(len(x)):
            logits = module(x[i : i + 1])[0]
            value = logits.square().sum() if self.kind == "mas" else logits.log_softmax(0)[y[i]]
            grads = torch.autograd.grad(value, list(module.parameters()))
            for (name, _), g in zip(module.named_parameters(), grads, strict=True):
                sums[name] += (g.abs() if self.kind == "mas" else g**2) / len(x)
        return sums

    def end_task(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        theta = {n: p.detach().clone() for n, p in module.named_parameters()}
        before, t = (self.importances[-1] if self.importances else None), len(self.importances)
        if self.kind == "si":
            xi = self.options["xi"]
            gained = {n: self.omega[n].clamp_min(0) / ((p - self.start[n]) ** 2 + xi) for n, p in theta.items()}
            found = {n: g + (before[n] if before else 0) for n, g in gained.items()}
            self.omega, self.start = {n: torch.zeros_like(p) for n, p in theta.items()}, theta
        else:
            found = self.measure(module, x, y)
            if before is not None and self.kind == "online":
                found = {n: self.options["decay"] * before[n] + f for n, f in found.items()}
            if before is not None and self.kind == "mas":
                found = {n: (t * before[n] + f) / (t + 1) for n, f in found.items()}
        self.importances.append(found)
        self.anchors.append(theta)


def train(
    method: Written, module: Digits, data: PermutedDigits, accumulate: int = 1, clip: float | None = None, samples: int = 20
) -> Digits:
    """Train through the stream in float64, with optimizer steps where the Trainer has them."""
    module = copy.deepcopy(module).double()
    optimizer = module.configure_optimizers()
    named = dict(module.named_parameters())
    method.start = {n: p.detach().clone() for n, p in named.items()}
    method.omega = {n: torch.zeros_like(p) for n, p in named.items()}
    clean = {n: torch.zeros_like(p) for n, p in named.items()}
    batches, steps = list(data.train_dataloader()), data.steps
    for i, (x, y) in enumerate(batches):
        loss = F.cross_entropy(module(x.double()), y) / accumulate
        for (n, _), g in zip(named.items(), torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True):
            clean[n] += g
        (loss + method.penalty(module) / accumulate).backward()
        if (i + 1) % accumulate == 0 or i + 1 == len(batches):
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            before = {n: p.detach().clone() for n, p in named.items()}
            optimizer.step()
            for n, p in named.items():
                method.omega[n] -= clean[n] * (p.detach() - before[n])
            optimizer.zero_grad()
            clean = {n: torch.zeros_like(p) for n, p in named.items()}
        if (i + 1) % steps == 0:
            task = i // steps
            method.end_task(module, data.pixels(task, torch.arange(samples)).double(), data.y[:samples])
    return module

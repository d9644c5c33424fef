"""What the tests of the ExpertMonitor share: a second look on at routers, the literal numbers, a logger that keeps them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

import gateplug as gp
from gateplug.core.objective import in_backward
from gateplug.moe.routing import Tap
from tests.modules import UserModule, loader, trainer
from tests.moe.nets import ids


class Notes(Logger):
    """Keeps what is logged under `moe/`, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "notes"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        mine = {k: v for k, v in metrics.items() if k.startswith("moe/")}
        if mine:
            self.seen.setdefault(step or 0, {}).update(mine)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, router: str, step: int = -1) -> dict[str, float]:
        """The numbers of a router at a step, by default the last one."""
        last = self.seen[list(self.seen)[step]] if step < 0 else self.seen[step]
        return {k.rsplit("/", 1)[1]: v for k, v in last.items() if k.rsplit("/", 1)[0] == f"moe/{router}"}


class Witness(L.Callback):
    """Keeps the output of modules in every training batch, without what is recomputed in backward."""

    def __init__(self, kind: type[nn.Module] | str = Tap) -> None:
        self.kind, self.batches, self.handles = kind, [], []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, module in pl_module.named_modules():
            if type(module).__name__ == self.kind or module.__class__ is self.kind:
                self.handles.append(module.register_forward_hook(self._keep(name.removesuffix(".tap"))))

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            if module.training and not in_backward():
                self.batches[-1].setdefault(name, []).append(out)

        return keep

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches.append({})

    def on_train_end(self, *args: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def rows(self, router: str, batches: slice) -> list[Any]:
        """The outputs of a router in these batches."""
        return [out for batch in self.batches[batches] for out in batch[router]]


def literal(logits: Tensor, assigned: Tensor, q: Tensor) -> dict[str, float]:
    """The monitor's numbers for rows that all count: logits (T, E), chosen (T, k), weights after drops (T, E)."""
    experts, k = logits.shape[-1], assigned.shape[-1]
    counts = [0.0] * experts
    for row in assigned.tolist():
        for expert in row:
            counts[expert] += 1
    p = logits.double().softmax(-1)
    numbers = of_load(counts) | {
        "confidence": float(p.max(-1).values.mean()),
        "entropy": float(-(p * p.log()).sum(-1).mean() / math.log(experts)),
        "importance_cv": of_load(q.double().sum(0).tolist())["load_cv"],
    }
    top = sum(sorted(counts)[-k:]) / sum(counts)
    return numbers | {"collapse": (top - k / experts) / (1 - k / experts)}


def of_load(counts: list[float]) -> dict[str, float]:
    """Statistics of a load."""
    n, mean = len(counts), sum(counts) / len(counts)
    shares = [c / sum(counts) for c in counts if c]
    return {
        "load_cv": math.sqrt(sum((c - mean) ** 2 for c in counts) / n) / mean,
        "max_violation": max(counts) / mean - 1,
        "load_entropy": -sum(s * math.log(s) for s in shares) / math.log(n),
        "dead": float(counts.count(0)),
    }


def fit(module: UserModule, tmp: Path, *plugs: Any, batch_size: int = 8, **settings: Any) -> Notes:
    """Train on digits, in the same order each time."""
    notes = Notes()
    settings = {"logger": notes, **settings}
    trainer(tmp, callbacks=list(plugs), **settings).fit(module, loader(batch_size))
    return notes


class Tokens(L.LightningModule):
    """A Hugging Face model on token ids with padding."""

    def __init__(self, net: nn.Module, lr: float = 0.01, rows: int = 4) -> None:
        super().__init__()
        self.net, self.lr, self.rows = net, lr, rows

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def train_dataloader(self) -> Any:
        batch = ids(rows=self.rows * 6)
        items = [{k: v[i] for k, v in batch.items()} for i in torch.randperm(len(batch["labels"]), generator=_seed()).tolist()]
        return torch.utils.data.DataLoader(items, batch_size=self.rows)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(found: dict[str, float], expected: dict[str, float], rel: float = 1e-5) -> None:
    """Every expected number was found; float32 sums of a few hundred rows."""
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=rel, abs_tol=1e-6), f"{name}: {found[name]} instead of {value}"


def monitor(**kwargs: Any) -> gp.ExpertMonitor:
    """A monitor with a look every four batches."""
    return gp.ExpertMonitor(**{"every_n_steps": 4, **kwargs})

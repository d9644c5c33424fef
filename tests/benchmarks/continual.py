"""Benchmarks of the continual room: `python tests/benchmarks/continual.py [--quick]`.

A training step in a Lightning Trainer with a plug ÷ the same step without it, in the second context, with every parameter held
back in part. `n_gateon`, `p_gateon`: GateON on a network of four hidden layers of 2,000 units, batch 256, AdamW (784 inputs, 10
outputs; 13.6 M parameters); `gates`: gates alone. `text_n_gateon`: n-GateON on a BERT of the size of MiniLM (6 layers, d = 384),
heads and feed-forwards gated, the rest held back weight by weight, batch 16 of 32 tokens. `contexts`: n-GateON with 200 contexts
÷ with two. `context_bytes`: what a further context takes in a checkpoint ÷ four bytes a hidden unit. `ewc`, `si`, `mas`, `replay`: the
baselines on the same network, after a first task (DER++ with a buffer of 500).
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from core import in_turns
from lightning.pytorch.callbacks import Callback
from rounds import Line, arguments, line, report
from torch import Tensor, nn
from torch.nn import functional as F

import gateplug as gp

WIDTHS = (784, 2000, 2000, 2000, 2000)
Training = tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]


def mlp(widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Dense layers with ReLU."""
    parts = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 10))


def dense() -> Training:
    """Four wide layers, a batch of 256."""
    batch = (torch.randn(256, WIDTHS[0]), torch.randint(0, 10, (256,)))
    return mlp(), batch, lambda net, b: F.cross_entropy(net(b[0]), b[1])


def text() -> Training:
    """An encoder of the size of MiniLM."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    ids = torch.randint(5, 1000, (16, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 2, (16,))}
    return BertForSequenceClassification(config), batch, lambda net, b: net(**b).loss


class Second(Callback):
    """Puts the GateON before it into another context, with every parameter held back in part."""

    def __init__(self, plug: gp.GateON, context: int = 1) -> None:
        self.plug, self.context = plug, context

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first step."""
        for availability in self.plug.availabilities().values():
            availability.draft.uniform_()
        for context in range(1, self.context + 1):
            self.plug.switch(pl_module, context)


def gateon(context: int = 1, **kwargs: Any) -> Callable[[], list[Any]]:
    """A GateON that is in a later context."""

    def make() -> list[Any]:
        plug = gp.GateON(**kwargs)
        return [plug, Second(plug, context)]

    return make


class Tasks(Callback):
    """Tells a baseline that a first task is over."""

    def __init__(self, plug: Any) -> None:
        self.plug = plug

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first step: importance of one for every parameter, or a buffer that is full."""
        batch = (torch.randn(500, WIDTHS[0]), torch.randint(0, 10, (500,)))
        if isinstance(self.plug, gp.Replay):
            self.plug.remember(batch, torch.randn(500, 10))
        elif isinstance(self.plug, gp.SynapticIntelligence):
            self.plug.consolidate(pl_module)
        else:
            self.plug.consolidate(pl_module, [(batch[0][:4], batch[1][:4])])


def baseline(make: Callable[[], Any]) -> Callable[[], list[Any]]:
    """A baseline whose penalty (or buffer) is at work."""

    def both() -> list[Any]:
        plug = make()
        return [plug, Tasks(plug)]

    return both


def against_bare(
    key: str, what: str, ours: Any, rounds: int, steps: int, goal: str, training: Any = dense, peer: Any = list
) -> Line:
    """One line."""
    pairs = [in_turns(ours, peer, lambda: False, steps, training) for _ in range(rounds)]
    return line(key, what, pairs, goal)


def context_bytes() -> Line:
    """What a context more takes in a state dict."""

    def size(contexts: int) -> int:
        net, file = mlp(), io.BytesIO()
        gp.GateON(contexts=contexts).attach(net)
        torch.save(net.state_dict(), file)
        return file.tell()

    per_context = (size(60) - size(10)) / 50
    return line("context_bytes", "a further context, ÷ 4 bytes a hidden unit", [(per_context, 4.0 * sum(WIDTHS[1:]))], "≤ 1.1")


def main() -> None:
    """Run what was asked for."""
    args = arguments("Benchmarks of continual learning.")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rounds, steps = (1, 2) if args.quick else (6, 6)
    works: dict[str, Callable[[], Line]] = {
        "n_gateon": lambda: against_bare("n_gateon", "n-GateON, 4 × 2,000 units", gateon(), rounds, steps, "≤ 1.15"),
        "p_gateon": lambda: against_bare("p_gateon", "p-GateON, 4 × 2,000 units", gateon(relevance="parameter"), rounds, steps, "≤ 1.4"),
        "gates": lambda: against_bare("gates", "gates alone", gateon(relevance="none", obstruct="none"), rounds, steps, ""),
        "text_n_gateon": lambda: against_bare("text_n_gateon", "n-GateON, BERT d=384", gateon(), rounds, steps, "", text),
        "contexts": lambda: against_bare(
            "contexts", "200 contexts vs 2", gateon(199, contexts=200), rounds, steps, "≤ 1.05", dense, gateon(1, contexts=2)
        ),
        "context_bytes": context_bytes,
        "ewc": lambda: against_bare("ewc", "EWC after a task", baseline(gp.EWC), rounds, steps, ""),
        "si": lambda: against_bare("si", "SI after a task", baseline(gp.SynapticIntelligence), rounds, steps, ""),
        "mas": lambda: against_bare("mas", "MAS after a task", baseline(gp.MAS), rounds, steps, ""),
        "replay": lambda: against_bare("replay", "DER++, a full buffer", baseline(lambda: gp.Replay(kind="der++")), rounds, steps, ""),
    }  # fmt: skip
    chosen = args.only or (["n_gateon", "p_gateon", "context_bytes"] if args.quick else list(works))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        shown, sys.stdout = sys.stdout, nowhere
        try:
            lines = [works[key]() for key in chosen]
        finally:
            sys.stdout = shown
    report(lines)


if __name__ == "__main__":
    main()

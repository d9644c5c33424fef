"""Benchmarks of the moe room: `python tests/benchmarks/moe.py [--quick] [--figure PATH]`.

`codes_speedup`: forward and backward of `selector_codes` against the product over the bits, written out.
`sparse8_speedup`, `sparse64_speedup`: forward and backward of `gp.MoE` with `gp.ExpertMLP` and a top-2 gate of 8 or 64 experts
against all experts on all tokens by einsum, weighted by the same gate. `sparse_memory_saving`: bytes that both keep for backward,
of 8 experts. `hf_experts_speedup`: `gp.MoE` against Mixtral's layer of transformers, same weights, its default implementation of
the experts. `regulate`: a training step of a tiny Mixtral (d = 128) in a Lightning Trainer with `RegulateRouters` and
`ExpertMonitor` ÷ the same step without them; `regulate_small`: of one with d = 64, whose step is so short that fixed costs weigh more.
`--figure PATH` draws the seconds of a step against the number of experts at k = 2 instead: sparse, dense, and a loop over experts.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from core import in_turns
from glu import kept_bytes, step
from lightning.pytorch.loggers import TensorBoardLogger
from rounds import Line, compare, line, report, seconds
from torch import Tensor, nn

import gateplug as gp
from gateplug.moe.functional import selector_codes, smooth_step


def literal_codes(z: Tensor, experts: int) -> Tensor:
    """r_i = Π_j of S(z_j) or 1 − S(z_j), by the bits of i: m products for each of the E codes, in one tensor."""
    bits = z.shape[-1]
    ones = (torch.arange(experts)[:, None] >> torch.arange(bits - 1, -1, -1) & 1).bool()
    s = smooth_step(z).unsqueeze(-2)
    return torch.where(ones, s, 1 - s).prod(-1)


def codes(rounds: int) -> Line:
    """One call for 64 experts."""
    z = (torch.randn(1024, 2, 6) / 4).requires_grad_()
    torch.testing.assert_close(selector_codes(z, 64), literal_codes(z, 64))

    def work(form: Callable[[Tensor, int], Tensor]) -> Callable[[], float]:
        return lambda: seconds(lambda: torch.autograd.grad(form(z, 64).sum(), z), 2)

    return compare(
        "codes_speedup",
        "selector_codes vs products of bits, 64 experts",
        work(selector_codes),
        work(literal_codes),
        rounds,
        "≥ 2.4",
    )


class Dense(nn.Module):
    """All experts on all tokens."""

    def __init__(self, layer: gp.MoE) -> None:
        super().__init__()
        self.gate, self.experts = layer.gate, layer.experts

    def forward(self, x: Tensor) -> Tensor:
        """(T, d) to (T, d)."""
        e = self.experts
        hidden = torch.nn.functional.gelu(torch.einsum("td,ehd->teh", x, e.w_in) + e.b_in)
        return torch.einsum("te,teo->to", self.gate(x), torch.einsum("teh,eoh->teo", hidden, e.w_out) + e.b_out)


class Loop(Dense):
    """One expert after the other, on the tokens that chose it."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, d) to (T, d)."""
        e, q = self.experts, self.gate(x)
        assert e.b_in is not None
        assert e.b_out is not None
        y = torch.zeros_like(x)
        # unbound at once: the gradient of one w[i] alone is a tensor of all experts
        for i, (w_in, b_in, w_out, b_out) in enumerate(
            zip(e.w_in.unbind(), e.b_in.unbind(), e.w_out.unbind(), e.b_out.unbind(), strict=True)
        ):
            rows = q[:, i].nonzero().squeeze(-1)
            hidden = torch.nn.functional.gelu(nn.functional.linear(x[rows], w_in, b_in))
            y = y.index_add(0, rows, nn.functional.linear(hidden, w_out, b_out) * q[rows, i, None])
        return y


def mixture(experts: int, dim: int = 128, hidden: int = 256) -> gp.MoE:
    """A top-2 mixture whose load is nearly even."""
    layer = gp.MoE(gp.ExpertMLP(experts, dim, hidden, activation="gelu"), gp.TopKGate(experts, 2, dim))
    nn.init.normal_(layer.gate.logits.weight)
    return layer


def sparse(key: str, experts: int, rounds: int, goal: str) -> Line:
    """Sparse against dense."""
    ours, x = mixture(experts), torch.randn(512, 128, requires_grad=True)
    peer = Dense(ours)
    torch.testing.assert_close(ours(x), peer(x), atol=1e-5, rtol=1e-4)
    what = f"gp.MoE vs dense einsum, {experts} experts, 512 tokens"
    return compare(key, what, lambda: seconds(step(ours, x), 1), lambda: seconds(step(peer, x), 1), rounds, goal)


def memory(rounds: int) -> Line:
    """Bytes for backward."""
    ours, x = mixture(8), torch.randn(512, 128)
    what = "kept for backward: gp.MoE vs dense einsum, 8 experts"
    return compare("sparse_memory_saving", what, lambda: kept_bytes(ours, x), lambda: kept_bytes(Dense(ours), x), rounds, "≥ 2.5")


def mixtral(**kwargs: Any) -> nn.Module:
    """A tiny Mixtral."""
    import transformers as hf

    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=64, max_position_embeddings=64, **shape, **kwargs))


def hugging_face(rounds: int) -> Line:
    """Mixtral's layer, taken out of a model, which chooses its implementation of the experts."""
    peer = mixtral(hidden_size=128, intermediate_size=256, num_hidden_layers=1).model.layers[0].mlp
    ours = gp.MoE(gp.ExpertMLP(8, 128, 256, "silu", bias=False, gated=True), gp.TopKGate(8, 2, 128))
    for p in peer.parameters():
        nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        ours.gate.logits.weight.copy_(peer.gate.weight)
        ours.experts.w_in.copy_(peer.experts.gate_up_proj)
        ours.experts.w_out.copy_(peer.experts.down_proj)
    x = torch.randn(1, 512, 128, requires_grad=True)
    torch.testing.assert_close(ours(x), peer(x), atol=1e-4, rtol=1e-4)
    what = "gp.MoE vs MixtralSparseMoeBlock, 8 experts, 512 tokens"
    return compare(
        "hf_experts_speedup", what, lambda: seconds(step(ours, x), 2), lambda: seconds(step(peer, x), 2), rounds, "≥ 1.0"
    )


def language(dim: int) -> tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]:
    """A tiny Mixtral on random tokens."""
    ids = torch.randint(3, 64, (16, 64))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    return mixtral(hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=2), batch, lambda net, b: net(**b).loss


def regulate(key: str, dim: int, rounds: int, steps: int = 50) -> Line:
    """The cost of regularised and watched routers; a round is two pairs of trainings with the sides exchanged, see core.py."""

    def ours() -> list[Any]:
        return [gp.RegulateRouters(load_balance=0.01, z_loss=1e-3), gp.ExpertMonitor(every_n_steps=steps)]

    with tempfile.TemporaryDirectory() as folder:
        training = functools.partial(language, dim)
        pairs = [in_turns(ours, list, lambda: TensorBoardLogger(folder), steps, training) for _ in range(rounds)]
    return line(key, f"step with both plugs vs without, Mixtral d={dim}, 2 layers", pairs, "≤ 1.05")


def figure(path: Path) -> None:
    """Seconds of a step against the number of experts, k = 2: the median of steps in turns."""
    from matplotlib.figure import Figure

    numbers, x = [4, 8, 16, 32, 64, 128, 256], torch.randn(512, 128, requires_grad=True)
    cost: dict[str, list[float]] = {"all experts on all tokens (einsum)": [], "a loop over experts": [], "gp.MoE": []}
    for experts in numbers:
        layer = mixture(experts)
        works = [step(form, x) for form in (Dense(layer), Loop(layer), layer)]
        rounds = [[seconds(work, 1) for work in works] for _ in range(11)][1:]
        for name, times in zip(cost, zip(*rounds, strict=True), strict=True):
            cost[name].append(1e3 * statistics.median(times))
        print(experts, {name: f"{times[-1]:.2f} ms" for name, times in cost.items()})
    picture = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = picture.subplots()
    for (name, times), color, mark in zip(cost.items(), ("#8c8c8c", "#d6604d", "#2166ac"), "svo", strict=True):
        axes.plot(numbers, times, marker=mark, color=color, label=name)
        axes.annotate(
            f"{times[-1]:,.0f} ms", (numbers[-1], times[-1]), (5, -3), textcoords="offset points", fontsize=8, color=color
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(3.5, 520)
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.set(xlabel="experts (128 → 256 → 128), of which a token uses two", ylabel="forward and backward, ms")
    axes.set_title(f"Two of many experts, 512 tokens, one thread (torch {torch.__version__})", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=110)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="Benchmarks of the moe room.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: at most 45 s on two free cores")
    parser.add_argument("--only", nargs="*", help="these keys alone")
    parser.add_argument("--figure", type=Path, help="draw the cost against the number of experts into this file instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    if args.figure:
        figure(args.figure)
        return
    few = args.quick
    every = {
        "codes_speedup": lambda: codes(60 if few else 400),
        "sparse8_speedup": lambda: sparse("sparse8_speedup", 8, 50 if few else 300, "≥ 2.5"),
        "sparse64_speedup": lambda: sparse("sparse64_speedup", 64, 16 if few else 100, "≥ 10"),
        "sparse_memory_saving": lambda: memory(2),
        "hf_experts_speedup": lambda: hugging_face(150 if few else 800),
        "regulate": lambda: regulate("regulate", 128, 1 if few else 12),
        "regulate_small": lambda: regulate("regulate_small", 64, 1 if few else 8),
    }
    sys.stdout, shown = open(os.devnull, "w"), sys.stdout  # noqa: SIM115  # plugs print tables at the start of each fit
    lines = [measure() for key, measure in every.items() if not args.only or key in args.only]
    sys.stdout = shown
    report(lines)


if __name__ == "__main__":
    main()

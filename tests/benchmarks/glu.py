"""Benchmarks of the glu room: `python tests/benchmarks/glu.py [--quick]`.

`t5_speedup`, `llama_speedup`: forward and backward of `gp.GLU` against Hugging Face's gated feed-forward of T5 and Llama's MLP, of
the same shape, activation and weights. `recompute_saving`: bytes kept from forward to backward, plain autograd ÷ `recompute=True`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rounds import Line, arguments, compare, report, seconds
from torch import Tensor, nn
from transformers import LlamaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

import gateplug as gp

DIM, HIDDEN, TOKENS = 256, 680, 256


def with_weights(ours: gp.GLU, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> gp.GLU:
    """Copy the peer's weights."""
    for mine, theirs in ((ours.gate, gate), (ours.up, up), (ours.down, down)):
        mine.load_state_dict(theirs.state_dict())
    return ours


def t5_pair() -> tuple[gp.GLU, nn.Module]:
    """T5 1.1's layer (tanh form of GELU, no bias, no dropout) and ours."""
    config = T5Config(d_model=DIM, d_ff=HIDDEN, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    peer = T5DenseGatedActDense(config)
    return with_weights(gp.GLU(DIM, HIDDEN, "gelu_tanh"), peer.wi_0, peer.wi_1, peer.wo), peer


def llama_pair() -> tuple[gp.GLU, nn.Module]:
    """Llama's layer (SiLU, no bias) and ours."""
    peer = LlamaMLP(LlamaConfig(hidden_size=DIM, intermediate_size=HIDDEN, hidden_act="silu"))
    return with_weights(gp.GLU(DIM, HIDDEN, "silu"), peer.gate_proj, peer.up_proj, peer.down_proj), peer


def step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward and backward; gradients of the input and of all weights, made anew each time."""
    leaves = [x, *layer.parameters()]

    def work() -> None:
        torch.autograd.grad(layer(x).sum(), leaves)

    return work


def speedup(key: str, what: str, pair: tuple[gp.GLU, nn.Module], rounds: int) -> Line:
    """Ours against the peer; they must compute the same."""
    ours, peer = pair
    x = torch.randn(1, TOKENS, DIM, requires_grad=True)
    torch.testing.assert_close(ours(x), peer(x), atol=1e-6, rtol=1e-5)
    return compare(key, what, lambda: seconds(step(ours, x), 4), lambda: seconds(step(peer, x), 4), rounds, "≥ 1.0")


def kept_bytes(layer: nn.Module, x: Tensor) -> float:
    """Bytes that autograd keeps from forward to backward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    total = float(sum(kept.values()))
    out.sum().backward()
    return total


def saving(key: str, rounds: int) -> Line:
    """Plain autograd against recompute=True, for SwiGLU at T5-small's proportions."""
    x = torch.randn(1, 512, 384)
    plain, saved = gp.GLU(384, 1024, "silu"), gp.GLU(384, 1024, "silu", recompute=True)
    saved.load_state_dict(plain.state_dict())
    torch.testing.assert_close(saved(x), plain(x))
    what = "kept for backward: recompute vs autograd"
    return compare(key, what, lambda: kept_bytes(saved, x), lambda: kept_bytes(plain, x), rounds, "≥ 1.7")


def main() -> None:
    """Run what was asked for."""
    args = arguments("Benchmarks of the glu room.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = 150 if args.quick else 600
    shape = f"{TOKENS} tokens, {DIM}→2·{HIDDEN}→{DIM}"
    every = {
        "t5_speedup": lambda: speedup("t5_speedup", f"gp.GLU vs T5DenseGatedActDense, {shape}", t5_pair(), rounds),
        "llama_speedup": lambda: speedup("llama_speedup", f"gp.GLU vs LlamaMLP, {shape}", llama_pair(), rounds),
        "recompute_saving": lambda: saving("recompute_saving", 2),
    }
    report([measure() for key, measure in every.items() if not args.only or key in args.only])


if __name__ == "__main__":
    main()

"""The formulas, literally, and what must hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

import gateplug as gp
from gateplug.glu import functional as G

LITERAL = {
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "linear": lambda z: z,
    "relu": lambda z: max(0.0, z),
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + math.exp(-z)),
    "quick_gelu": lambda z: z / (1 + math.exp(-1.702 * z)),
}


def weights(d: int = 5, h: int = 7, out: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(3, d), (h, d), (h, d), (out, h), (h,), (h,), (out,)]
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("form", [G.glu, G.glu_recompute])
def test_block_is_the_formula_written_in_loops(name: str, form: object) -> None:
    x, wg, wu, wd, bg, bu, bd = weights()
    act = LITERAL[name]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(3):
        a = [act(float(bg[j] + sum(wg[j, k] * x[i, k] for k in range(5)))) for j in range(7)]
        b = [float(bu[j] + sum(wu[j, k] * x[i, k] for k in range(5))) for j in range(7)]
        for o in range(4):
            expected[i, o] = bd[o] + sum(wd[o, j] * a[j] * b[j] for j in range(7))
    assert torch.allclose(form(x, wg, wu, wd, name, bg, bu, bd), expected, rtol=1e-12, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("name", LITERAL)
def test_recomputed_gradients_equal_autograds_and_finite_differences(name: str) -> None:
    args = weights()
    for form in (G.glu, G.glu_recompute):
        leaves = [t.clone().requires_grad_() for t in args]
        x, wg, wu, wd, bg, bu, bd = leaves
        form(x, wg, wu, wd, name, bg, bu, bd).sin().sum().backward()
        grads = [t.grad for t in leaves]
        if form is G.glu:
            expected = grads
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(grads, expected, strict=True))
    x, wg, wu, wd, bg, bu, bd = [t.clone().requires_grad_() for t in args]
    assert torch.autograd.gradcheck(lambda *t: G.glu_recompute(t[0], t[1], t[2], t[3], name, *t[4:]), (x, wg, wu, wd, bg, bu, bd))


@pytest.mark.parametrize("name", ["silu", "gelu", "sigmoid", "linear", "quick_gelu"])
def test_gradients_of_recomputed_gradients_are_right(name: str) -> None:
    x, wg, wu, wd, bg, bu, bd = [t.requires_grad_() for t in weights(3, 4, 2)]
    assert torch.autograd.gradgradcheck(
        lambda *t: G.glu_recompute(t[0], t[1], t[2], t[3], name, *t[4:]), (x, wg, wu, wd, bg, bu, bd)
    )
    grads = []
    for form in (G.glu, G.glu_recompute):
        (grad,) = torch.autograd.grad(form(x, wg, wu, wd, name).sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(grad.square().sum(), wg)[0])
    assert torch.allclose(*grads, rtol=1e-10)


@pytest.mark.parametrize("name", ["silu", "gelu", "sigmoid"])
def test_recompute_works_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    plain = gp.GLU(8, 16, name)
    saving = gp.GLU(8, 16, name, recompute=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 8)
    for layer in (plain, saving):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype == torch.float32
        assert torch.allclose(a.grad, b.grad, rtol=0.02, atol=0.02)


def kept(layer: nn.Module, tokens: int, dim: int) -> float:
    """Numbers a token that autograd keeps, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(tokens, dim, requires_grad=True))
    return sum(seen.values()) / tokens


@pytest.mark.parametrize(("name", "branches"), [("silu", 4), ("gelu", 4), ("relu", 3), ("sigmoid", 3), ("quick_gelu", 5)])
def test_numbers_kept_for_backward(name: str, branches: int) -> None:
    dim, hidden = 24, 64
    plain, saving = (kept(gp.GLU(dim, hidden, name, recompute=r), 10, dim) for r in (False, True))
    assert plain == dim + branches * hidden
    assert saving == dim + 2 * hidden


def test_hugging_face_t5_and_llama_layers_agree() -> None:
    torch.manual_seed(0)
    t5 = T5DenseGatedActDense(T5Config(d_model=12, d_ff=20, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    llama = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2))
    pairs = [(t5, "gelu_tanh", (t5.wi_0, t5.wi_1, t5.wo)), (llama, "silu", (llama.gate_proj, llama.up_proj, llama.down_proj))]
    x = torch.randn(3, 5, 12)
    for layer, name, parts in pairs:
        own = gp.GLU(12, 20, name)
        for mine, theirs in zip((own.gate, own.up, own.down), parts, strict=True):
            mine.weight.data.copy_(theirs.weight)
        assert torch.allclose(own(x), layer(x), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(hidden=st.integers(1, 20_000), multiple=st.integers(1, 256))
def test_matched_width_is_two_thirds_to_half_a_multiple(hidden: int, multiple: int) -> None:
    matched = G.matched_hidden(hidden, multiple)
    assert matched % multiple == 0
    assert matched >= multiple
    assert matched == multiple or abs(matched - 2 * hidden / 3) <= multiple / 2 + 1e-9


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(list(LITERAL)), scale=st.floats(0.1, 5.0))
def test_openness_lies_in_the_unit_interval_and_bilinear_has_none(name: str, scale: float) -> None:
    z = torch.randn(50, generator=torch.Generator().manual_seed(1)) * scale
    openness = G.openness(z, name)
    if name == "linear":
        assert openness is None
        return
    assert openness is not None
    assert bool(((openness >= 0) & (openness <= 1)).all())
    if name in ("silu", "quick_gelu", "gelu"):
        # these activations are z times their openness
        assert torch.allclose(z * openness, G.activation(name)(z), atol=1e-5)


EXACT = [(a, a) for a in LITERAL] + [("silu", "sigmoid"), ("quick_gelu", "sigmoid")]


@pytest.mark.parametrize(("dense", "gated"), EXACT)
@pytest.mark.parametrize("bias", [True, False])
def test_warm_start_is_exact_and_both_branches_learn(dense: str, gated: str, bias: bool) -> None:
    x, w, _, wd, b, *_ = weights()
    b_in = b if bias else None
    start = [t.requires_grad_() for t in G.warm_start(w, b_in, dense, gated)]
    out = G.glu(x, start[0], start[2], wd, gated, start[1], start[3])
    expected = G.activation(dense)(torch.nn.functional.linear(x, w, b_in)) @ wd.T
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    assert all(bool(t.grad.any()) for t in start)


def test_warm_start_that_is_not_exact_names_the_exact_choice() -> None:
    w = torch.eye(3)
    for dense in LITERAL:
        for gated in LITERAL:
            if (dense, gated) not in EXACT:
                with pytest.raises(ValueError, match=f"'{dense}'"):
                    G.warm_start(w, None, dense, gated)


def test_nearest_start_takes_the_better_candidate() -> None:
    w = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) / 4
    start, off = G.nearest_start(w, None, "gelu", "sigmoid")
    assert torch.allclose(start[0], 1.702 * w), "GELU is near z σ(1.702 z)"
    assert off < 0.05
    assert G.nearest_start(w, None, "gelu", "gelu_tanh")[1] < 0.01
    assert G.nearest_start(w, None, "relu", "relu")[1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_pass_through(dtype: torch.dtype) -> None:
    x, wg, wu, wd, *_ = (t.to(dtype) for t in weights())
    assert G.glu(x, wg, wu, wd, "silu").dtype == G.glu_recompute(x, wg, wu, wd, "silu").dtype == dtype

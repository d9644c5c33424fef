"""Gated feed-forwards as pure functions (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gateplug.core.activations import ACTIVATIONS, Activation

GATED = {name: f for name, f in ACTIVATIONS.items() if name != "tanh"}
"""Activations of the gate branch, by name."""

VARIANTS = {
    "glu": "sigmoid",
    "bilinear": "linear",
    "reglu": "relu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "swiglu": "silu",
}
"""The published variants and the activation of each."""

_COPIED_UP = {("silu", "sigmoid"): 1.0, ("quick_gelu", "sigmoid"): 1.702}
"""Dense activation z·σ(c z) written as gate σ(c z) times up z, with its c."""


def activation(name: str) -> Activation:
    """The activation of a gate branch by its name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in GATED:
        raise ValueError(f"activation={name!r} is not known; allowed are {', '.join(GATED)}")
    return GATED[name]


def product(
    x: Tensor, w_gate: Tensor, w_up: Tensor, name: str, b_gate: Tensor | None = None, b_up: Tensor | None = None
) -> Tensor:
    """act(x Gᵀ + g) ⊗ (x Uᵀ + u): `(…, d)` to `(…, h)`; see :func:`glu`."""
    return activation(name)(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)


def glu(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """Gated feed-forward (act(x Gᵀ + g) ⊗ (x Uᵀ + u)) Dᵀ + e, arXiv 2002.05202 eqs. (5) and (6).

    Args:
        x: `(…, d)`.
        w_gate: G, `(h, d)`.
        w_up: U, `(h, d)`.
        w_down: D, `(out, h)`.
        activation: `sigmoid` (GLU), `linear` (Bilinear), `relu` (ReGLU), `gelu` (GEGLU, exact), `gelu_tanh`, `silu` (SwiGLU) or
            `quick_gelu`.
        b_gate: g, `(h,)`.
        b_up: u, `(h,)`.
        b_down: e, `(out,)`.

    Returns:
        `(…, out)`.

    Raises:
        ValueError: unknown activation.
    """
    return F.linear(product(x, w_gate, w_up, activation, b_gate, b_up), w_down, b_down)


def glu_recompute(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """The same as :func:`glu` with less memory until backward.

    Kept are x and the two projections, d + 2h numbers a token; the activation and the product are computed again in
    backward, without another matrix product. Autograd alone keeps d + 3h to d + 5h.
    """
    a, b = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    return gated_down(a, b, w_down, activation, b_down)


def gated_down(a: Tensor, b: Tensor, w_down: Tensor, name: str, b_down: Tensor | None = None) -> Tensor:
    """(act(a) ⊗ b) Dᵀ + e from the projections `a`, `b` `(…, h)`, keeping only these two for backward."""
    activation(name)
    if torch.is_autocast_enabled(a.device.type):
        # a custom Function runs outside of autocast: do here what F.linear would do inside
        dtype = torch.get_autocast_dtype(a.device.type)
        a, b, w_down = a.to(dtype), b.to(dtype), w_down.to(dtype)
        b_down = None if b_down is None else b_down.to(dtype)
    out: Tensor = _GatedDown.apply(a, b, w_down, b_down, name)  # type: ignore[no-untyped-call]
    return out


def gated(a: Tensor, b: Tensor, name: str) -> Tensor:
    """act(a) ⊗ b, keeping only `a` and `b` for backward."""
    activation(name)
    out: Tensor = _Gated.apply(a, b, name)  # type: ignore[no-untyped-call]
    return out


def slope(a: Tensor, name: str) -> Tensor:
    """act'(a), in operations that autograd and torch.compile can follow."""
    if name == "linear":
        return torch.ones_like(a)
    if name == "relu":
        return (a > 0).to(a.dtype)
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
        return cdf + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (a + 0.044715 * a**3))
        return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * c * (1 + 3 * 0.044715 * a * a)
    factor = 1.702 if name == "quick_gelu" else 1.0
    s = torch.sigmoid(factor * a)
    return s * (1 - s) if name == "sigmoid" else s * (1 + factor * a * (1 - s))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.name = name
        return GATED[name](a) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return grad * b * slope(a, ctx.name), grad * GATED[ctx.name](a), None


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, w_down: Tensor, b_down: Tensor | None, name: str) -> Tensor:
        ctx.save_for_backward(a, b, w_down)
        ctx.name = name
        return F.linear(GATED[name](a) * b, w_down, b_down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
        a, b, w_down = ctx.saved_tensors
        value = GATED[ctx.name](a)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_product = grad @ w_down
        need = ctx.needs_input_grad
        grad_down = rows.T @ (value * b).reshape(-1, value.shape[-1]) if need[2] else None
        return grad_product * b * slope(a, ctx.name), grad_product * value, grad_down, rows.sum(0) if need[3] else None, None


def openness(a: Tensor, name: str) -> Tensor | None:
    """How open a gate with pre-activation `a` is, in [0, 1]; None for `linear`, which has no gate.

    σ(a) for sigmoid and silu, σ(1.702 a) for quick_gelu, Φ(a) for both forms of gelu, 1[a > 0] for relu.
    """
    if name in ("sigmoid", "silu"):
        return torch.sigmoid(a)
    if name == "quick_gelu":
        return torch.sigmoid(1.702 * a)
    if name in ("gelu", "gelu_tanh"):
        return 0.5 * (1 + torch.erf(a / math.sqrt(2)))
    return (a > 0).to(a.dtype) if name == "relu" else None


def matched_hidden(hidden: int, multiple_of: int = 8) -> int:
    """Hidden width of a gated block with the parameters of a plain one: max(m, m · round(2 · hidden / (3 m))).

    Three matrices instead of two make 2/3 of the width; 3072 gives 2048 (T5-base).

    Raises:
        ValueError: `hidden` or `multiple_of` < 1.
    """
    if hidden < 1 or multiple_of < 1:
        raise ValueError(f"hidden={hidden} and multiple_of={multiple_of} must be ≥ 1")
    return max(multiple_of, multiple_of * round(2 * hidden / (3 * multiple_of)))


def warm_start(w_in: Tensor, b_in: Tensor | None, dense: str, gated: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of a gated block that computes exactly what a plain block act(x W₁ᵀ + b₁) computes.

    With gated = dense, the up branch starts as the constant 1 (U = 0, u = 1) and receives gradient from the first step. From
    silu or quick_gelu to sigmoid, both branches are the block's own projection: z σ(c z) is a product already.

    Args:
        w_in: W₁, `(h, d)`.
        b_in: b₁, `(h,)`, or None for a block without.
        dense: the plain block's activation.
        gated: the gate's activation.

    Returns:
        `(w_gate, b_gate, w_up, b_up)`, of the shapes of W₁ and b₁.

    Raises:
        ValueError: the two activations do not allow it (gelu to silu, say); names the one that does.
    """
    activation(gated)
    activation(dense)
    bias = torch.zeros_like(w_in[:, 0]) if b_in is None else b_in
    if dense == gated:
        return w_in.clone(), bias.clone(), torch.zeros_like(w_in), torch.ones_like(bias)
    factor = _COPIED_UP.get((dense, gated))
    if factor is None:
        also = " or 'sigmoid'" if dense in ("silu", "quick_gelu") else ""
        raise ValueError(f"no gated block with activation {gated!r} equals a plain one with {dense!r}; {dense!r}{also} does")
    return factor * w_in, factor * bias, w_in.clone(), bias.clone()


def nearest_start(
    w_in: Tensor, b_in: Tensor | None, dense: str, gated: str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], float]:
    """The warm start that comes nearest where :func:`warm_start` has no exact one.

    Tried are a constant up branch and both branches from the block's projection, the gate's argument times 1 or 1.702.

    Returns:
        The weights as from :func:`warm_start`, and the relative error of the hidden units, ‖h' - h‖ / ‖h‖, for
        standard normal inputs.
    """
    target = activation(dense)
    gate = activation(gated)
    bias = torch.zeros_like(w_in[:, 0]) if b_in is None else b_in
    x = torch.randn(256, w_in.shape[1], generator=torch.Generator().manual_seed(0)).to(w_in)
    z = F.linear(x, w_in, bias)
    starts = [(w_in.clone(), bias.clone(), torch.zeros_like(w_in), torch.ones_like(bias))]
    starts += [(c * w_in, c * bias, w_in.clone(), bias.clone()) for c in (1.0, 1.702)]
    errors = [
        float((gate(F.linear(x, g, gb)) * F.linear(x, u, ub) - target(z)).norm() / target(z).norm().clamp_min(1e-12))
        for g, gb, u, ub in starts
    ]
    best = min(range(len(starts)), key=errors.__getitem__)
    return starts[best], errors[best]

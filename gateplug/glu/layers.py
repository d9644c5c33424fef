"""Gated feed-forward layers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gateplug.core.gate import Gate
from gateplug.glu import functional


class GatedProduct(Gate):
    """act(x Gᵀ + g) ⊗ (x Uᵀ + u): `(…, dim)` to `(…, hidden)`, the part of a gated feed-forward before its last projection.

    It stands in the slot of a plain block's first linear; sub-modules `gate` and `up`.

    Args:
        dim: input width d.
        hidden: width h of both branches.
        activation: of the gate branch, see :func:`gateplug.glu.functional.glu`.
        bias: whether both branches have one.
        recompute: keep only the two projections for backward.

    Raises:
        ValueError: unknown activation, or a width < 1.
    """

    room: ClassVar[str] = "glu"

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "sigmoid",
        bias: bool = False,
        recompute: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        functional.activation(activation)
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim={dim} and hidden={hidden} must be ≥ 1")
        self.activation, self.recompute = activation, recompute
        self.in_features, self.out_features = dim, hidden
        self.gate = nn.Linear(dim, hidden, bias, device, dtype)
        self.up = nn.Linear(dim, hidden, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, dim)` to `(…, hidden)`."""
        a, b = self.branches(x)
        if not self.recompute:
            return functional.activation(self.activation)(a) * b
        out = functional.gated(a, b, self.activation)
        if not torch.compiler.is_compiling():  # a compiler chooses by itself what it keeps
            out.branches = (a, b, out._version)  # type: ignore[attr-defined]
        return out

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both projections of `x`, `(…, hidden)` each; records how open the gate is if somebody is looking."""
        a = self.gate(x)
        if self.recording and (openness := functional.openness(a.detach(), self.activation)) is not None:
            self.record(openness)
        return a, self.up(x)

    def extra_repr(self) -> str:
        """The activation, and recompute when it is on."""
        return f"activation={self.activation!r}" + (", recompute=True" if self.recompute else "")


class GLU(GatedProduct):
    """Gated feed-forward (act(x Gᵀ + g) ⊗ (x Uᵀ + u)) Dᵀ + e (arXiv 2002.05202, eqs. 5 and 6).

    Sub-modules `gate`, `up` and `down`, each an `nn.Linear`.

    Args:
        dim: input width d.
        hidden: hidden width h; `functional.matched_hidden` gives the one with the parameters of a plain block.
        activation: `sigmoid` (GLU), `linear` (Bilinear), `relu` (ReGLU), `gelu` (GEGLU), `gelu_tanh`, `silu` (SwiGLU),
            `quick_gelu`.
        bias: biases in all three projections; the paper has none.
        out_dim: output width, `dim` if None.
        dropout: probability, on the product, as in T5.
        recompute: keep d + 2h numbers a token for backward instead of d + 3h to d + 5h; the same gradients. With dropout
            at work the dropped product is kept as well.

    Raises:
        ValueError: unknown activation, a width < 1, or a dropout outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "sigmoid",
        bias: bool = False,
        out_dim: int | None = None,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__(dim, hidden, activation, bias, recompute)
        if out_dim is not None and out_dim < 1:
            raise ValueError(f"out_dim={out_dim} must be ≥ 1, or None for {dim}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1]")
        self.out_features = out_dim or dim
        self.down = nn.Linear(hidden, self.out_features, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, dim)` to `(…, out_dim)`."""
        if not self.recompute or (self.training and self.dropout.p):
            out: Tensor = self.down(self.dropout(super().forward(x)))
            return out
        a, b = self.branches(x)
        return functional.gated_down(a, b, self.down.weight, self.activation, self.down.bias)


class FFN(nn.Module):
    """Plain feed-forward act(x W₁ᵀ + b₁) W₂ᵀ + b₂, for comparisons.

    Args:
        dim: input and output width.
        hidden: hidden width.
        activation: one of those of :class:`GLU`.
        bias: biases in both projections.

    Raises:
        ValueError: unknown activation, or a width < 1.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "relu", bias: bool = False) -> None:
        super().__init__()
        functional.activation(activation)
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim={dim} and hidden={hidden} must be ≥ 1")
        self.activation = activation
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, dim)` to `(…, dim)`."""
        out: Tensor = self.down(functional.activation(self.activation)(self.up(x)))
        return out


class PlainActivation(nn.Module):
    """One of the known activations as a module.

    Args:
        name: see :class:`GLU`.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        functional.activation(name)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise."""
        return functional.activation(self.name)(x)

    def extra_repr(self) -> str:
        """The function's name."""
        return self.name


class RecomputingDown(nn.Module):
    """The last projection of a block whose :class:`GatedProduct` recomputes: it does not keep the product either.

    It takes over the parameters of the linear in whose slot it stands. Where something (dropout at work) stands between
    the two, it is an ordinary linear.
    """

    def __init__(self, linear: nn.Module, activation: str) -> None:
        super().__init__()
        self.transposed = not isinstance(linear, nn.Linear)  # Hugging Face's Conv1D holds (in, out)
        self.weight: nn.Parameter = linear.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map `(…, hidden)` to `(…, out)`."""
        weight = self.weight.T if self.transposed else self.weight
        branches = None if torch.compiler.is_compiling() else getattr(x, "branches", None)
        if branches is None or branches[2] != x._version:  # something stood between, or changed the product in place
            return nn.functional.linear(x, weight, self.bias)
        a, b, _ = branches
        return functional.gated_down(a, b, weight, self.activation, self.bias)

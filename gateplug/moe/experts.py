"""The experts of a mixture: any modules, or two-layer networks of one shape with stacked weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gateplug.core.activations import ACTIVATIONS
from gateplug.core.cost import still
from gateplug.core.errors import listed, real_numbers, whole_numbers
from gateplug.core.graph import keep
from gateplug.moe.functional import grouped_linear


class ExpertList(nn.ModuleList):
    """Experts that are any modules; each runs once, on the rows that need it."""

    def run(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows `(P, …)` sorted by expert, `counts` (E,) of them each, to outputs `(P, …)`."""
        sizes: list[int] = counts.tolist()
        parts = torch.split(rows, sizes)
        outs = [self._one(i, part) for i, part in enumerate(parts) if sizes[i]]
        if not outs:
            outs = [self._one(0, rows)]  # no rows at all: the shape of what would come out
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return keep(out, (p for i, expert in enumerate(self) if not sizes[i] for p in expert.parameters()))

    def every(self, rows: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """All experts, or those chosen, on all rows `(R, …)`: `(S, R, …)`."""
        which = range(len(self)) if chosen is None else chosen
        out = torch.stack([self._one(i, rows) for i in which])
        return keep(out, (p for i, expert in enumerate(self) if i not in which for p in expert.parameters()))

    def select(self, chosen: Sequence[int]) -> ExpertList:
        """The chosen experts alone, the same modules."""
        return ExpertList([self[i] for i in chosen])

    def _one(self, i: int, rows: Tensor) -> Tensor:
        out = self[i](rows)
        if not isinstance(out, Tensor):
            raise TypeError(f"expert {i} ({type(self[i]).__name__}) returns a {type(out).__name__}; an expert returns one tensor")
        if out.shape[:1] != rows.shape[:1]:
            raise ValueError(f"expert {i} maps {len(rows)} rows to shape {tuple(out.shape)}; it must keep the number of rows")
        return out

    def check(self, dim: int) -> None:
        """Run every expert once on two rows of zeros of width `dim`, in eval mode.

        Raises:
            TypeError: one does not return a tensor.
            ValueError: their outputs differ in shape, or one does not take such rows.
        """
        p = next(self.parameters(), torch.zeros(()))
        if p.is_meta:
            return
        shapes: dict[int, tuple[int, ...]] = {}
        with still(self), torch.random.fork_rng(devices=[]):
            for i, expert in enumerate(self):
                try:
                    shapes[i] = tuple(self._one(i, torch.zeros(2, dim, device=p.device, dtype=p.dtype)).shape[1:])
                except RuntimeError as error:
                    first = next((m for m in expert.modules() if m._parameters), None)
                    if not isinstance(first, nn.Linear):
                        return  # experts on images, with a gate that looks at something else: seen when they run
                    name = type(expert).__name__
                    raise ValueError(
                        f"expert {i} ({name}) does not take rows of width {dim}, as the gate does: {error}. Give dim= if the "
                        "gate looks at other rows (route)"
                    ) from error
        if len(set(shapes.values())) > 1:
            have = listed(f"{i}: {s}" for i, s in shapes.items())
            raise ValueError(f"experts must have outputs of one shape, and have {have} for rows of width {dim}")


class ExpertMLP(nn.Module):
    """E two-layer experts of one shape, act(x W_inᵀ + b_in) W_outᵀ + b_out, with stacked weights: one grouped product a layer.

    Parameters `w_in` (E, hidden, dim), `w_out` (E, out, hidden), `b_in` (E, hidden), `b_out` (E, out); gated: `w_in`
    (E, 2 · hidden, dim), first the gate's rows, then the value's.

    Args:
        experts: E, ≥ 1.
        dim: input width.
        hidden: hidden width.
        activation: a name of :data:`gateplug.core.activations.ACTIVATIONS`.
        bias: biases in both layers.
        out_dim: output width, `dim` if None.
        gated: act(x Gᵀ) ⊗ x Uᵀ in place of act(x W_inᵀ) (SwiGLU with `silu`).
        dropout: probability, on the hidden units.

    Raises:
        ValueError: a width < 1, an unknown activation, a dropout outside [0, 1].
        TypeError: a width that is no whole number.
    """

    def __init__(
        self,
        experts: int,
        dim: int,
        hidden: int,
        activation: str = "relu",
        bias: bool = True,
        out_dim: int | None = None,
        gated: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole_numbers(experts=experts, dim=dim, hidden=hidden, out_dim=out_dim or dim)
        real_numbers(dropout=dropout)
        if min(experts, dim, hidden, out_dim or 1) < 1:
            raise ValueError(f"experts={experts}, dim={dim}, hidden={hidden} and out_dim={out_dim} must be ≥ 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not known; allowed are {listed(ACTIVATIONS)}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1]")
        self.dim, self.hidden, self.out_dim = dim, hidden, out_dim or dim
        self.activation, self.gated, self.dropout = activation, gated, dropout
        inner = 2 * hidden if gated else hidden
        self.w_in = nn.Parameter(torch.empty(experts, inner, dim))
        self.w_out = nn.Parameter(torch.empty(experts, self.out_dim, hidden))
        self.b_in = nn.Parameter(torch.empty(experts, inner)) if bias else None
        self.b_out = nn.Parameter(torch.empty(experts, self.out_dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `nn.Linear`: uniform in ± 1/√fan-in."""
        for weight, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            for p in (weight, bias):
                if p is not None:
                    p.uniform_(-1 / math.sqrt(weight.shape[-1]), 1 / math.sqrt(weight.shape[-1]))

    def __len__(self) -> int:
        return len(self.w_in)

    def run(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows `(P, dim)` sorted by expert, `counts` (E,) of them each, to outputs `(P, out)`."""
        hidden = self._activated(grouped_linear(rows, counts, self.w_in, self.b_in))
        return grouped_linear(hidden, counts, self.w_out, self.b_out)

    def every(self, rows: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """All experts, or those chosen, on all rows `(R, dim)`: `(S, R, out)`."""
        w_in, b_in, w_out, b_out = (
            p if p is None or chosen is None else p[list(chosen)] for p in (self.w_in, self.b_in, self.w_out, self.b_out)
        )
        assert w_in is not None
        assert w_out is not None
        hidden = torch.einsum("rd,shd->srh", rows, w_in)
        hidden = self._activated(hidden if b_in is None else hidden + b_in[:, None].to(hidden.dtype))
        out = torch.einsum("srh,soh->sro", hidden, w_out)
        return out if b_out is None else out + b_out[:, None].to(out.dtype)

    def select(self, chosen: Sequence[int]) -> ExpertMLP:
        """The chosen experts alone, as a copy."""
        new = ExpertMLP(
            len(chosen), self.dim, self.hidden, self.activation, self.b_in is not None, self.out_dim, self.gated, self.dropout
        )
        for name, p in self.named_parameters():
            setattr(new, name, nn.Parameter(p.detach()[list(chosen)].clone(), p.requires_grad))
        if self.b_out is None:  # a feed-forward with a bias in its first layer alone
            new.b_out = None
        return new.train(self.training)

    def check(self, dim: int) -> None:
        """Raise ValueError unless the experts take rows of width `dim`."""
        if dim != self.dim:
            raise ValueError(
                f"the experts take rows of width {self.dim}, and the gate rows of width {dim}; give dim={self.dim} if the gate "
                "looks at other rows (route)"
            )

    def _activated(self, hidden: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate, value = hidden.chunk(2, -1)
            hidden = act(gate) * value
        else:
            hidden = act(hidden)
        return F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden

    def extra_repr(self) -> str:
        """The sizes."""
        text = f"experts={len(self)}, dim={self.dim}, hidden={self.hidden}, out_dim={self.out_dim}"
        return (
            text
            + f", activation={self.activation!r}"
            + f", bias={self.b_in is not None}"
            + (", gated=True" if self.gated else "")
        )


Experts = ExpertList | ExpertMLP


def as_experts(experts: Iterable[nn.Module] | ExpertMLP) -> Experts:
    """The experts of a mixture, from what a person gives."""
    if isinstance(experts, ExpertList | ExpertMLP):
        return experts
    modules = list(experts) if isinstance(experts, Iterable) else [experts]
    if not isinstance(experts, Iterable) or not all(isinstance(m, nn.Module) for m in modules):
        kinds = listed(sorted({type(m).__name__ for m in modules}))
        raise TypeError(f"experts must be a list of modules or a gp.ExpertMLP, and are {kinds}")
    return ExpertList(modules)

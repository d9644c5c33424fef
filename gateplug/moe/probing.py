"""What can be learnt of a feed-forward by running it: whether rows are on their own, its formula, and where it drops units."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gateplug.core.activations import ACTIVATIONS, activation_name, is_activation
from gateplug.core.cost import still
from gateplug.core.feed_forward import is_linear, same, widths


@dataclass(frozen=True)
class Formula:
    """act(first(x)) or, gated, act(gate(x)) ⊗ up(x), with `dropout` on it in training, into `last`."""

    activation: str
    firsts: tuple[nn.Module, ...]
    """One plain layer; two, the gate before the value; or one fused one."""
    last: nn.Module
    gated: bool
    swapped: bool = False
    """A fused layer holds the value's rows before the gate's."""
    dropout: float = 0.0


def rows(dim: int, like: Tensor, scale: float = 1.0) -> Tensor:
    """Six random rows `(2, 3, dim)`."""
    return (scale * torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(0))).to(like)


def weight_of(module: nn.Module) -> Tensor | None:
    """The first parameter of floating point."""
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def not_row_wise(module: nn.Module, dim: int, out: int | None = None) -> str | None:  # noqa: PLR0911  # one for each reason
    """Why `module` is no feed-forward for rows of width `dim`, or None if it maps each row by itself to one of width `out`."""
    like = weight_of(module)
    if like is None or like.is_meta:
        return "it has no weights" if like is None else "its weights are on the meta device and cannot be run"
    taken = [p for p in inspect.signature(module.forward).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if len(taken) > 1:
        return f"it takes {len(taken)} inputs ({', '.join(p.name for p in taken)}), and an expert takes rows alone"
    out = out or dim
    x = rows(dim, like)
    other = x.clone()
    other[0, 0] = -other[0, 0] + 1
    try:
        with _alone(module):
            y, flat, moved = module(x), module(x.reshape(6, dim)), module(other)
    except Exception as error:  # whatever a module makes of an input that is not of its kind
        return f"it does not take rows of width {dim}: {error}"
    if not isinstance(y, Tensor) or y.shape != (2, 3, out):
        return f"it gives {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__} for rows {tuple(x.shape)}"
    if flat.shape != (6, out) or not _close(flat, y.reshape(6, out)):
        return "it does something else with rows (6, d) than with (2, 3, d)"
    if not _close(moved.reshape(6, out)[1:], y.reshape(6, out)[1:]):
        return "what it gives for a row depends on other rows"
    return None


def is_affine(module: nn.Module, dim: int) -> bool:
    """Whether f(x) + f(−x) = 2 f(0): two projections with nothing between them are no feed-forward."""
    like = weight_of(module)
    assert like is not None
    x = rows(dim, like, 4.0)
    with _alone(module):
        y = module(x)
        return bool(((y + module(-x) - 2 * module(0 * x)).abs().max() <= _tolerance(y) * y.abs().max()).item())


def formula(module: nn.Module, firsts: Sequence[nn.Module], last: nn.Module, dim: int) -> Formula | None:
    """The formula that `module` computes from these layers, or None when it is none of those that :class:`ExpertMLP` knows.

    Found by trying: all activations, both orders of the branches, compared to 1e-6 of the largest output. Weights of half
    precision are compared in float32, in which GELU and its tanh form differ.
    """
    like = weight_of(module)
    inner = [m for m in module.modules() if not list(m.children())]
    drops = [m for m in inner if isinstance(m, nn.Dropout) and m.p > 0]
    known = [m for m in inner if is_linear(m) or isinstance(m, nn.Identity | nn.Dropout) or is_activation(m)]
    plain = all(type(m) is nn.Linear or not isinstance(m, nn.Linear) for m in (*firsts, last))
    if like is None or len(drops) > 1 or len(known) < len([m for m in inner if m is not module]) or not plain:
        return None
    wide = {id(m): m for m in (*firsts, last)}
    if like.dtype in (torch.float16, torch.bfloat16):
        memo: dict[int, object] = {}
        module = copy.deepcopy(module, memo).float()
        wide = {key: memo[key] for key in wide}  # type: ignore[misc]
    found = _matching(module, [wide[id(m)] for m in firsts], wide[id(last)], dim)
    if found is None:
        return None
    p = _dropout(module, wide[id(last)], dim)
    if p is None:
        return None
    activation, swapped = found
    pair = tuple(firsts) if len(firsts) == 1 or not swapped else (firsts[1], firsts[0])
    gated = len(firsts) == 2 or widths(firsts[0])[1] == 2 * widths(last)[0]
    return Formula(activation, pair, last, gated, swapped and len(firsts) == 1, p)


def _matching(module: nn.Module, firsts: Sequence[nn.Module], last: nn.Module, dim: int) -> tuple[str, bool] | None:
    like = weight_of(module)
    assert like is not None
    own = {activation_name(m) for m in module.modules() if is_activation(m)}
    names = [str(name) for name in own] if len(own) == 1 and None not in own else list(ACTIVATIONS)
    with _alone(module):
        # where the activations differ from one another: hidden units of about 2
        spread = float(firsts[0](rows(dim, like)).std())
        x = rows(dim, like, 2 / spread if spread > 0 else 1.0)
        y = module(x)
        parts = [m(x) for m in firsts]
        if len(parts) == 1 and parts[0].shape[-1] == 2 * widths(last)[0]:
            parts = list(parts[0].chunk(2, -1))
        for name in names:
            act = ACTIVATIONS[name]
            for swapped in (False, True)[: len(parts)]:
                a = act(parts[-1] if swapped else parts[0])
                hidden = a if len(parts) == 1 else a * (parts[0] if swapped else parts[-1])
                out = last(hidden)
                if out.shape == y.shape and torch.allclose(out, y, rtol=0, atol=1e-6 * float(y.abs().max())):
                    return name, swapped
    return None


def _dropout(module: nn.Module, last: nn.Module, dim: int) -> float | None:
    """Probability of the dropout on the last layer's input, 0 without one; None for any other noise."""
    like = weight_of(module)
    assert like is not None
    drops = [m for m in module.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    seen: dict[str, Tensor] = {}
    hooks = [last.register_forward_pre_hook(lambda m, a: seen.__setitem__("last", a[0].clone()))]
    hooks += [m.register_forward_pre_hook(lambda m, a: seen.__setitem__("drop", a[0].clone())) for m in drops]
    x = rows(dim, like)
    try:
        with _alone(module):
            y = module(x)
            if drops and not (seen.keys() == {"last", "drop"} and same(seen["last"], seen["drop"])):
                return None
            switch_on(module, [m for m in module.modules() if list(m.children())])
            if not torch.equal(module(x), y):
                return None
    finally:
        for hook in hooks:
            hook.remove()
    return float(drops[0].p) if drops else 0.0


def switch_on(module: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Training mode for these parts alone, not for what is in them: shows dropouts that are called as functions."""
    module.eval()
    for part in parts:
        part.training = True


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """As :func:`still`, and nobody's random stream moves."""
    with still(module), torch.random.fork_rng(devices=[]):
        yield


def _tolerance(y: Tensor) -> float:
    return 1e-4 if y.dtype in (torch.float32, torch.float64) else 3e-2


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=_tolerance(b) * float(b.abs().max()))

"""Upcycle: the feed-forwards of a dense transformer become mixtures that compute the same at the start."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from lightning import LightningModule, Trainer
from torch import nn

from gateplug.core.edit import Edit, Replace
from gateplug.core.errors import PlugError, listed, nearest, whole_numbers
from gateplug.core.fresh import seeded, spread
from gateplug.core.optim import GroupOptions
from gateplug.core.plug import Plug
from gateplug.core.select import Layers
from gateplug.core.table import print_table
from gateplug.moe.dense import Dense, find_dense, whole
from gateplug.moe.experts import ExpertMLP
from gateplug.moe.gates import ExpertChoiceGate, SigmoidGate, SoftmaxGate, TopKGate
from gateplug.moe.layers import DSelectK
from gateplug.moe.mixture import MoE
from gateplug.moe.routing import Drop, ExpertGate
from gateplug.moe.selection import warn_ahead

GATES: dict[str, type[ExpertGate]] = {
    "top_k": TopKGate,
    "sigmoid": SigmoidGate,
    "dselect_k": DSelectK,
    "softmax": SoftmaxGate,
    "expert_choice": ExpertChoiceGate,
}


class Upcycle(Plug):
    """Turn the feed-forwards of a model into mixtures of copies of themselves, under one new router each (arXiv 2212.05055).

    All copies are equal at the start and weights sum to 1, so that the model computes what it computed, to 1e-6 in float32; what
    tells the experts apart from the first step on is the router alone. A block first → activation → second keeps the name of
    its first layer, which becomes the mixture; activation, dropout between and second layer go into the experts, and identities
    stand in their slots. A feed-forward that is a module by itself (Llama's `mlp`, T5's gated one, :class:`GLU`) becomes a
    mixture as a whole.

    Args:
        experts: number of experts, ≥ 2.
        gate: `top_k`, `sigmoid`, `dselect_k` or `softmax`, a class of gates, or a function `(experts, dim) -> gate`. Softmax and,
            until they have decided, DSelect-k gates run all experts.
        k: experts a row, 1 … experts; not used by `softmax`, nor by a function. With k = 1 the weight is the constant 1, and the
            terms of :class:`RegulateRouters` alone train the router.
        gate_args: further arguments of a gate given by name or class.
        layers: which feed-forwards, see :func:`gateplug.core.select.select`; a name selects those in and below it, and a module
            that is none by its structure is taken if it maps rows to rows. "auto" takes all as wide at the end as at the start.
        noise: standard deviation of what is added to the weights of the copies, relative to that of the weight, ≥ 0. With it
            the start is not exact.
        capacity_factor: of the mixture, see :class:`MoE`; exact as long as nothing is dropped.
        drop: see :class:`MoE`.
        lr_scale: factor on the learning rate of experts and routers, ≥ 0.

    Raises:
        ValueError: a number out of its range, an unknown gate, a gate whose weights do not sum to 1.
        PlugError: no feed-forward is found; lists what was looked at.
    """

    room: ClassVar[str] = "moe"
    summary: ClassVar[str] = "makes mixtures of experts of a dense model's feed-forwards, exact at the start"
    paper: ClassVar[str] = "arXiv 2212.05055"

    def __init__(
        self,
        experts: int = 8,
        gate: str | Callable[[int, int], ExpertGate] = "top_k",
        k: int = 2,
        gate_args: dict[str, Any] | None = None,
        layers: Layers = "auto",
        noise: float = 0.0,
        capacity_factor: float | None = None,
        drop: Drop = "position",
        lr_scale: float = 1.0,
    ) -> None:
        if isinstance(gate, str) and gate not in GATES:
            raise ValueError(f"gate={gate!r} is not known.{nearest(gate, GATES)} Allowed are {listed(GATES)}, or a function")
        if not isinstance(gate, str) and not callable(gate):
            raise TypeError(f"gate={gate!r} must be one of {listed(GATES)}, or a function (experts, dim) -> gate")
        if gate_args and not isinstance(gate, str | type):
            raise ValueError(f"gate_args={gate_args!r} are for a gate given by name or class; a function has its own")
        whole_numbers(experts=experts, k=k)
        if not isinstance(noise, int | float) or not 0 <= noise < float("inf"):
            raise ValueError(
                f"noise={noise!r} must be a finite number ≥ 0: the spread of what is added, relative to the weights'"
            )
        self.experts, self.gate, self.k, self.gate_args, self.layers = experts, gate, k, gate_args, layers
        self.noise, self.capacity_factor, self.drop, self.lr_scale = noise, capacity_factor, drop, lr_scale
        self._left: list[str] = []
        options = GroupOptions(lr_scale)
        self.group = options if lr_scale != 1 else None
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            # whatever does not go together is said before there is a model
            MoE(ExpertMLP(max(experts, 1), 4, 4), self._gate(4), capacity_factor=capacity_factor, drop=drop)

    def candidates(self, module: nn.Module) -> dict[str, nn.Module]:
        """Where mixtures would go."""
        return {d.name: module.get_submodule(d.name) for d in find_dense(module)[0] if d.auto}

    def nothing(self, module: nn.Module) -> str:
        """Say what was looked at."""
        found, left = find_dense(module)
        seen = left + [f"{d.name} ({d.what}: name it to take it)" for d in found if not d.auto]
        return (
            f"Upcycle with layers={self.layers!r} finds no feed-forward (a dense layer d→h, an activation, a dense layer h→d, or "
            f"a module of such layers). Looked at: {listed(seen)}"
        )

    def plan(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        """Edits for every feed-forward in the selected layers."""
        found, left = find_dense(module)
        self._left = left
        chosen: dict[str, Dense] = {}
        for name, layer in layers.items():
            inside = [d for d in found if any(f"{part}.".startswith(f"{name}.") for part in d.parts)]
            if not inside and not any(f"{name}.".startswith(f"{d.name}.") for d in found):
                dense = whole(name, layer, named=True)
                if isinstance(dense, str):
                    seen = [text for text in left if text.startswith(f"{name}.")]
                    raise PlugError(
                        f"Upcycle finds no feed-forward in {name}: {dense}. {'Looked at: ' + listed(seen) if seen else ''}"
                    )
                inside = [dense]
            chosen.update({d.name: d for d in inside})
        edits = [edit for dense in chosen.values() for edit in self._edits(dense)]
        self._warn(module, [e.new.gate for e in edits if isinstance(e, Replace) and isinstance(e.new, MoE)])
        return edits

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was made, and which layers looked like a feed-forward and were left."""
        new = not self._announced
        super().on_fit_start(trainer, pl_module)
        if new and self._left:
            print_table("Left as they are", ("layers",), [(text,) for text in self._left])

    def _edits(self, dense: Dense) -> list[Edit]:
        with seeded(dense.name, dense.like):
            gate = self._gate(dense.dim)
            _check_sum(gate, dense.dim)
            experts = dense.make(self.experts)
            if self.noise:
                with torch.no_grad():
                    for p in experts.parameters():
                        p.add_(torch.randn(p.shape, device=p.device).to(p.dtype) * (self.noise * spread(p)))
        # routers work in float32 at least, also in a model of half precision
        gate = gate.to(dense.like.device, torch.promote_types(dense.like.dtype, torch.float32))
        mixture = MoE(experts, gate, capacity_factor=self.capacity_factor, drop=self.drop)
        exact = "exact" if self.capacity_factor is None else "exact while nothing is dropped"
        exact = f"not exact: noise {self.noise:g}" if self.noise else exact
        chooses = f"{type(gate).__name__} k={gate.k}" if gate.k < self.experts else type(gate).__name__
        frozen = ", frozen: the router alone trains" if dense.frozen else ""
        what = f"{dense.what} → {self.experts} experts, {chooses}, {exact}{frozen}"
        return [Replace(dense.name, mixture, what), *dense.others]

    def _gate(self, dim: int) -> ExpertGate:
        """A router for rows of a width."""
        made: Any = GATES[self.gate] if isinstance(self.gate, str) else self.gate
        takes = inspect.signature(made).parameters
        anything = isinstance(made, type) and any(p.kind is p.VAR_KEYWORD for p in takes.values())
        named = {"experts", "dim"} <= takes.keys()
        if not isinstance(made, type) or not (named or anything):
            gate: ExpertGate = made(experts=self.experts, dim=dim) if named else made(self.experts, dim)
            if not isinstance(gate, ExpertGate) or gate.experts != self.experts or gate.dim not in (dim, None):
                raise ValueError(
                    f"gate(experts={self.experts}, dim={dim}) must give one of gateplug's gates for these, and gave {gate}"
                )
        else:
            given = dict(self.gate_args or {})
            counted = {"k": self.k} if "k" in takes or anything else {}
            try:
                gate = made(**{"experts": self.experts, "dim": dim, **counted, **given})
            except TypeError as error:
                raise ValueError(f"gate_args={given!r} do not fit {made.__name__}: {error}") from None
        why = _not_one(gate)
        if why:
            raise ValueError(f"{gate} cannot take over from a dense layer, as its weights do not sum to 1: {why}")
        return gate

    def _warn(self, module: nn.Module, gates: list[ExpertGate]) -> None:
        if any(isinstance(gate, TopKGate | SigmoidGate) and gate.k == 1 for gate in gates):
            warnings.warn(
                "Upcycle with k=1: the weight of the chosen expert is always 1, which gives the router no gradient. Take k=2, or "
                "add gp.RegulateRouters(load_balance=…), whose terms then train it alone",
                stacklevel=3,
            )
        warn_ahead(module, gates, self.capacity_factor)


def _not_one(gate: ExpertGate) -> str:
    """Why a gate's weights do not sum to 1, or nothing when they do."""
    if isinstance(gate, TopKGate) and gate.normalize == "all":
        return "normalize='all' keeps a part of the softmax over all experts; use normalize='selected'"
    if isinstance(gate, SigmoidGate) and (not gate.normalize or gate.scale != 1):
        return "use normalize=True and scale=1"
    if isinstance(gate, ExpertChoiceGate):
        return "an expert takes the rows that it likes, some rows several times and others not at all"
    if isinstance(gate, DSelectK) and gate.experts != 2**gate.bits and not gate.renormalize:
        return (
            f"{gate.experts} is no power of two, and codes beyond it take a part; use {2**gate.bits} experts or renormalize=True"
        )
    return ""


def _check_sum(gate: ExpertGate, dim: int) -> None:
    """Raise ValueError where weights do not sum to 1 on random rows: for gates that :func:`_not_one` does not know."""
    p = next(gate.parameters(), torch.zeros(()))
    x = torch.randn(16, dim, generator=torch.Generator().manual_seed(0)).to(p)
    with torch.no_grad():
        sums = gate.eval()(x).sum(-1)
    gate.train()
    if not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-5):
        raise ValueError(
            f"{gate} cannot take over from a dense layer, as its weights do not sum to 1: on random rows they sum to "
            f"{float(sums.min()):.3g} … {float(sums.max()):.3g}. Divide them by their sum"
        )

"""DSelect-k: a smooth gate that ends with exactly k experts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gateplug.core.errors import listed, real_numbers
from gateplug.core.gate import Gate
from gateplug.moe.functional import dselect_k, hard_selection, reachability, selector_entropy, smooth_step
from gateplug.moe.routing import ExpertGate, Ramp, Routing
from gateplug.moe.rows import scores


class DSelectK(ExpertGate):
    """DSelect-k (arXiv 2106.03760): k selectors, each a smooth choice of an expert by the bits of its number.

    Selector s puts r_s (E,) on the experts, Π_j of S(z_sj) where bit j of the expert's number is 1 and 1 − S(z_sj) where it is 0,
    most significant bit first, S the smooth step of width gamma. Weights q = Σ_s softmax(w)_s r_s. Once every S(z) is 0 or 1 at
    most k experts are left, and all others cost nothing.

    Static, parameters `z` (k, m) and `w` (k,), m = ⌈log2 E⌉; with `tasks` both have that dimension in front. With `dim`, linear
    layers `z` and `w` of the input. Starts as published: z uniform in ± gamma / 100, w in ± 0.05.

    Args:
        experts: E, ≥ 2, any number.
        k: selectors, 1 … E.
        dim: width of the input for a choice per example; None for a static one.
        gamma: width of the smooth step, > 0. Small ones choose early and then have no gradient.
        entropy: factor λ of the term λ · Σ_s H(r_s), mean over the batch, ≥ 0: what makes the choice hard. A number, or a
            :class:`Ramp` over optimizer steps. The official default, 1e-6, is next to none.
        reachability: factor of Σ_s 1 / Σ_i r_si, mean over the batch, which keeps the mass on codes that stand for an expert;
            no term where E is a power of two, as every code does.
        renormalize: divide q by its sum (E not a power of two).
        tasks: number of gates side by side (one a task).

    Both terms enter the loss through :class:`RegulateRouters`.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        experts: int,
        k: int,
        dim: int | None = None,
        gamma: float = 1.0,
        entropy: float | Ramp = 0.0,
        reachability: float = 1.0,
        renormalize: bool = False,
        tasks: int | None = None,
    ) -> None:
        super().__init__(experts, k, dim, tasks)
        if isinstance(entropy, Mapping):  # as the configuration in a checkpoint has it
            entropy = Ramp(**entropy)
        numbers = {} if isinstance(entropy, Ramp) else {"entropy": entropy}
        real_numbers(gamma=gamma, reachability=reachability, **numbers)
        if not 0 < gamma < float("inf"):
            raise ValueError(f"gamma={gamma} must be > 0: the width over which the smooth step rises from 0 to 1")
        for name, value in (("entropy", entropy), ("reachability", reachability)):
            if not isinstance(value, Ramp) and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be a finite number ≥ 0" + (" or a Ramp" if name == "entropy" else ""))
        self.gamma, self.entropy, self.renormalize = gamma, entropy, renormalize
        self.bits = math.ceil(math.log2(experts))
        self.reachability = reachability if experts < 2**self.bits else 0.0
        lead, n = (() if tasks is None else (tasks,)), tasks or 1
        self.z: nn.Parameter | nn.Linear
        self.w: nn.Parameter | nn.Linear
        if dim is None:
            self.z, self.w = nn.Parameter(torch.empty(*lead, k, self.bits)), nn.Parameter(torch.empty(*lead, k))
        else:
            self.z, self.w = nn.Linear(dim, n * k * self.bits), nn.Linear(dim, n * k)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)  # exact in half precision, too
        self.steps: Tensor
        self.hardened = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the published start."""
        for part, bound in ((self.z, self.gamma / 100), (self.w, 0.05)):
            for p in [part] if isinstance(part, nn.Parameter) else part.parameters():
                p.uniform_(-bound, bound)

    def codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits z `(R, k, m)` and w `(R, k)` for rows `(R, dim)`; R = 1 for a static gate, times `tasks`."""
        return scores(self.z, rows).reshape(-1, self.k, self.bits), scores(self.w, rows).reshape(-1, self.k)

    def decide(self, rows: Tensor) -> Routing:
        """See :class:`ExpertGate`."""
        z, w = self.codes(rows)
        weights, selectors = dselect_k(z, w, self.experts, self.gamma)
        if self.has_terms and self.training:
            self._check_heard()
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return Routing(weights, selectors.detach().argmax(-1), None, q=weights, selectors=selectors, z=z.detach())

    @property
    def has_terms(self) -> bool:
        """Whether this gate adds to the loss; what is hardened has nothing to learn from it."""
        return not self.hardened and (isinstance(self.entropy, Ramp) or self.entropy > 0 or self.reachability > 0)

    def terms(self, selectors: Tensor, share: Tensor | None = None) -> Tensor:
        """λ(t) Σ_s H(r_s) + reachability · Σ_s 1 / Σ_i r_si: mean over the rows, sum over selectors and tasks.

        Args:
            selectors: r, (R, k, experts).
            share: (R,) part of each row in the mean, 0 for padding; None: the same for all.
        """
        factor = self.entropy.at(self.steps) if isinstance(self.entropy, Ramp) else self.entropy
        each = factor * selector_entropy(selectors)
        if self.reachability:
            each = each + self.reachability * reachability(selectors)
        rows = each.sum(-1)
        return (rows.mean() if share is None else rows @ share.to(rows.dtype)) * (self.tasks or 1)

    def harden(self, force: bool = False) -> list[int] | list[list[int]]:
        """Fix a converged static gate to its experts: z stays as it is decided, the weights w go on learning.

        The state dict keeps that (`hardened`): a gate that it is loaded into is hardened as well.

        Args:
            force: round selectors that have not decided yet.

        Returns:
            The expert of each selector; for a gate of several tasks, a list for each task.

        Raises:
            ValueError: the gate chooses per example, a selector is not binary (says which and how far off), or its code stands
                for no expert.
        """
        if isinstance(self.z, nn.Linear):
            raise ValueError(f"{self._named()} chooses per example: there are no fixed experts to harden it to")
        z = self.z.detach()
        one = smooth_step(z, self.gamma)
        if force:
            z = torch.where(one < 0.5, -self.gamma, self.gamma).to(z)
        else:
            off = torch.minimum(one, 1 - one).amax(-1)
            bad = [f"{tuple(i)}: {off[tuple(i)]:.3g}" for i in (off > 0).nonzero().tolist()]
            if bad:
                raise ValueError(
                    f"{self._named()}: {len(bad)} selectors are not binary, off by {listed(bad, 8)}. Train on with a larger "
                    "entropy, or round them with harden(force=True)"
                )
        chosen = torch.stack([hard_selection(code, self.experts, self.gamma) for code in z.reshape(-1, self.k, self.bits)])
        with torch.no_grad():
            self.z.copy_(torch.where(smooth_step(z, self.gamma) < 0.5, -self.gamma, self.gamma))
        self._fix()
        rows: list[list[int]] = chosen.tolist()
        for row in rows:
            if len(set(row)) < self.k:
                warnings.warn(f"{self._named()}: two selectors chose the same expert, {len(set(row))} are used", stacklevel=2)
                break
        return rows if self.tasks is not None else rows[0]

    def frozen(self) -> Tensor:
        """(…, k) share of the bits of each selector of a static gate that are binary and have no gradient."""
        assert isinstance(self.z, nn.Parameter)
        return (self.z.detach().abs() >= self.gamma / 2).float().mean(-1)

    def _fix(self) -> None:
        self.hardened = True
        self.z.requires_grad_(False)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.hardened:
            destination[f"{prefix}hardened"] = torch.ones((), dtype=torch.bool)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if state_dict.pop(f"{prefix}hardened", None) is not None:
            self._fix()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_heard(self) -> None:
        """Warn, once, where no :class:`RegulateRouters` takes the terms into a loss."""
        if self._warned or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not any(isinstance(m, Gate) and m.injection is not None for m in self.tap.children()):
            self._warned = True
            warnings.warn(
                f"{self._named()} has terms of its own (entropy, reachability) that enter no loss: add gp.RegulateRouters() to "
                "the Trainer's callbacks, or in a loop of your own call attach(net) and total_loss(net, loss) on it",
                stacklevel=2,
            )

    _warned: bool = False

    def extra_repr(self) -> str:
        """The numbers, and gamma."""
        return f"{super().extra_repr()}, gamma={self.gamma}"

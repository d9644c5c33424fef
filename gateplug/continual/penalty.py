"""A pull of each parameter towards what it was after earlier tasks: what EWC, SI and MAS add to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gateplug.continual.functional import quadratic_penalty
from gateplug.core.errors import PlugError, listed

Tensors = dict[str, Tensor]
"""By a parameter's name."""


class Penalty:
    """Σ_t ½ Σ F_t (θ − θ_t)², held in two numbers a parameter however many tasks there were.

    A sum of parabolas is one parabola: with F = Σ F_t and m = Σ F_t θ_t / F it is ½ F (θ − m)² and a constant. Mean and constant
    are carried forward as those of a weighted variance are, so that no large numbers cancel.
    """

    def __init__(self) -> None:
        self.importance: Tensors = {}
        """F, ≥ 0, in float32 or more."""
        self.anchor: Tensors = {}
        """m."""
        self.rest: Tensor = torch.zeros(())
        """The constant: Σ_t Σ F_t (θ_t − m)². It moves nothing, and belongs to the value."""
        self.tasks = 0

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        """Take up parameters that are new, with no importance, anchored where they are."""
        for name, p in parameters.items():
            if name not in self.anchor:
                self.anchor[name] = held(p)
                self.importance[name] = torch.zeros_like(self.anchor[name])
        self.rest = self.rest.to(next(iter(self.anchor.values()), self.rest).device)

    def add(self, importance: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Add the parabola of a task, around where the parameters are."""
        self.begin(parameters)
        for name, p in parameters.items():
            old, new = self.importance[name], importance[name]
            both, away = old + new, held(p) - self.anchor[name]
            share = torch.where(both > 0, new / both.clamp_min(torch.finfo(both.dtype).tiny), torch.ones_like(both))
            self.rest = self.rest + (old * share * away.square()).sum()
            self.importance[name], self.anchor[name] = both, self.anchor[name] + share * away
        self.tasks += 1

    def replace(self, importance: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Have one parabola, with this importance, around where the parameters are."""
        self.importance.update(importance)
        self.anchor.update({name: held(p) for name, p in parameters.items()})
        self.tasks += 1

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The penalty, a scalar; its gradient goes to the parameters."""
        parts = [quadratic_penalty(p, self.anchor[n], self.importance[n]) for n, p in parameters.items() if n in self.anchor]
        return 0.5 * self.rest + (torch.stack(parts).sum() if parts else 0.0)

    def gradient(self, name: str, parameter: Tensor) -> Tensor:
        """∂ penalty / ∂θ of one parameter: F (θ − m)."""
        return self.importance[name] * (parameter.detach() - self.anchor[name])

    def mean_importance(self) -> Tensor:
        """Over all parameters, a scalar."""
        numbers = sum(t.numel() for t in self.importance.values())
        return torch.stack([t.sum() for t in self.importance.values()]).sum() / max(numbers, 1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and a number."""
        return {"importance": dict(self.importance), "anchor": dict(self.anchor), "rest": self.rest, "tasks": self.tasks}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor], owner: str) -> None:
        """Take a state, onto the devices of the parameters.

        Raises:
            PlugError: it is of a network with other parameters.
        """
        self.importance, self.anchor = (fitting(state[key], parameters, owner) for key in ("importance", "anchor"))
        self.rest, self.tasks = state["rest"].to(next(iter(parameters.values())).device), state["tasks"]


def held(p: Tensor) -> Tensor:
    """A copy of a parameter, in float32 or more."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)


def fitting(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], owner: str) -> Tensors:
    """Tensors of a state on the devices of the parameters that they are of.

    Raises:
        PlugError: a parameter is missing, or of another shape.
    """
    wrong = [n for n, t in tensors.items() if n not in parameters or parameters[n].shape != t.shape]
    if wrong:
        raise PlugError(
            f"{owner} holds what mattered in another network: {listed(wrong)} of it is missing here or has another shape. "
            f"Make a new {owner} for another network"
        )
    return {name: t.to(parameters[name].device) for name, t in tensors.items()}


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}

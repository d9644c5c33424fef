"""Attached parameters in the optimizer: a group of their own, driven by whatever scheduler the user has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gateplug.core.errors import PlugError, listed

_NAME = "gateplug"
"""Key in a parameter group that says which plug it belongs to."""
_SCALE = "gateplug_lr_scale"


@dataclass(frozen=True)
class GroupOptions:
    """How a plug wants its parameters trained.

    Args:
        lr_scale: factor on the learning rate that the optimizer and its scheduler give, ≥ 0.
        weight_decay: the group's own weight decay, ≥ 0; None keeps the optimizer's.
    """

    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("lr_scale", self.lr_scale), ("weight_decay", self.weight_decay)):
            none = " (or None for the optimizer's own)" if name == "weight_decay" else ""
            if (value is None and not none) or (value is not None and not _finite(value)):
                raise ValueError(f"{name}={value!r} must be a finite number ≥ 0{none}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < float("inf")


@dataclass(frozen=True)
class Claim:
    """Parameters that want a group of their own, by name."""

    owner: str
    options: GroupOptions
    parameters: Mapping[str, nn.Parameter]


def split_group(group: dict[str, Any], claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """Cut the claimed parameters out of a parameter group.

    Args:
        group: as an optimizer takes it; `params` may hold parameters or (name, parameter) pairs.
        claims: who wants which parameters.

    Returns:
        The group without them (left out when nothing stays), then one group per claim that found any of its parameters here.
    """
    if _NAME in group:  # a group of ours that an optimizer takes again
        return [group]
    entries = group["params"]
    rest = list(entries.items() if isinstance(entries, dict) else [entries] if isinstance(entries, nn.Parameter) else entries)
    groups = []
    for claim in claims:
        ids = {id(p) for p in claim.parameters.values()}
        mine = [e for e in rest if id(e[1] if isinstance(e, tuple) else e) in ids]
        if not mine:
            continue
        rest = [e for e in rest if id(e[1] if isinstance(e, tuple) else e) not in ids]
        own = {**group, "params": mine, _NAME: claim.owner, _SCALE: claim.options.lr_scale}
        if claim.options.weight_decay is not None:
            own["weight_decay"] = claim.options.weight_decay
        groups.append(own)
    return ([{**group, "params": rest}] if rest or not groups else []) + groups


@contextmanager
def grouping(claims: list[Claim]) -> Iterator[None]:
    """While this lasts, an optimizer that is built puts claimed parameters into groups of their own.

    Schedulers that are built after the optimizer see all groups. Nothing is done to an optimizer that exists already.

    Raises:
        PlugError: an optimizer (LBFGS) or scheduler that was built in here refuses the number of groups.
    """
    original = Optimizer.add_param_group
    split = False

    def add(self: Optimizer, group: dict[str, Any]) -> None:
        nonlocal split
        parts = split_group(group, claims)
        split = split or len(parts) > 1
        for part in parts:
            original(self, part)
        if any(_SCALE in part and part[_SCALE] != 1 for part in parts):
            scale_lr(self)

    Optimizer.add_param_group = add  # type: ignore[method-assign,assignment]
    try:
        yield
    except ValueError as error:
        if not split:
            raise
        raise PlugError(
            f"an optimizer or scheduler does not accept the groups: {error}. Parameters of {listed({c.owner for c in claims})} "
            "are in a group of their own, behind the group they came from: give the scheduler one value more per such "
            "group, or one value for all"
        ) from error
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]


def scale_lr(optimizer: Optimizer) -> None:
    """Have `optimizer` apply each group's lr_scale for the length of the update alone.

    Between updates `lr` is the base value that schedulers read and write (OneCycleLR overwrites it, a product stored in
    the group would be lost). A closure runs before the factor is applied, so a step that fails in it leaves `lr` whole.
    """
    if not hasattr(optimizer, "_gateplug_scaled"):
        optimizer._gateplug_scaled = True  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(_scale)
        optimizer.register_step_post_hook(_unscale)


def _scale(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _multiply(optimizer)
        return args, kwargs

    def closure_then_scale() -> Any:
        _unscale(optimizer)  # LBFGS calls its closure several times
        loss = closure()
        _multiply(optimizer)
        return loss

    return args[:1], {**kwargs, "closure": closure_then_scale}


def _multiply(optimizer: Optimizer) -> None:
    _unscale(optimizer)  # after a step that failed and was caught
    for group in optimizer.param_groups:
        if group.get(_SCALE, 1) != 1:
            group["gateplug_base_lr"] = group["lr"]
            group["lr"] = group["lr"] * group[_SCALE]


def _unscale(optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
    for group in optimizer.param_groups:
        if "gateplug_base_lr" in group:
            group["lr"] = group.pop("gateplug_base_lr")


def check_trained(optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter], owner: str) -> None:
    """Make sure that every attached parameter that requires grad is in an optimizer.

    Raises:
        PlugError: names the ones that are in none.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name, p in parameters.items() if p.requires_grad and id(p) not in held]
    if lost:
        raise PlugError(
            f"{owner} attached parameters that are in no optimizer and would never be trained: {listed(lost)}. Build the "
            "optimizer in configure_optimizers from self.parameters() (it runs after the plug has attached them), not "
            "in __init__; with LightningCLI use auto_configure_optimizers=False"
        )

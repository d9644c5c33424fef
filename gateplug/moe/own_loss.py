"""Auxiliary losses that a Hugging Face mixture adds by itself."""

from __future__ import annotations

import inspect
import re
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

SILENT = ("deepseek", "glm4", "llama4")
"""Families that take the flag and return the logits, and add nothing to the loss."""


def own_losses(module: nn.Module) -> dict[str, str]:
    """Models in `module` whose own auxiliary loss is on: name -> the coefficient, in words."""
    found: dict[str, str] = {}
    for name, m in module.named_modules():
        config = getattr(m, "config", None)
        if config is None or any(name.startswith(f"{other}." if other else "") for other in found):
            continue
        kind = str(getattr(config, "model_type", ""))
        if getattr(config, "output_router_logits", False) is True and not kind.startswith(SILENT):
            coefficient = next(
                (c for c in vars(config) if re.fullmatch(r"(router_)?(aux_loss|z_loss)_coef.*|.*aux_loss.*", c)), None
            )
            found[name] = f"{coefficient}={getattr(config, coefficient)}" if coefficient else "its config names no coefficient"
    return found


def say_own_loss(module: nn.Module) -> None:
    """Warn where a model adds a loss of its own for the same routers."""
    for name, coefficient in own_losses(module).items():
        rank_zero_warn(
            f"{name or type(module).__name__} adds an auxiliary router loss of its own (output_router_logits=True, "
            f"{coefficient}), which pools all layers; RegulateRouters adds to it. Set output_router_logits=False in its "
            "config to have one of them"
        )


class AskedByCall:
    """Forward pre-hook on a model whose auxiliary loss is switched on by an argument of the call: says so, once."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments."""
        if kwargs.get("output_router_logits") is True and not self.said:
            self.said = True
            rank_zero_warn(
                f"{type(model).__name__} is called with output_router_logits=True and adds auxiliary router losses of its own "
                f"(router_aux_loss_coef={getattr(model.config, 'router_aux_loss_coef', 'unknown')}); RegulateRouters adds to "
                "them. Leave the argument out to have one of them"
            )


def watch_calls(module: nn.Module) -> list[RemovableHandle]:
    """Put :class:`AskedByCall` on models in `module` that can be asked for such a loss; take the handles off after the run."""
    models: dict[str, nn.Module] = {}
    for name, m in module.named_modules():
        config = getattr(m, "config", None)
        kind = str(getattr(config, "model_type", ""))
        inside = any(name.startswith(f"{other}." if other else "") for other in models)
        if not inside and hasattr(config, "router_aux_loss_coef") and not kind.startswith(SILENT) and _takes_flag(m):
            models[name] = m
    return [m.register_forward_pre_hook(AskedByCall(), with_kwargs=True) for m in models.values()]


def _takes_flag(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "output_router_logits" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

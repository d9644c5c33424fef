"""Something done right before and right after an optimizer moves the parameters, and parameters that come in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gateplug.core.errors import PlugError


class AroundUpdate:
    """Calls `before` and `after` around each update of an optimizer, and not where a GradScaler skips it.

    Lightning computes the loss and its gradient in a closure within `optimizer.step`: `before` runs after that closure, when the
    gradient is unscaled, clipped and final.

    Args:
        optimizer: whose updates.
        before: called with the gradients in place.
        after: called with the parameters moved.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before, self._after = before, after
        self._skipped = False
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]

    def remove(self) -> None:
        """Take it off."""
        while self._handles:
            self._handles.pop().remove()

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # an optimizer that unscales by itself (fused) is called also where it will skip, and has been told so
        found_inf = getattr(optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf)
        if self._skipped:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before()
            return None

        def then_before() -> Any:
            loss = closure()
            self._before()
            return loss

        return args[:1], {**kwargs, "closure": then_before}

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._skipped:
            self._after()


def insert_parameter(optimizer: Optimizer, new: nn.Parameter, after: nn.Parameter, name: str | None = None) -> None:
    """Have an optimizer train a parameter that came in the middle of a run, in the group of `after` and right behind it.

    The state of an optimizer is stored by the order of the parameters, so the place decides whether a resumed run finds it again:
    `new` must follow `after` in `module.parameters()` as well.

    Args:
        optimizer: in use.
        new: not in it.
        after: in it.
        name: for groups of named parameters.

    Raises:
        PlugError: `after` is in no group, or the optimizer cannot take more parameters.
    """
    if hasattr(optimizer, "_numel_cache"):
        raise PlugError(f"{type(optimizer).__name__} cannot take a parameter in the middle of a run: use another optimizer")
    for group in optimizer.param_groups:
        place = next((i for i, p in enumerate(group["params"]) if p is after), None)
        if place is not None:
            group["params"].insert(place + 1, new)
            if "param_names" in group:
                group["param_names"].insert(place + 1, name or "")
            return
    raise PlugError("a parameter that was attached before is in no optimizer: build it in configure_optimizers")

"""Forward hooks that last as long as a training runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class TrainingHook:
    """A forward hook of a running training. In copies of the module, and where it is loaded again, it does nothing.

    Args:
        call: as for `register_forward_hook`; None: nothing is called.
    """

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return None if self._call is None else self._call(*args)

    def __reduce__(self) -> Any:
        return TrainingHook, (None,)


def drop_training_hooks(module: nn.Module) -> None:
    """Take the hooks of a running training off a module and all in it."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, TrainingHook)]:
                del hooks[key]

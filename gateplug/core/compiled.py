"""Compiled code does not look whether hooks have come or gone: it has to be told."""

from __future__ import annotations

import sys


def forget_compiled() -> None:
    """Have torch.compile look at hooks from now on, and drop what it compiled when it did not.

    By default torch does not guard the hooks of modules: code that was compiled for a layer without a gate would also run for
    another layer of that class that has one, and skip the gate without a word.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()

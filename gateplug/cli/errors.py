"""Errors that a person can correct."""

import re

from lightning.fabric.utilities.exceptions import MisconfigurationException

from gateplug.core import PlugError

SET_UP_ERRORS = (PlugError, ValueError, TypeError, FileNotFoundError, MisconfigurationException)


class UserError(Exception):
    """Its text is the whole paragraph that the person reads."""


def in_words(error: Exception, started: bool) -> str:
    """What a person needs to know of an error, where a traceback would tell no more; else nothing.

    Args:
        error: Raised by a run.
        started: Whether a batch was seen. Before that, errors are about the set-up.
    """
    if "Tried to step" in str(error):  # OneCycleLR, whose length is in the checkpoint
        return (
            f"The learning rate schedule has ended: {error} A run that is continued from a checkpoint keeps the length of its"
            " schedule. Give the whole length (trainer.max_epochs) from the start, or begin a new run from the weights."
        )
    if twice := re.match(r"Found more than one stateful callback of type `(\w+)`", str(error)):
        return (
            f"trainer.callbacks holds two {twice[1]} for the same layers: leave one, with the arguments of both, or name other"
            " layers in each."
        )
    if isinstance(error, PlugError):
        return _one_line(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # gateplug's own code wrote it for the person
    own = trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("gateplug.")
    return _one_line(error) if isinstance(error, SET_UP_ERRORS) and (own or not started) else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Exits on the way through a network, each with a gate that decides who leaves (JEI-DNN)."""

from gateplug.early_exit.callback import EarlyExit
from gateplug.early_exit.layers import ExitGate
from gateplug.early_exit.metrics import CalibrationError, ConformalCoverage, ExitCalibration
from gateplug.early_exit.programs import ExitPrograms
from gateplug.early_exit.runner import ExitOutput, ExitRunner

__all__ = [
    "CalibrationError",
    "ConformalCoverage",
    "EarlyExit",
    "ExitCalibration",
    "ExitGate",
    "ExitOutput",
    "ExitPrograms",
    "ExitRunner",
]

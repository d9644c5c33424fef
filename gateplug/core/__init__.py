"""What every method uses: attach, objective, optimizer groups, state, look; it knows no method."""

from gateplug.core.checkpoint import load
from gateplug.core.cost import Cost, Latency, compare_latency, cost, latency
from gateplug.core.edit import AddGate, Edit, Replace, SetAttribute
from gateplug.core.errors import PlugError
from gateplug.core.fold import fold
from gateplug.core.gate import Gate, Openness
from gateplug.core.monitor import GateMonitor
from gateplug.core.optim import GroupOptions
from gateplug.core.plug import Plug
from gateplug.core.resume import ExactResume, step_seed

__all__ = [
    "AddGate",
    "Cost",
    "Edit",
    "ExactResume",
    "Gate",
    "GateMonitor",
    "GroupOptions",
    "Latency",
    "Openness",
    "Plug",
    "PlugError",
    "Replace",
    "SetAttribute",
    "compare_latency",
    "cost",
    "fold",
    "latency",
    "load",
    "step_seed",
]

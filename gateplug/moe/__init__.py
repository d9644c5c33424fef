"""Mixture of experts (DSelect-k and other gates), regularised and watched routers, multi-task mixtures."""

from gateplug.moe.callback import RegulateRouters
from gateplug.moe.expert_monitor import ExpertMonitor
from gateplug.moe.experts import ExpertMLP
from gateplug.moe.gates import ExpertChoiceGate, SigmoidGate, SoftmaxGate, TopKGate
from gateplug.moe.layers import DSelectK
from gateplug.moe.mixture import MoE, MultiGateMoE
from gateplug.moe.routing import Ramp
from gateplug.moe.upcycle import Upcycle

__all__ = [
    "DSelectK",
    "ExpertChoiceGate",
    "ExpertMLP",
    "ExpertMonitor",
    "MoE",
    "MultiGateMoE",
    "Ramp",
    "RegulateRouters",
    "SigmoidGate",
    "SoftmaxGate",
    "TopKGate",
    "Upcycle",
]

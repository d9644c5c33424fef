"""Learning one task after another without forgetting: GateON, its context detection, and what it is compared to."""

from gateplug.continual.boundaries import ContinualMetrics
from gateplug.continual.callback import GateON
from gateplug.continual.detector import ContextDetector
from gateplug.continual.ewc import EWC
from gateplug.continual.heads import HeadMask
from gateplug.continual.mas import MAS
from gateplug.continual.metrics import AccuracyMatrix
from gateplug.continual.replay import Replay
from gateplug.continual.synaptic_intelligence import SynapticIntelligence

__all__ = [
    "EWC",
    "MAS",
    "AccuracyMatrix",
    "ContextDetector",
    "ContinualMetrics",
    "GateON",
    "HeadMask",
    "Replay",
    "SynapticIntelligence",
]

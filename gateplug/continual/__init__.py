"""Learning one task after another without forgetting: GateON, its context detection, and what it is compared to."""

from gateplug.continual.callback import GateON

__all__ = ["GateON"]

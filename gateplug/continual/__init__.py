"""Learning one task after another without forgetting: GateON, its context detection, and what it is compared to."""

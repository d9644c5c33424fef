"""Training with differential privacy, and activations that suit it."""

from gateplug.privacy.callback import ReplaceActivation
from gateplug.privacy.layers import TemperedSigmoid

__all__ = ["ReplaceActivation", "TemperedSigmoid"]

"""Gated feed-forwards (GLU variants) in place of the ones that a model has."""

from gateplug.glu.callback import ReplaceFFN
from gateplug.glu.layers import FFN, GLU

__all__ = ["FFN", "GLU", "ReplaceFFN"]

"""gateplug: published gating methods as plug-ins for trainings you already have."""

from gateplug.core import (
    Cost,
    ExactResume,
    Gate,
    GateMonitor,
    Latency,
    Openness,
    Plug,
    PlugError,
    compare_latency,
    cost,
    fold,
    latency,
    load,
)
from gateplug.data import Digits, ImageData, TextData, exact_loader
from gateplug.glu import FFN, GLU, ReplaceFFN
from gateplug.privacy import ReplaceActivation, TemperedSigmoid
from gateplug.tasks import Classifier, LanguageModel, Seq2Seq, WarmupCosineLR, hf_model

__version__ = "0.1.0"

__all__ = [
    "FFN",
    "GLU",
    "Classifier",
    "Cost",
    "Digits",
    "ExactResume",
    "Gate",
    "GateMonitor",
    "ImageData",
    "LanguageModel",
    "Latency",
    "Openness",
    "Plug",
    "PlugError",
    "ReplaceActivation",
    "ReplaceFFN",
    "Seq2Seq",
    "TemperedSigmoid",
    "TextData",
    "WarmupCosineLR",
    "compare_latency",
    "cost",
    "exact_loader",
    "fold",
    "hf_model",
    "latency",
    "load",
]

"""Ordinary LightningModules for recipes: nothing of gateplug's plugs is in them."""

from gateplug.tasks.backbone import hf_model
from gateplug.tasks.classifier import Classifier
from gateplug.tasks.language import LanguageModel, Seq2Seq
from gateplug.tasks.schedule import WarmupCosineLR

__all__ = ["Classifier", "LanguageModel", "Seq2Seq", "WarmupCosineLR", "hf_model"]

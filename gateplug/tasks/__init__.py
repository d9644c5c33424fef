"""Ordinary LightningModules for recipes: nothing of gateplug's plugs is in them."""

from gateplug.tasks.backbone import hf_model
from gateplug.tasks.classifier import Classifier
from gateplug.tasks.heads import TaskHead
from gateplug.tasks.language import LanguageModel, Seq2Seq
from gateplug.tasks.multitask import MultiTask
from gateplug.tasks.schedule import WarmupCosineLR
from gateplug.tasks.towers import TaskTowers

__all__ = ["Classifier", "LanguageModel", "MultiTask", "Seq2Seq", "TaskHead", "TaskTowers", "WarmupCosineLR", "hf_model"]

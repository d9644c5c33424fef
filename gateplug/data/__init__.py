"""Data modules whose order, split and augmentation are functions of (seed, epoch, index)."""

from gateplug.data.augment import Augmentation, Compose, Cutout, RandomAffine, RandomCrop, RandomFlip
from gateplug.data.digits import Digits
from gateplug.data.images import ImageData
from gateplug.data.loader import ExactLoader, exact_loader
from gateplug.data.module import ExactDataModule
from gateplug.data.order import EpochIndex, EpochSampler
from gateplug.data.overlay import OverlaidImages
from gateplug.data.randomness import permutation, sample_keys, uniform
from gateplug.data.ratings import Ratings
from gateplug.data.stream import TaskStream
from gateplug.data.synthetic import SyntheticTasks
from gateplug.data.text import TextData

__all__ = [
    "Augmentation",
    "Compose",
    "Cutout",
    "Digits",
    "EpochIndex",
    "EpochSampler",
    "ExactDataModule",
    "ExactLoader",
    "ImageData",
    "OverlaidImages",
    "RandomAffine",
    "RandomCrop",
    "RandomFlip",
    "Ratings",
    "SyntheticTasks",
    "TaskStream",
    "TextData",
    "exact_loader",
    "permutation",
    "sample_keys",
    "uniform",
]

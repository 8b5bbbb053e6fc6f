"""One LightningModule a task, over one base."""

from .base import EquilibriumModule
from .callbacks import InterruptCheckpoint, PredictionWriter, run_dir
from .image_classifier import ImageClassifier
from .semantic_segmenter import SemanticSegmenter

__all__ = [
    "EquilibriumModule",
    "ImageClassifier",
    "InterruptCheckpoint",
    "PredictionWriter",
    "SemanticSegmenter",
    "run_dir",
]

"""One LightningModule a task, over one base."""

from .base import EquilibriumModule
from .callbacks import InterruptCheckpoint, PredictionWriter, run_dir
from .image_classifier import ImageClassifier
from .language_model import LanguageModel
from .optical_flow import OpticalFlow
from .semantic_segmenter import SemanticSegmenter

__all__ = [
    "EquilibriumModule",
    "ImageClassifier",
    "InterruptCheckpoint",
    "LanguageModel",
    "OpticalFlow",
    "PredictionWriter",
    "SemanticSegmenter",
    "run_dir",
]

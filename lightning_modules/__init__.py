"""One LightningModule a task, over one base."""

from .base import EquilibriumModule
from .callbacks import PredictionWriter
from .image_classifier import ImageClassifier
from .interruptions import InterruptCheckpoint
from .language_model import LanguageModel
from .optical_flow import OpticalFlow
from .run_folder import run_dir
from .semantic_segmenter import SemanticSegmenter
from .sharding import WholeModelSharded
from .skipped_steps import SkippedSteps
from .trouble import TrainingError

__all__ = [
    "EquilibriumModule",
    "ImageClassifier",
    "InterruptCheckpoint",
    "LanguageModel",
    "OpticalFlow",
    "PredictionWriter",
    "SemanticSegmenter",
    "SkippedSteps",
    "TrainingError",
    "WholeModelSharded",
    "run_dir",
]

"""One LightningModule a task, over one base."""

from .base import EquilibriumModule
from .callbacks import InterruptCheckpoint, PredictionWriter, run_dir
from .image_classifier import ImageClassifier

__all__ = ["EquilibriumModule", "ImageClassifier", "InterruptCheckpoint", "PredictionWriter", "run_dir"]

"""The callbacks that every run of an equilibrium module has, from the command line and in a script."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from .compiled_cells import CompileCells
from .ending_together import EndTogether
from .out_of_memory import MemoryAdvice
from .run_folder import OneFolder
from .safe_checkpoints import SaveSafely
from .signals import StopOnSignal
from .skipped_steps import SkippedSteps
from .steps_of_log import StepsOfLog
from .training_figures import LearningRate, Throughput
from .validate_first import ValidateFirst

STANDARD: tuple[type[Callback], ...] = (
    OneFolder,
    CompileCells,
    StepsOfLog,
    SaveSafely,
    SkippedSteps,
    StopOnSignal,
    EndTogether,
    ValidateFirst,
    MemoryAdvice,
    LearningRate,
    Throughput,
)
"""Each is made without arguments; a run that was given one of its kind keeps that."""


def standard_callbacks(trainer: pl.Trainer) -> list[Callback]:
    """Those that this trainer was not given itself."""
    given: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [kind() for kind in STANDARD if not any(isinstance(callback, kind) for callback in given)]

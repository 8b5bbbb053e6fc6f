"""A log that has each step once, however often the run stopped and went on."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from .checkpoints import CheckpointError
from .continued_runs import ContinuedMetrics


class StepsOfLog(Callback):
    """Writes to disk what was logged until a checkpoint, with it; and numbers the steps of the log as the run's.

    Lightning 2.6 leaves the former to the logger, which may keep the last hundred steps in memory, and counts a step
    too many for some of the places in an epoch where a run can go on.

    Raises:
        CheckpointError: the log cannot be written.
    """

    def __init__(self) -> None:
        self._is_new = False
        self._is_behind = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let a ``metrics.csv`` be written so that a kill leaves it whole."""
        for logger in trainer.loggers:
            if type(logger) is not CSVLogger or not trainer.is_global_zero or "://" in logger.log_dir:
                continue
            own = logger.experiment
            if type(own) is ExperimentWriter and not own.metrics and not own.metrics_keys:
                logger._experiment = ContinuedMetrics(logger.log_dir)  # noqa: SLF001
                logger._experiment.log_hparams(own.hparams)  # noqa: SLF001

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first batch comes."""
        self._is_new = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Lightning's own corrections are made; and what it logged after the checkpoint is there."""
        if self._is_new and pl_module.automatic_optimization and len(trainer.optimizers) == 1:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # noqa: SLF001
        self._is_new = False
        self._catch_up(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The means over an epoch are logged after the checkpoint of its end."""
        self._catch_up(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """These steps are not logged again."""
        _write(trainer)
        self._is_behind = True

    def _catch_up(self, trainer: pl.Trainer) -> None:
        if self._is_behind:
            _write(trainer)
        self._is_behind = False


def _write(trainer: pl.Trainer) -> None:
    for logger in trainer.loggers:
        try:
            logger.save()
        except OSError as error:
            raise CheckpointError(
                f"the log in {logger.log_dir or logger.save_dir} could not be written: {error.strerror or error}. "
                "The last checkpoint is still whole. Make room, and go on from it: the same command with --resume auto"
            ) from error

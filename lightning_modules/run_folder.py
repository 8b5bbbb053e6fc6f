"""The folder of a run, the same for all its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

_AGREED: WeakKeyDictionary[Logger, Path] = WeakKeyDictionary()


def run_dir(trainer: pl.Trainer) -> Path:
    """The folder of this run alone: ``<save_dir>/<name>/<version>`` of the logger, as ModelCheckpoint has it."""
    logger = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    if logger in _AGREED:
        return _AGREED[logger]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir, str(logger.name), version)


class OneFolder(Callback):
    """Lets all processes of a run name the folder that the first one made.

    Each would look for the next free version by itself, and the later ones find the first one's already there.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the others."""
        if trainer.logger is not None:
            _AGREED[trainer.logger] = Path(trainer.strategy.broadcast(str(run_dir(trainer))))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say whose it is, wherever it is, and where each logger logs, so that all of them can go on there."""
        checkpoint["deq_zoo_run"] = str(run_dir(trainer))
        checkpoint["deq_zoo_loggers"] = [[type(logger).__name__, logger.version] for logger in trainer.loggers]

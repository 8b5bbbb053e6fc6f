"""Callbacks of the command line: nothing is lost when a run stops, and predictions are written."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter, Callback
from pytorch_lightning.utilities import rank_zero_info


def run_dir(trainer: pl.Trainer) -> Path:
    """The folder of this run alone: ``<save_dir>/<name>/<version>`` of the logger, as ModelCheckpoint has it."""
    logger = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir, str(logger.name), version)


class InterruptCheckpoint(Callback):
    """Writes a checkpoint when training is interrupted or fails, and says where it is and how to go on."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write ``interrupted.ckpt`` beside the other checkpoints, if training had begun."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step == 0:
            return
        folder = run_dir(trainer)
        path = folder / "checkpoints" / "interrupted.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        # The checkpoint knows the model and the data; the number of epochs, the logger and the rest are in this file.
        config = f"-c {folder / 'config.yaml'} " if (folder / "config.yaml").is_file() else ""
        rank_zero_info(
            f"Stopped at step {trainer.global_step} by {type(exception).__name__}. The state is saved in {path}\n"
            f"To go on:    python cli.py fit {config}--ckpt_path {path}\n"
            f"To test it:  python cli.py test --ckpt_path {path}"
        )


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returned, a dict of ``(B,)`` tensors, to ``predictions.csv`` in the run's folder.

    Under several processes each writes its own file, ``predictions.<rank>.csv``; the column ``index`` is the sample's
    position in the data set.
    """

    def __init__(self, write_interval: Literal["epoch"] = "epoch") -> None:
        super().__init__(write_interval)

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write one row a sample."""
        folder = run_dir(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions.{trainer.global_rank}.csv"
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            rows = 0
            for batch, indices in zip(predictions, batch_indices[0], strict=True):
                columns = {key: value.tolist() for key, value in batch.items()}
                if rows == 0:
                    writer.writerow(["index", *columns])
                writer.writerows(zip(indices, *columns.values(), strict=True))
                rows += len(indices)
        rank_zero_info(f"Wrote {rows} predictions to {folder / name}")

"""A checkpoint between a step and the validation that comes after it goes on with that validation."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class ValidateFirst(Callback):
    """Lets a checkpoint that is written at a step after which validation comes go on with that validation.

    Lightning 2.6 goes on with the step after it: what was validated there is never known, nor whether it was the best.
    """

    _one_more = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the step as done, and validation as begun."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        current = progress["current"]
        is_at_end_of_step = current["ready"] == current["processed"] == current["completed"] + 1
        if is_at_end_of_step and validation_is_due(trainer):
            for count in (progress["total"], current):
                count["completed"] = count["processed"]
            begin_validation_again(checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Where all ``max_steps`` were made, Lightning would not so much as begin."""
        self._one_more = False
        if trainer.state.fn == "fit" and checkpoint.get("global_step") == trainer.max_steps and "loops" in checkpoint:
            total = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
            self._one_more = total["ready"] > total["processed"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """So let there be one more, which is never made; the optimizer and its schedule are there by now."""
        if self._one_more:
            trainer.fit_loop.epoch_loop.max_steps += 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not where no validation comes after all, since this run has none."""
        if not validation_is_due(trainer):
            self._end(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """It has come."""
        if not trainer.sanity_checking:
            self._end(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        if self._one_more:
            trainer.fit_loop.epoch_loop.max_steps -= 1
        self._one_more = False


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether one comes after the batch that was made last."""
    data = trainer.fit_loop._data_fetcher  # noqa: SLF001 - as Lightning itself finds out
    return data is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(data)  # noqa: SLF001


def begin_validation_again(checkpoint: dict[str, Any]) -> None:
    """Let Lightning find its first batch begun and not done: it goes back to one that was interrupted, and no other."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        count.update(ready=1, started=1, processed=0, completed=0)
    progress["is_last_batch"] = False

"""Random numbers of training that a run draws again when it goes on from a checkpoint."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

KEY = "deq_zoo_run_seed"
"""Its place in a checkpoint."""


class RunSeed:
    """One number from which everything follows that is drawn in the training steps of a run.

    It is torch's seed when training begins, the first process's where each has its own, or that of the checkpoint that
    training goes on from, whatever the seed is now.
    """

    def __init__(self) -> None:
        self._of_run: int | None = None
        self._of_checkpoint: int | None = None

    @property
    def value(self) -> int:
        """Of the last run; before the first one, torch's seed."""
        return torch.initial_seed() if self._of_run is None else self._of_run

    def begin(self, trainer: pl.Trainer) -> None:
        """A run begins, after all that it goes on from was loaded."""
        found, self._of_checkpoint = self._of_checkpoint, None
        self._of_run = trainer.strategy.broadcast(torch.initial_seed()) if found is None else found

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write it into a checkpoint of a run."""
        if self._of_run is not None:
            checkpoint[KEY] = self._of_run

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Let the run that begins be the one of this checkpoint; one that does not say its seed gets a new one."""
        self._of_checkpoint = checkpoint.get(KEY)

    def seed_step(self, trainer: pl.Trainer, batch_index: int) -> None:
        """Seed torch, on all devices, ``random`` and numpy for a batch of this epoch, in each process otherwise.

        So dropout masks, probes, and what else a step draws, do not depend on what was drawn before it.
        """
        if self._of_run is None or self._of_checkpoint is not None:  # a module's own hooks did not let the run begin
            self.begin(trainer)
        key = ("step", self.value, trainer.current_epoch, batch_index, trainer.global_rank)
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - what a user's module may draw from


def correct_progress(trainer: pl.Trainer) -> None:
    """Correct what Lightning 2.6 makes of the progress in a checkpoint, before the first step of a run.

    With ``max_steps``, after a checkpoint that was written as an epoch ended, it would end that epoch once more: its
    hooks run again, and the next epoch is counted as the one after the next. After one that was written at an epoch's
    last step, it would not say that the next epoch begins; its hooks do not run, and a checkpoint from within it looks
    like one from its end. And a step that failed stays counted, by which the times of validations are shifted.
    """
    loop, steps = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        steps.restarting = False
        loop._restarting = False  # noqa: SLF001 - its setter says True for max_steps
        loop.reset_restart_stage()
    elif loop.restarted_mid_epoch and steps.restarted_on_train_batch_end and steps.batch_progress.is_last_batch:
        loop.reset_restart_stage()
    elif loop.restarting and not steps.restarted_on_train_batch_end:
        steps.batch_progress.total.reset_on_restart()

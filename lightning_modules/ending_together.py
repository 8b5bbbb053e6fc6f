"""Of several processes none is left behind when another one fails."""

from __future__ import annotations

import subprocess
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

PATIENCE = 10.0
"""Seconds in which the others may end by themselves, and say why."""


class EndTogether(Callback):
    """Where the strategy ``ddp`` started the other processes itself, ends them when this one fails.

    The other way round Lightning does it: when one of those fails, this one is killed. Other launchers, as torchrun and
    SLURM, do it both ways.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait a little, then kill."""
        started = getattr(trainer.strategy.launcher, "procs", None) or []
        others = [process for process in started if isinstance(process, subprocess.Popen)]
        end = time.monotonic() + PATIENCE
        for process in others:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

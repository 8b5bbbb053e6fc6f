"""Of several processes none is left behind when another one fails or is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.callbacks import Callback

PATIENCE = 10.0
"""Seconds in which the others may end by themselves, and say why."""

LAUNCHER = "DEQ_ZOO_LAUNCHER"
"""The variable of the environment that tells processes which one started them."""

_needless = threading.Event()
"""What the launcher does no longer matters to this process."""


class EndTogether(Callback):
    """Where the strategy ``ddp`` started the other processes itself, ends them when this one fails.

    The other way round Lightning does it: when one of those fails, this one is killed. Other launchers, as torchrun and
    SLURM, do it both ways.
    """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on each works by itself, and the first one may have finished before the others."""
        _needless.set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Wait a little, then kill."""
        end = time.monotonic() + PATIENCE
        for process in _started_by(trainer):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for_the_others(trainer: pl.Trainer) -> None:
    """Where the strategy ``ddp`` started the other processes itself, let this one end after them."""
    for process in _started_by(trainer):
        process.wait()


def _started_by(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    started = getattr(trainer.strategy.launcher, "procs", None) or []
    return [process for process in started if isinstance(process, subprocess.Popen)]


def end_with_the_launcher() -> None:
    """Let a process that the strategy ``ddp`` starts from this one end when this one is killed; call it in both.

    It would wait half an hour for a first process that was killed before they met; on GPUs for one that was killed
    later, too.
    """
    is_started = int(os.environ.get("LOCAL_RANK", "0")) > 0 and not TorchElasticEnvironment.detect()
    if is_started and LAUNCHER in os.environ:
        threading.Thread(target=_watch, args=(int(os.environ[LAUNCHER]),), daemon=True).start()
    else:
        os.environ[LAUNCHER] = str(os.getpid())


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    if not _needless.is_set():
        print(f"process {os.getpid()} ends: {launcher}, which started it, is gone", file=sys.stderr, flush=True)
        os._exit(1)

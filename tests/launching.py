"""The command line as users start it: in processes of its own, some of which fail or are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from tests.command_line import DIGITS, ROOT, TINY

CLI = str(ROOT / "cli.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
FIT = ("fit", "-c", DIGITS, *TINY)
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def start(*command: str) -> subprocess.Popen[str]:
    """A command whose output, of both kinds, is kept."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """All that it says; it has to end by itself."""
    try:
        return process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hung, after it said: {process.communicate()[0]}") from None


def wait_for(process: subprocess.Popen[str], there: Callable[[], Any]) -> None:
    """Until this is so, while the process lives."""
    while not there():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def children_of(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


class FailOnRank(pl.Callback):
    """One of the processes fails, alone.

    Args:
        rank: which.
        step: when.
    """

    def __init__(self, rank: int, step: int) -> None:
        self.rank = rank
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            raise ValueError("something is wrong here")


def killed_after(seconds: float, run: Callable[[], Any], until: Callable[[], Any] = lambda: True) -> bool:
    """Run this in a copy of this process, and kill it so long after ``until``; whether it had not ended by then."""
    process = os.fork()
    if process == 0:
        try:
            with open(os.devnull, "w", encoding="utf-8") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            run()
        finally:
            os._exit(0)
    while not until() and os.waitpid(process, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)

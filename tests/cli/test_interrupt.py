"""Ctrl-C leaves a checkpoint, says where it is, and the command that it prints goes on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from commands.training import ZooCLI
from tests.command_line import DIGITS, QUIET, ROOT, TINY, Fitted, fit, main, metrics, rows, said, same, weights

FOLDER = Path("runs", "tanh_deq_digits", "version_0")
INTERRUPTED = FOLDER / "checkpoints" / "interrupted.ckpt"


@pytest.fixture(autouse=True)
def _lightning_leaves_control_c_ignored() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def printed_commands(output: str) -> tuple[list[str], list[str]]:
    """The two commands, without ``python cli.py``."""
    (go_on,) = re.findall(r"To go on: +python cli.py (fit .*)", output)
    (test_it,) = re.findall(r"To test it: +python cli.py (test .*)", output)
    return shlex.split(go_on), shlex.split(test_it)


def go_on(command: list[str], epochs: int) -> Fitted:
    """The printed command; what is typed after it only ends the run early."""
    assert command[0] == "fit"
    return fit(*command[1:], "--trainer.max_epochs", str(epochs), "--test_after_fit", "false")


def test_control_c() -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "fit", "-c", DIGITS, *TINY, "--trainer.max_epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (FOLDER / "checkpoints" / "last.ckpt").exists():  # the first epoch has been validated
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    assert process.returncode not in (0, 2)
    assert "Traceback" not in output
    (step,) = re.findall(rf"Stopped at step (\d+) by KeyboardInterrupt. The state is saved in {INTERRUPTED}\n", output)
    stopped = torch.load(INTERRUPTED, weights_only=True)
    assert stopped["global_step"] == int(step) > 0
    assert next(row["epoch"] for row in rows(FOLDER / "metrics.csv") if row["val/loss"]) == "0"

    resume, test = printed_commands(output)
    tested = main(*test, *QUIET)
    assert 0 < metrics(tested)["test/accuracy"] < 1
    assert same(dict(weights(str(INTERRUPTED))), dict(tested.model.state_dict()))

    resumed = go_on(resume, epochs=stopped["epoch"] + 3)
    assert resumed.folder == Path.cwd() / FOLDER.with_name("version_1"), "the logger is the run's own"
    assert resumed.cli.trainer.limit_train_batches == 2, "the trainer is the run's own"
    assert torch.load(resumed.last, weights_only=True)["global_step"] > int(step)


class Interrupt(pl.Callback):
    """Ctrl-C after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            raise KeyboardInterrupt


def interrupted(after: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said by a run of five epochs of two steps that is interrupted."""
    make = ZooCLI.instantiate_trainer

    def with_an_interrupt(self: ZooCLI) -> pl.Trainer:
        trainer = make(self)
        trainer.callbacks.append(Interrupt(after))
        return trainer

    with monkeypatch.context() as patch, said() as messages:
        patch.setattr(ZooCLI, "instantiate_trainer", with_an_interrupt)
        with pytest.raises(SystemExit) as exit_:
            fit("-c", DIGITS, *TINY, "--trainer.max_epochs", "5")
    assert exit_.value.code not in (0, 2)
    return messages


@pytest.mark.parametrize("after", [3, 4], ids=["within an epoch", "at the end of an epoch"])
def test_every_step_is_made_once(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (message,) = [message for message in interrupted(after, monkeypatch) if message.startswith("Stopped")]
    assert message.startswith(f"Stopped at step {after} by KeyboardInterrupt. The state is saved in {INTERRUPTED}\n")
    resumed = go_on(printed_commands(message)[0], epochs=5)
    steps = [int(row["step"]) for row in rows(resumed.folder / "metrics.csv") if row["train/loss"]]
    assert steps == list(range(after, 10))
    end = torch.load(resumed.last, weights_only=True)
    assert (end["global_step"], end["epoch"]) == (10, 4)
    assert end["lr_schedulers"][0]["_last_lr"] == [pytest.approx(0, abs=1e-12)]  # the cosine's end

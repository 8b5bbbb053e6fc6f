"""SIGTERM and SIGUSR1 leave a checkpoint at the end of the step, from which a run goes on exactly."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from tests.cli.test_resume_auto import AUTO, LONG, RUNS, log, with_callback
from tests.command_line import DIGITS, QUIET, Fitted, fit, main, said, same

CHECKPOINTS = RUNS / "version_0" / "checkpoints"


class Signal(pl.Callback):
    """Comes while this hook runs, at this step."""

    def __init__(self, number: int, hook: str, step: int) -> None:
        self.number, self.step = number, step
        setattr(self, hook, self._come)

    def _come(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)


def run_with(number: int, hook: str, step: int, *args: str) -> tuple[int, list[str]]:
    """The exit status of a run to which a signal comes, and what was said."""
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with with_callback(Signal(number, hook, step)), said() as messages, pytest.raises(SystemExit) as exit_:
        fit("-c", DIGITS, *LONG, *args)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, messages


@pytest.mark.parametrize(
    ("hook", "step", "saved", "file"),
    [
        ("on_train_batch_start", 2, 3, "interrupted"),
        ("on_before_backward", 3, 4, "last"),
        ("on_train_batch_end", 4, 4, "last"),
        ("on_validation_batch_start", 2, 2, "last"),
        ("on_train_epoch_end", 4, 4, "last"),
    ],
)
def test_sigterm(hook: str, step: int, saved: int, file: str, never_stopped: Fitted) -> None:
    status, messages = run_with(signal.SIGTERM, hook, step, *AUTO)
    assert status == 143
    path = CHECKPOINTS / f"{file}.ckpt"
    (message,) = [message for message in messages if message.startswith("Stopped")]
    assert message.startswith(f"Stopped at step {saved} by SIGTERM. The state is saved in {path}\nTo go on: ")
    assert torch.load(path, weights_only=True)["global_step"] == saved
    resumed = fit("-c", DIGITS, *LONG, *AUTO)
    first, second = (torch.load(each.last, weights_only=True) for each in (never_stopped, resumed))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert same(first[part], second[part]), part
    assert log(resumed.folder) == log(never_stopped.folder)


def test_handlers_of_the_users_own_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """That for SIGTERM too, that for SIGUSR1 alone."""
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        with with_callback(Signal(signal.SIGUSR1, "on_train_batch_start", 1)):
            status, messages = run_with(signal.SIGTERM, "on_train_batch_start", 2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (status, came) == (143, [signal.SIGUSR1, signal.SIGTERM])
    assert not any(message.startswith("Asked") for message in messages)


def test_sigterm_when_training_has_ended(fitted: Fitted) -> None:
    status, messages = run_with(signal.SIGTERM, "on_validation_batch_start", 6)
    assert status == 143
    assert "Stopped by SIGTERM, when training had just ended, at step 6" in messages


def test_where_each_epoch_is_one_step() -> None:
    status, messages = run_with(
        *(signal.SIGTERM, "on_train_batch_start", 0, "--trainer.limit_train_batches", "1"),
        *("--checkpoint.every_n_train_steps", "10", "--checkpoint.save_last", "false"),
    )
    assert status == 143
    assert any(message.startswith("Stopped at step 2 by SIGTERM.") for message in messages)


def test_control_c_within_an_update_waits_for_its_end() -> None:
    class Late(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with with_callback(Late()), said() as messages, pytest.raises(SystemExit):
        fit("-c", DIGITS, *LONG)
    assert any(message.startswith("Stopped at step 3 by KeyboardInterrupt.") for message in messages)


def test_sigusr1_saves_and_training_goes_on() -> None:
    with with_callback(Signal(signal.SIGUSR1, "on_train_batch_start", 2)), said() as messages:
        run = fit("-c", DIGITS, *LONG)
    asked = f"Asked at step 3 by SIGUSR1. The state is saved in {CHECKPOINTS / 'interrupted.ckpt'}. Training goes on"
    assert messages.count(asked) == 1
    assert torch.load(CHECKPOINTS / "interrupted.ckpt", weights_only=True)["global_step"] == 3
    assert torch.load(run.last, weights_only=True)["global_step"] == 6


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM, with a scontrol that writes down what it is asked for."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return program


@pytest.mark.parametrize("array", [False, True])
def test_a_job_of_slurm_is_requeued(slurm: Path, array: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    status, messages = run_with(signal.SIGUSR1, "on_train_batch_start", 2)
    assert status == 0
    job = "16_3" if array else "17"
    assert (slurm.parents[1] / "asked").read_text() == f"requeue {job}\n"
    assert f"Job {job} is back in the queue of SLURM. It goes on from here if its command has --resume auto" in messages
    assert (CHECKPOINTS / "interrupted.ckpt").is_file()


@pytest.mark.parametrize("how", ["missing", "failing"])
def test_scontrol_fails(slurm: Path, how: str) -> None:
    if how == "failing":
        slurm.write_text("#!/bin/sh\necho 'slurm_update error: no' >&2\nexit 1\n")
    else:
        slurm.chmod(0o644)
    with pytest.warns(UserWarning, match="`scontrol requeue 17` failed, and the job ends here: .*"):
        status, _ = run_with(signal.SIGUSR1, "on_train_batch_start", 2)
    assert status == 0


def test_an_interactive_job_of_slurm_goes_on(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    with with_callback(Signal(signal.SIGUSR1, "on_train_batch_start", 2)):
        fit("-c", DIGITS, *LONG)
    assert not (slurm.parents[1] / "asked").exists()


def test_sigterm_ends_a_test(fitted: Fitted) -> None:
    with with_callback(Signal(signal.SIGTERM, "on_test_batch_start", 0)), pytest.raises(SystemExit) as exit_:
        main("test", "--ckpt_path", fitted.best, *QUIET)
    assert exit_.value.code == 143

"""Runs that are killed at any moment, and go on as if they had not been."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.command_line import DIGITS, TINY, Fitted, fit, metrics, same
from tests.launching import CLI, FIT, PATIENCE, TWO, children_of, killed_at, output_of, start, wait_for

# From Python 3.12 a fork of a process with threads is warned of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.usefixtures("nothing_is_left"),
]

RUNS = Path("runs", "tanh_deq_digits")
CHECKPOINTS = RUNS / "version_0" / "checkpoints"
LAST = CHECKPOINTS / "last.ckpt"
AUTO = ("--resume", "auto")
CONSTANT = ("--model.schedule", "constant")
FORKED = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
"""The same numbers as of ``ddp``, in a moment."""
KILLS = (0.01, 0.3, 0.2, 0.1, 0.2, 0.1)
"""About when each comes, as a part of an uninterrupted run."""


def is_the_same(run: Fitted, whole: Fitted) -> None:
    """Bit for bit."""
    first, second = (torch.load(each.last, weights_only=True) for each in (whole, run))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "loops"):
        assert same(first[part], second[part]), part
    assert {name: value for name, value in metrics(run.cli).items() if name.startswith("test/")} == {
        name: value for name, value in metrics(whole.cli).items() if name.startswith("test/")
    }
    scores = [each.cli.trainer.checkpoint_callback.best_model_score for each in (whole, run)]
    assert same(*scores)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within steps, validation and writes; each goes on from the last checkpoint of those before."""
    command = (
        "-c",
        DIGITS,
        *TINY,
        "--trainer.max_epochs",
        "8",
        "--model.show_every",
        "0",
        "--data.num_workers",
        str(workers),
    )
    whole = fit(*command)
    (tmp_path / "counted").mkdir()
    monkeypatch.chdir(tmp_path / "counted")
    calls = killed_at(0, lambda: fit(*command, *AUTO), tmp_path / "output")
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    rng, killed = random.Random(workers), 0
    for part in KILLS:
        at = int(calls * part * (0.5 + rng.random()))
        killed += killed_at(at, lambda: fit(*command, *AUTO), tmp_path / "output") == at
    assert killed >= len(KILLS) - 1, "it was too fast for this test"
    resumed = fit(*command, *AUTO)
    # A folder in which no checkpoint was written yet is left as it is; the run begins in the next one.
    assert {path.parents[1] for path in RUNS.absolute().rglob("*.ckpt")} == {resumed.folder}
    assert list(RUNS.rglob(".writing-*")) == []
    is_the_same(resumed, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(sys.executable, CLI, *FIT, *TWO, *CONSTANT, "--trainer.max_epochs", "100000")
    wait_for(process, LAST.exists)
    (other,) = children_of(process.pid)
    os.kill((process.pid, other)[rank], signal.SIGKILL)
    output = output_of(process)
    assert process.returncode != 0
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{other}").exists():  # it notices, if it was not the one
        time.sleep(0.1)
        assert time.monotonic() < deadline, "it waits for the one that is no more"
    stopped = max(torch.load(file, weights_only=True)["global_step"] for file in CHECKPOINTS.glob("*.ckpt"))
    if "Stopped at step" in output:
        assert re.findall(r"Stopped at step (\d+)", output) == [str(stopped)]

    command = ("-c", DIGITS, *TINY, *CONSTANT, "--trainer.max_epochs", str(stopped // 2 + 3), *FORKED)
    resumed = fit(*command, *AUTO, "--test_after_fit", "false")
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = fit(*command, "--test_after_fit", "false")
    first, second = (torch.load(each.last, weights_only=True) for each in (whole, resumed))
    for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert same(first[part], second[part]), part


def test_the_first_process_is_killed_before_they_meet() -> None:
    process = start(sys.executable, CLI, *FIT, *TWO)
    wait_for(process, lambda: children_of(process.pid))
    (other,) = children_of(process.pid)
    process.kill()
    output = output_of(process)  # which the other one writes to
    assert f"process {other} ends: {process.pid}, which started it, is gone" in output
    assert not RUNS.exists()


def test_the_first_process_ends_after_the_other() -> None:
    """It does not take away what the other one still has to do."""
    slow = ("--trainer.callbacks", "tests.launching.SlowToEnd", "--trainer.callbacks.file", "done")
    process = start(sys.executable, CLI, *FIT, *TWO, "--test_after_fit", "false", *slow)
    output = output_of(process)
    assert process.returncode == 0, output
    assert Path("done").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_fails(rank: int) -> None:
    """None waits for it: not in what all do together, nor in saving."""
    failing = ("--trainer.callbacks", "tests.launching.FailOnRank")
    arguments = ("--trainer.callbacks.rank", str(rank), "--trainer.callbacks.step", "3")
    process = start(sys.executable, CLI, *FIT, *TWO, "--trainer.max_epochs", "100000", *failing, *arguments)
    wait_for(process, LAST.exists)
    output = output_of(process)
    assert process.returncode not in (0, 2)
    assert "ValueError: something is wrong here" in output
    step = torch.load(CHECKPOINTS / "interrupted.ckpt", weights_only=True)["global_step"]
    assert step == 3

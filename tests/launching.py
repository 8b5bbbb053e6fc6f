"""The command line as users start it: in processes of its own, some of which fail or are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from lightning_modules import ImageClassifier
from tests.command_line import DIGITS, ROOT, TINY

CLI = str(ROOT / "cli.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
FIT = ("fit", "-c", DIGITS, *TINY)
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
PATIENCE = 300.0
"""Seconds after which a process hangs, rather than being slow on a busy machine."""

_OURS = {"DEQ_ZOO_TESTS_PROCESS": str(os.getpid())}
_started: list[subprocess.Popen[str]] = []


def start(*command: str) -> subprocess.Popen[str]:
    """A command whose output, of both kinds, is kept. The fixture ``nothing_is_left`` ends it in any case."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **_OURS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    _started.append(process)
    return process


def kill_all() -> None:
    """All that :func:`start` started and what these started: torchrun's are in sessions of their own, or orphans."""
    while found := list(_living()):
        for each in found:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
    for process in _started:
        process.wait(timeout=10)


def close_all() -> None:
    """And nothing is left of them."""
    kill_all()
    for process in _started:
        assert process.stdout is not None
        process.stdout.close()
    _started.clear()


def _living() -> Iterator[int]:
    """Known by their environment, which processes hand on."""
    ((name, value),) = _OURS.items()
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:  # it has ended, or is somebody else's
            continue
        if f"{name}={value}".encode() in words:
            yield int(file.parent.name)


def output_of(process: subprocess.Popen[str]) -> str:
    """All that it says; it has to end by itself, and all that it started."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it hung, after it said: {_last_words(process)}") from None


def wait_for(process: subprocess.Popen[str], there: Callable[[], Any]) -> None:
    """Until this is so, while the process lives."""
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert process.poll() is None, _last_words(process)
        assert time.monotonic() < deadline, f"it took too long, and said: {_last_words(process)}"
        time.sleep(0.02)


def _last_words(process: subprocess.Popen[str]) -> str:
    kill_all()
    return process.communicate(timeout=10)[0]


def children_of(process: int) -> list[int]:
    """The processes of the command line that this one of them started."""
    return [child for child in _children(process) if CLI.encode() in _command_line(child)]


def _children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return b""


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


class SlowToEnd(pl.Callback):
    """The second process has work left when the first one has none.

    Args:
        file: which it writes then.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.global_rank == 1:
            time.sleep(3.0)
            Path(self.file).touch()


def killed_at(call: int, run: Callable[[], Any], output: Path) -> int:
    """Run this in a copy of this process, which kills itself at so many calls of a function from the first
    training step on.

    Returns:
        how many calls there were; fewer than ``call`` if it had ended before.

    Raises:
        AssertionError: it failed by itself, or hung. It says so, with all that it wrote, which is in ``output``.
    """
    counted, count = os.pipe()
    process = os.fork()
    if process == 0:
        _run(lambda: _counted(run, call, count), output)
    os.close(count)
    status: int | None = None
    deadline = time.monotonic() + PATIENCE
    try:
        while (status := _ended(process)) is None:
            assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
            time.sleep(0.01)
    finally:
        if status is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        with os.fdopen(counted) as file:
            calls = file.read()
    assert status in (0, -signal.SIGKILL), output.read_text(encoding="utf-8")
    return call if status else int(calls)


def _counted(run: Callable[[], Any], last: int, result: int) -> None:
    """In the copy. What is written in C can be cut off at its beginning and at its end only."""
    calls, process = 0, os.getpid()

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if os.getpid() != process:  # a loader's worker
            sys.setprofile(None)
        elif event in ("call", "c_call", "c_return"):
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

    step = ImageClassifier.training_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        sys.setprofile(count)
        return step(*args, **kwargs)

    ImageClassifier.training_step = counted  # type: ignore[method-assign]
    run()
    sys.setprofile(None)
    os.write(result, str(calls).encode())


def _run(run: Callable[[], Any], output: Path) -> None:
    """In the copy, which never goes on with what the tests do."""
    status = 1
    try:
        with output.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                run()
                status = 0
            except BaseException:  # noqa: BLE001 - that of a parser's exit too
                traceback.print_exc(file=file)
    finally:
        os._exit(status)


def _ended(process: int) -> int | None:
    """Its exit status, once; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None

"""Several processes from the command line: the strategy ``ddp`` starts the same command again for each further rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.command_line import DIGITS, ROOT, TINY, main


class StartedError(Exception):
    """In place of another process."""


def test_ddp_starts_its_other_processes_with_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str], **_: object) -> None:
        started.append(command)
        raise StartedError

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the launcher leaves ranks and ports there
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as if this were no ``python -m pytest``
    typed = ["fit", "-c", DIGITS, *TINY, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    with pytest.raises(StartedError):
        main(*typed)
    assert started == [[sys.executable, str(ROOT / "cli.py"), *typed]]

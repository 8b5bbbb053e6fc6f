"""The command line is run in this process, each time in an empty folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands.training import ZooCLI
from tests.command_line import DIGITS, TINY, Fitted, fit
from tests.launching import close_all


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """Of the processes that a test starts, when it has failed too."""
    yield
    close_all()


@pytest.fixture(scope="session")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Three epochs at once, in a folder of its own: what runs that stop and go on are compared with."""
    with contextlib.chdir(tmp_path_factory.mktemp("never_stopped")):
        return fit("-c", DIGITS, *TINY, "--trainer.max_epochs", "3")


@pytest.fixture(scope="session")
def made() -> dict[str, Any]:
    """What the first ``setup_parser`` made."""
    return {}


@pytest.fixture(autouse=True)
def _one_parser(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the parser takes longer than parsing, and it is the same for all: make it once."""
    make = ZooCLI.setup_parser

    def make_once(self: ZooCLI, *args: Any) -> None:
        if not made:
            before = dict(vars(self))
            make(self, *args)
            made.update({key: value for key, value in vars(self).items() if before.get(key) is not value})
        vars(self).update(made)

    monkeypatch.setattr(ZooCLI, "setup_parser", make_once)

"""What all tests share: one thread each, Lightning's own noise filtered out, and one small finished run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zoo
from tests.command_line import DIGITS, TINY, Fitted, fit

# Several test processes share few cores, and these tensors are tiny: more threads only wait for each other.
torch.set_num_threads(1)

FILTERS = [
    # Lightning 2.6 asks torch >= 2.13 in an older way; nothing here can change that.
    "ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    # Advice to use more processes for loading; the digits are in memory, where they only cost.
    "ignore:.*does not have many workers:UserWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in FILTERS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A run of the default recipe, three short epochs of it, in a folder of its own. Nobody writes there."""
    folder = tmp_path_factory.mktemp("fitted")
    with contextlib.chdir(folder):
        return fit("-c", DIGITS, *TINY, "--trainer.max_epochs", "3", "--trainer.limit_val_batches", "null")


@pytest.fixture
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder where weights ship, in place of ``checkpoints/``; still empty."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(zoo.records, "weights_dir", lambda: folder)
        zoo.records.all_records.cache_clear()
        yield folder
    zoo.records.all_records.cache_clear()

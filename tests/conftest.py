"""What all tests share: one thread each, Lightning's own noise filtered out, and one small finished run."""

from __future__ import annotations

import contextlib
import os
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


@pytest.fixture(autouse=True)
def _no_seed_of_another_test() -> None:
    """Lightning keeps the seed of the command line in this variable, and seeds each process of DDP with it."""
    os.environ.pop("PL_GLOBAL_SEED", None)


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


@pytest.fixture
def wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B with all its folders here, no key, and a proxy that is not there for whatever would call out."""
    import wandb

    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere" / name))
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()

"""A checkpoint is whole or not there: whenever a writer is killed, and whatever a disk refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import socket
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.demos.boring_classes import BoringModel

from lightning_modules.checkpoints import CheckpointError, load_content
from lightning_modules.safe_checkpoints import SafeCheckpointIO, SaveSafely, replacing
from tests.command_line import same


def content(size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.arange(size, dtype=torch.float32)}, "epoch": 3}


def temporary(folder: Path, process: int, host: str | None = None) -> Path:
    return folder / f".writing-{host or socket.gethostname()}-{process}.tmp"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def a_dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_it_reads_as_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "made" / "with its folder" / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(content(), path)
    assert same(SafeCheckpointIO().load_checkpoint(path, weights_only=True), content())
    assert same(load_content(path), content())
    assert names(path.parent) == ["last.ckpt"]
    usual = tmp_path / "usual"
    usual.write_text("")
    assert path.stat().st_mode == usual.stat().st_mode


def test_it_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        happened.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("replace"), replace(a, b)))
    SafeCheckpointIO().save_checkpoint(content(), tmp_path / "last.ckpt")
    assert happened == [f"fsync {temporary(tmp_path, os.getpid()).name}", "replace", f"fsync {tmp_path.name}"]


def test_a_link_is_replaced_and_what_it_names_is_left(tmp_path: Path) -> None:
    io = SafeCheckpointIO()
    io.save_checkpoint(content(10), tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    io.save_checkpoint(content(20), tmp_path / "last.ckpt")
    assert same(load_content(tmp_path / "best.ckpt"), content(10))
    assert same(load_content(tmp_path / "last.ckpt"), content(20))


def save_for_ever(path: Path) -> int:
    """A process that does."""
    process = os.fork()
    if process:
        return process
    try:
        while True:
            SafeCheckpointIO().save_checkpoint(content(500_000), path)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_writer_that_is_killed_leaves_the_one_before(tmp_path: Path) -> None:
    """At random moments, most of them within a write."""
    path, rng = tmp_path / "last.ckpt", random.Random(0)
    SafeCheckpointIO().save_checkpoint(content(), path)
    left = 0
    for _ in range(10):
        writer = save_for_ever(path)
        while path.stat().st_size < 1_000_000:
            time.sleep(0.001)
        for _ in range(3):
            time.sleep(rng.random() * 0.03)
            os.kill(writer, signal.SIGSTOP)
            load_content(path)
            os.kill(writer, signal.SIGCONT)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        leftovers = list(tmp_path.glob(".writing-*"))
        assert len(leftovers) <= 1, "the next one removes what the one before left"
        assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last.ckpt"], "what is half written is no checkpoint"
        assert same(load_content(path), content(500_000))
        left += len(leftovers)
    assert left > 0, "no write was hit"
    SafeCheckpointIO().save_checkpoint(content(), path)
    assert names(tmp_path) == ["last.ckpt"]


def test_leftovers_of_the_living_stay(tmp_path: Path) -> None:
    dead, own = temporary(tmp_path, a_dead_process()), temporary(tmp_path, os.getpid())
    living, strange = temporary(tmp_path, os.getppid()), tmp_path / ".writing-something.tmp"
    far, far_and_old = (temporary(tmp_path, dead_or_alive, "elsewhere") for dead_or_alive in (1, 2))
    for file in (dead, own, living, strange, far, far_and_old):
        file.write_text("")
    os.utime(far_and_old, (0, time.time() - 100_000))
    SafeCheckpointIO().save_checkpoint(content(), tmp_path / "last.ckpt")
    assert names(tmp_path) == sorted(["last.ckpt", living.name, strange.name, far.name])


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """Within this context no file grows beyond this size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 5_000, 2_000_000], ids=["at once", "in the first buffer", "in the middle"])
def test_a_write_that_the_system_refuses(tmp_path: Path, size: int) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(content(10), path)
    with at_most(size), pytest.raises(CheckpointError) as error:
        SafeCheckpointIO().save_checkpoint(content(1_000_000), path)
    message = str(error.value)
    assert message.startswith(
        f"the checkpoint {path} could not be written. File too large: it takes about 4.0 MB, and "
    )
    assert message.endswith(
        f" MB are free there. The one from before, {path}, is still whole. Make room, and go on from it: the same "
        f"command with --resume auto, or with --ckpt_path {path}"
    )
    assert isinstance(error.value.__cause__, OSError)
    assert names(tmp_path) == ["last.ckpt"]
    assert same(load_content(path), content(10))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r"No space left on device: it takes about 0\.0 MB, and .* free there\. .*Make room, and start"),
        (errno.EDQUOT, r"Disk quota exceeded: it takes .*Make room, and start again"),
        (errno.EROFS, r"Read-only file system\. .*Make \S+ writable, and start again"),
        (errno.EACCES, r"Permission denied\. .*Make \S+ writable, and start again"),
    ],
)
def test_what_was_refused_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=rf"last\.ckpt could not be written\. {advice}"):
        SafeCheckpointIO().save_checkpoint(content(), tmp_path / "last.ckpt")
    assert names(tmp_path) == []


def test_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=f"File exists.* Make {tmp_path} writable, and start again; or save else"):
        SafeCheckpointIO().save_checkpoint(content(), tmp_path / "checkpoints" / "last.ckpt")


def test_what_cannot_be_saved_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="lambda") as error:
        SafeCheckpointIO().save_checkpoint({"function": lambda: None}, tmp_path / "last.ckpt")
    assert not isinstance(error.value, CheckpointError)
    assert names(tmp_path) == []


def test_control_c_within_a_write(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "last.ckpt") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == []


def test_remote_paths_are_left_to_lightning(tmp_path: Path) -> None:
    SafeCheckpointIO().save_checkpoint(content(), "memory://folder/last.ckpt")
    assert same(SafeCheckpointIO().load_checkpoint("memory://folder/last.ckpt", weights_only=True), content())
    with pytest.raises(TypeError, match="storage_options"):
        SafeCheckpointIO().save_checkpoint(content(), tmp_path / "last.ckpt", storage_options={})


def test_it_takes_no_memory_beside_what_is_saved(tmp_path: Path) -> None:
    """Lightning's own writes the file to memory first, which is Python's, as Python's tracing sees it."""
    large = {str(i): torch.ones(1_000_000) for i in range(10)}
    peaks = []
    for io in (TorchCheckpointIO(), SafeCheckpointIO()):
        tracemalloc.start()
        io.save_checkpoint(large, tmp_path / "last.ckpt")
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    assert peaks[0] > 40
    assert peaks[1] < 10


class Plugin(TorchCheckpointIO):
    """Somebody's own."""


@pytest.mark.parametrize(("given", "used"), [(None, SafeCheckpointIO), (Plugin, Plugin)])
def test_a_plugin_of_the_users_stays(given: type[Plugin] | None, used: type, tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        plugins=[given()] if given else [],
        callbacks=[SaveSafely()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    assert type(trainer.strategy.checkpoint_io) is used
    assert names(tmp_path / "checkpoints") == ["epoch=0-step=1.ckpt"]

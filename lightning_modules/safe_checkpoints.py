"""Checkpoints that are whole or not there: a kill, a full disk or a lost power supply leaves the one before."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils import _pytree as pytree

from .checkpoints import CheckpointError

_LEFTOVER = re.compile(r"\.writing-(?P<host>.+)-(?P<process>\d+)\.tmp")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Of errors of the system: the disk, the user's part of it, or what a file may have, is full."""

_A_DAY = 24 * 60 * 60


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's plain checkpoints, written beside their place and put there once every byte is on the disk.

    No second copy of what is saved is held in memory. Remote paths are Lightning's own matter.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: it cannot be written; what was there before is still whole.
        """
        if storage_options is not None or "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(Path(path)) as file:
                torch.save(checkpoint, file)
        except OSError as error:
            raise CheckpointError(_cannot_be_written(Path(path), error, _bytes_of(checkpoint))) from error


class SaveSafely(Callback):
    """Writes a run's checkpoints by :class:`SafeCheckpointIO`, unless it was given a plugin for that."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put it in the place of Lightning's plain one."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()


class _Recorded(io.FileIO):
    """A file that remembers why it could not be written: what torch.save raises then does not say."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """As of any file."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` at the end of this context, if nothing was raised.

    It is written in the same folder, as ``.writing-<host>-<process>.tmp``. What killed processes left behind under
    such a name is removed first.

    Raises:
        OSError: it could not be written, for whatever reason; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    temporary = path.parent / f".writing-{socket.gethostname()}-{os.getpid()}.tmp"
    raw = _Recorded(temporary, "xb")
    try:
        with io.BufferedWriter(raw, 1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if raw.error is not None and isinstance(error, Exception):
            raise raw.error from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """See that the new name is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no such thing; the file itself is whole
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes were writing here when they were killed.

    Of another machine it is not known whether a process lives: what it writes is left for a day.
    """
    for file in folder.glob(".writing-*.tmp"):
        found = _LEFTOVER.fullmatch(file.name)
        if found is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # the other process has finished just now
            if found["host"] == socket.gethostname():
                over = not _lives_elsewhere(int(found["process"]))
            else:
                over = time.time() - file.stat().st_mtime > _A_DAY
            if over:
                file.unlink()


def _lives_elsewhere(process: int) -> bool:
    """Whether there is such a process, other than this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _cannot_be_written(path: Path, error: OSError, size: int) -> str:
    """What to say of it: what is needed, what is left, and how to go on."""
    others = sorted(path.parent.glob("*.ckpt"), key=lambda file: file.stat().st_mtime) if path.parent.is_dir() else []
    before = path if path.is_file() else next(iter(others[::-1]), None)
    reason = error.strerror or str(error)
    place = next(folder for folder in (path.parent, *path.parent.absolute().parents) if folder.is_dir())
    room = f"it takes about {_megabytes(size)}, and {_megabytes(shutil.disk_usage(place).free)} are free there"
    what, advice = (f"{reason}: {room}", "Make room") if error.errno in NO_ROOM else (reason, f"Make {place} writable")
    if before is None:
        return (
            f"the checkpoint {path} could not be written. {what}. There is none from before in that folder. {advice}, "
            "and start again; or save elsewhere, with --checkpoint.dirpath"
        )
    return (
        f"the checkpoint {path} could not be written. {what}. The one from before, {before}, is still whole. {advice}, "
        f"and go on from it: the same command with --resume auto, or with --ckpt_path {before}"
    )


def _bytes_of(checkpoint: dict[str, Any]) -> int:
    """Of its tensors, those that share memory once."""
    tensors = [leaf for leaf in pytree.tree_leaves(checkpoint) if isinstance(leaf, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if type(x) is Tensor}
    return sum(storages.values())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"

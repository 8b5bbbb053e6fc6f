"""From a source of weights, as users write it, to a local file and what its sha256 has to be."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from . import cache
from .blobs import checked_sha256, shown
from .errors import WeightsError
from .implicit.choices import nearest
from .records import ORIGINAL, WeightsRecord, all_records
from .sources import fetch, is_remote
from .weight_files import sha256_of

SOURCES = (
    "a name of zoo.list_weights(), a file, a folder, file:PATH, https:..., hf:org/name[@revision], "
    "wandb:entity/project/artifact:alias, or torchvision:Raft_Large_Weights...."
)
TORCHVISION = "torchvision:"

_FILE = "file:"
_SCHEME = re.compile(r"[A-Za-z][\w+.-]+:")
_KINDS = ["https:", "http:", "hf:", "wandb:", _FILE, TORCHVISION]
_SUFFIXES = {".safetensors", ".ckpt", ".pth", ".pt", ".pkl", ".tar", ".bin"}
_IN_FOLDERS = ("model.safetensors", "checkpoints/best.ckpt", "best.ckpt")  # of save_pretrained, and of a run


class Pin(NamedTuple):
    """A sha256 that a file has to have."""

    sha256: str
    says: str  # who says so
    advice: str


@dataclass(frozen=True)
class Found:
    """A source as a local file.

    Attributes:
        where: how the user called it, without what may be secret.
        path: which is read.
        record: of the weights, if they have one.
        pins: what the file's sha256 has to be.
    """

    where: str
    path: Path
    record: WeightsRecord | None
    pins: tuple[Pin, ...]

    def check(self, data: bytes | bytearray) -> None:
        """Raise WeightsError unless these bytes of the file are the right ones."""
        found = sha256_of(data) if self.pins else ""
        for pin in self.pins:
            if found != pin.sha256:
                raise WeightsError(
                    f"{self.path} is damaged or was replaced: its sha256 is {found}, {pin.says} {pin.sha256}; "
                    f"nothing was loaded. {pin.advice}"
                )


def is_source(source: str) -> bool:
    """Whether this is something else than the path of a file: what else :func:`load_pretrained` takes."""
    return (
        is_remote(source)
        or source.startswith((_FILE, TORCHVISION))
        or source in all_records()
        or Path(source).expanduser().is_dir()
    )


def find(source: str, cache_dir: str | os.PathLike[str] | None, offline: bool | None, sha256: str | None) -> Found:
    """The local file of a source, fetched if it has to be.

    Args:
        source: what :func:`zoo.load_pretrained` takes, but for ``torchvision:``.
        cache_dir: see there.
        offline: see there.
        sha256: see there.

    Raises:
        ValueError: unknown name or kind of source.
        WeightsError: there is no such file, or it cannot be fetched.
    """
    if source in ("", _FILE, f"{_FILE}//"):  # as a path, the current folder
        raise ValueError(f"load_pretrained takes {SOURCES}; given: {source!r}")
    where = shown(source)
    pins = []
    if sha256 is not None:
        pins.append(Pin(checked_sha256(sha256), "and it was asked for", f"Look where {where} comes from"))
    record = all_records().get(source)
    if record is None and is_remote(source):
        path = fetch(source, cache_dir=cache_dir, offline=offline, sha256=sha256)
        return Found(where, path, None, tuple(pins))
    if record is None:
        path = _local(source)
        record = _record_of(path)
    else:
        path = _recorded(record, cache_dir)
    if record is not None and record.source == ORIGINAL:
        from .originals.recorded import pins_of

        pins.extend(pins_of(record, path))
    elif record is not None:
        advice = "Restore the file: git checkout -- checkpoints, or install the package again"
        pins.append(Pin(str(record.sha256), "its record says", advice))
    return Found(where, path, record, tuple(pins))


def _local(source: str) -> Path:
    """The file that a path means, which can be that of a folder."""
    path = _path(source)
    if path.is_dir():
        for name in _IN_FOLDERS:
            if (path / name).is_file():
                return path / name
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise WeightsError(
            f"the folder {path} has none of {', '.join(_IN_FOLDERS)}; there is: {there}. Give the path of a file, or "
            "a folder of save_pretrained or of a run"
        )
    if path.exists():
        return path
    if source.startswith(_FILE) or (not _SCHEME.match(source) and (path.suffix in _SUFFIXES or os.sep in source)):
        raise WeightsError(f"there is no file {path}{_near(path)}. load_pretrained takes {SOURCES}")
    if scheme := _SCHEME.match(source):
        hint = nearest(scheme.group(), _KINDS)
    else:
        hint = nearest(source, sorted(all_records()), "zoo.list_weights()")
    raise ValueError(f"unknown weights {shown(source)!r}.{hint} It takes {SOURCES}")


def _path(source: str) -> Path:
    """``file:///a/b``, ``file:b`` and ``b`` as paths."""
    if source.startswith(f"{_FILE}//"):
        return Path(url2pathname(urlsplit(source).path))
    return Path(source.removeprefix(_FILE)).expanduser()


def _near(path: Path) -> str:
    """What a user may have meant by a path that is not there."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = [name for name in names if name.startswith(f"{path.name}.")][:3]
    close = close or difflib.get_close_matches(path.name, names, n=3)
    return f"; near is {', '.join(str(path.parent / name) for name in close)}" if close else ""


def _record_of(path: Path) -> WeightsRecord | None:
    """The record of weights that ship, where this path is theirs."""
    record = all_records().get(path.stem)
    ships = record is not None and record.source != ORIGINAL and record.path.resolve() == path.resolve()
    return record if ships else None


def _recorded(record: WeightsRecord, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The file of a record, if it is there."""
    if record.source != ORIGINAL:
        try:
            record.path.stat()
        except OSError as error:
            raise WeightsError(
                f"the weights {record.name} ship in {record.path}, which cannot be read ({error.strerror}); "
                "restore the file: git checkout -- checkpoints, or install the package again"
            ) from None
        return record.path
    path = cache.cache_dir(cache_dir) / record.path.relative_to(cache.cache_dir())
    if not path.is_file():
        raise WeightsError(
            f"{record.name} were published by the original authors, and have to be fetched by hand: get "
            f"{record.file} from {record.download}, and put it at {path}; or give its path to zoo.load_original"
        )
    return path

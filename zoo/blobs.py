"""The cache of fetched files: named by their content, and hashed whole each time that one is used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .cache import CACHE_VARIABLE
from .errors import WeightsError

log = logging.getLogger("zoo")

SPARE = 1 << 24  # bytes of disk left free

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,12}")


@dataclass(frozen=True)
class Recorded:
    """What the cache knows of a source.

    Attributes:
        source: as users write it, without a query, which may hold a secret.
        sha256: of the whole file.
        version: what the source called its content, where an alias like ``latest`` may move on.
    """

    source: str
    sha256: str
    version: str | None = None


class Blobs:
    """A folder with ``blobs/<sha256>.<suffix>``, and in ``sources/`` a small JSON for each source that says which.

    A source without a pinned sha256 is pinned by its first use: other content under its name is refused later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def note(self, source: str) -> Path:
        """Where the cache notes the sha256 of a source."""
        return self.folder / "sources" / f"{key(source)}.json"

    def recorded(self, source: str) -> Recorded | None:
        """What the cache knows of a source.

        Raises:
            WeightsError: the note is damaged.
        """
        path = self.note(source)
        try:
            record = Recorded(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{path} is damaged ({error}); delete it, and {shown(source)} is fetched anew") from None
        if not _SHA256.fullmatch(str(record.sha256)):
            raise WeightsError(f"{path} is damaged (no sha256); delete it, and {shown(source)} is fetched anew")
        return record

    def find(self, sha256: str) -> Path | None:
        """The file of this content, or None where it is missing or damaged; damage is logged."""
        for path in sorted(self.folder.glob(f"blobs/{sha256}*")):
            if (found := sha256_of_file(path)) == sha256:
                return path
            log.warning("%s is damaged or was replaced: its sha256 is %s; it is not used", path, found)
        return None

    def add(self, source: str, file: Path, sha256: str, suffix: str, version: str | None = None) -> Path:
        """Move a file, whose sha256 was computed, into the cache, and note that it is what ``source`` has."""
        path = self.folder / "blobs" / (sha256 + (suffix if _SUFFIX.fullmatch(suffix) else ""))
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, path)
        self.pin(source, sha256, version)
        return path

    def pin(self, source: str, sha256: str, version: str | None = None) -> None:
        """Note the sha256 of a source."""
        path = self.note(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{uuid.uuid4().hex}")
        new.write_text(json.dumps(asdict(Recorded(shown(source), sha256, version)), indent=2) + "\n", encoding="utf-8")
        os.replace(new, path)

    def refuse_other_content(self, source: str, found: str, *, pinned: str | None, known: str | None) -> None:
        """Raise WeightsError unless a sha256 is the one that the user pinned, else the known one of the first use."""
        wanted = pinned or known
        if wanted is None or found == wanted:
            return
        said = "it was pinned to" if pinned else f"at its first use ({self.note(source)}) it was"
        advice = "" if pinned else "; if the change is meant, delete that file, or pin the new one with sha256="
        raise WeightsError(
            f"{shown(source)} has other content: its sha256 is {found}, {said} {wanted}; nothing was loaded{advice}"
        )

    @contextmanager
    def keeping(self, source: str) -> Iterator[None]:
        """What the disk refuses while a source is brought is one WeightsError."""
        try:
            yield
        except OSError as error:
            raise WeightsError(
                f"{shown(source)} cannot be kept in the cache {self.folder}: {error}; "
                f"choose another with cache_dir= or {CACHE_VARIABLE}"
            ) from None

    @contextmanager
    def lock(self, source: str) -> Iterator[None]:
        """Let one process at a time fetch a source; the others wait, and find it in the cache."""
        import filelock

        path = self.folder / "locks" / f"{key(source)}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            log.warning("another process is fetching %s; waiting for it", shown(source))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def key(source: str) -> str:
    """The name of a source's own files in the cache."""
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def shown(source: str) -> str:
    """A source as messages and notes have it: an address without its query and password, which are secrets."""
    if not source.lower().startswith(("https:", "http:")):
        return source
    return re.sub(r"//[^/]*@", "//...@", source.partition("?")[0])


def inline(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def require_room(folder: Path, source: str, missing: int, size: str) -> None:
    """Raise WeightsError, which says that the source has ``size`` bytes, where the ``missing`` ones fill the disk."""
    free = shutil.disk_usage(folder).free
    if missing + SPARE > free:
        raise WeightsError(
            f"{shown(source)} has {size} bytes, and {folder} has {free:,} free; "
            f"make room, or choose another cache with cache_dir= or {CACHE_VARIABLE}"
        )


def sha256_of_file(path: Path) -> str:
    """The hexadecimal sha256 digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_sha256(given: str) -> str:
    """A sha256 that a user wrote, in lower case.

    Raises:
        ValueError: it is not one.
    """
    if not _SHA256.fullmatch(str(given).lower()):
        raise ValueError(f"a sha256 has 64 hexadecimal digits; given: {given!r}. `sha256sum FILE` prints it")
    return given.lower()


def refuse_other_files(path: Path, source: str) -> None:
    """Raise WeightsError where a file is neither safetensors nor what torch.save writes: an HTML page, say."""
    with path.open("rb") as file:
        head = file.read(512)
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header + 8 <= path.stat().st_size:
        return
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return
    words = " ".join(head.decode("utf-8", "replace").split())[:80]
    what = f"it begins with {words!r}" if head else "it is empty"
    raise WeightsError(f"{shown(source)} gave no weights file (safetensors, or one of torch.save): {what}")

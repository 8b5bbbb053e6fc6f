"""Weights from a web server: resumed where they were cut, checked, and kept under the name of their content."""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from .blobs import Blobs, key, log, refuse_other_files, require_room, shown
from .errors import WeightsError

TIMEOUT = 20.0  # seconds without a byte
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before the second, third, ... try
_PIECE = 1 << 18  # bytes read at once
_NOTE_EVERY = 1 << 24  # bytes between two notes of how far a file has come
_AGAIN = {408, 429, 500, 502, 503, 504}  # statuses that may be gone at the next try


class _CutError(Exception):
    """A transfer ended early; the next try may go on."""


def download(url: str, blobs: Blobs, *, offline: bool, sha256: str | None = None) -> Path:
    """The file at an ``https:`` address, in the cache, verified.

    A file that was cut off is continued (Range and If-Range) at the next try or the next call, if the server names a
    version of it (ETag or Last-Modified) and the part that came is as it was left. Redirects lead to ``https:`` only.

    Args:
        url: the address. ``http:`` is for this machine, or for content that ``sha256`` pins: anybody on the way can
            change what it brings.
        blobs: the cache.
        offline: open no connection.
        sha256: that the file must have. Without it, the first download pins it.

    Raises:
        ValueError: the address is none, or not to be trusted.
        WeightsError: it cannot be fetched, is not weights, or has another sha256; nothing of it is used.
    """
    _check_address(url, pinned=sha256 is not None)
    known = blobs.recorded(url)
    wanted = sha256 or (known.sha256 if known else None)
    if wanted and (path := blobs.find(wanted)):
        return path
    if offline:
        file = blobs.folder / "blobs" / f"{wanted}{_suffix(url)}"
        where = f"it would be {file}" if wanted else f"it would be noted in {blobs.note(url)}"
        raise WeightsError(
            f"{shown(url)} is not in the cache ({where}), and nothing is fetched offline; load it once "
            "where there is a network, with the same cache, or load a copy of the file by its path"
        )
    with blobs.lock(url):
        known = blobs.recorded(url)  # by a process that was before this one
        wanted = sha256 or (known.sha256 if known else None)
        return (wanted and blobs.find(wanted)) or _fetch(url, blobs, wanted, pinned=sha256 is not None)


def _fetch(url: str, blobs: Blobs, wanted: str | None, *, pinned: bool) -> Path:
    part = _Part(blobs.folder / "parts" / key(url))
    opener = _opener(url, pinned=pinned)
    for wait in (*WAITS, None):
        try:
            _transfer(url, opener, part, may_be_endless=pinned)
            break
        except _CutError as error:
            if wait is None:
                kept = f" What came, {part.size:,} bytes, is kept: run it again to go on" if part.version else ""
                raise WeightsError(
                    f"{shown(url)} cannot be fetched: {error}; tried {len(WAITS) + 1} times.{kept}"
                ) from None
            log.info("%s: %s; trying again in %s s", shown(url), error, wait)
            time.sleep(wait)
    found = part.digest.hexdigest()
    try:
        refuse_other_files(part.path, url)
        blobs.refuse_other_content(url, found, pinned=wanted if pinned else None, known=wanted)
        return blobs.add(url, part.path, found, _suffix(url))
    finally:
        part.clear()


def _transfer(url: str, opener: urllib.request.OpenerDirector, part: _Part, *, may_be_endless: bool) -> None:
    """Bring a file, or what is missing of it."""
    headers = {"User-Agent": "deq-zoo", "Accept-Encoding": "identity"}
    if part.size and part.version:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.version}
    with _open(opener, urllib.request.Request(url, headers=headers), part) as response:  # noqa: S310 - checked above
        version = _version(response.headers)
        if response.status == http.client.PARTIAL_CONTENT:
            start, total = _content_range(response.headers)
            if start != part.size or (version and version != part.version):
                part.clear()
                raise _CutError("the server sent another part than was asked for")
        else:
            total = int(length) if (length := response.headers.get("Content-Length", "")).isdecimal() else None
            part.clear()
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise WeightsError(f"{shown(url)} is compressed on its way, though it was asked for as it is")
        chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
        if total is None and not (chunked or may_be_endless):
            raise WeightsError(
                f"{shown(url)} comes without its length, so that an end cannot be told from a cut; give sha256="
            )
        _require_room(url, part, total)
        part.version = version or part.version
        with _bar(PurePosixPath(urlsplit(url).path).name, total, part.size) as advance, part.writing() as write:
            while piece := _read(response):
                _require_room(url, part, total, len(piece))
                write(piece)
                advance(len(piece))
        if total is not None and part.size != total:
            raise _CutError(f"{part.size:,} of {total:,} bytes came")


def _require_room(url: str, part: _Part, total: int | None, coming: int = 0) -> None:
    """Raise WeightsError where a file of ``total`` bytes, or else the ``coming`` ones, would fill the disk."""
    if total is not None:
        require_room(part.path.parent, url, total - part.size, f"{total:,}")
        return
    try:
        require_room(part.path.parent, url, coming, f"more than {part.size:,}")
    except WeightsError:
        part.version = ""  # a file without end is not to be gone on with
        raise


class _Part:
    """A file that has not come whole yet; beside it, how far it had come and what that part's sha256 was.

    Attributes:
        size: bytes there.
        version: what the server calls this content.
        digest: the sha256 of what is there, as a hashlib object.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, path.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.size, self.version, self.digest = 0, "", hashlib.sha256()
        self._noted = 0
        if self.notes.exists() and not self._go_on():
            log.warning("%s is not as it was left; its download starts afresh", path)
            self.clear()

    def _go_on(self) -> bool:
        """Take up what is there, if it is as it was left."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
            size, version, sha256 = int(notes["size"]), str(notes["version"]), str(notes["sha256"])
            with self.path.open("r+b") as file:
                while self.size < size and (piece := file.read(min(_PIECE, size - self.size))):
                    self.digest.update(piece)
                    self.size += len(piece)
                file.truncate(self.size)  # what came after the last note
        except (OSError, KeyError, TypeError, ValueError):
            return False
        self.version, self._noted = version, size
        return bool(size == self.size and self.digest.hexdigest() == sha256 and version)

    def clear(self) -> None:
        """Forget what came."""
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
        self.size, self.version, self.digest, self._noted = 0, "", hashlib.sha256(), 0

    @contextmanager
    def writing(self) -> Iterator[Callable[[bytes], None]]:
        """A function that appends bytes; however it ends, it is noted how far the file has come.

        Where that cannot be gone on with, nothing is left of it.
        """
        with self.path.open("ab") as file:

            def write(piece: bytes) -> None:
                file.write(piece)
                self.digest.update(piece)
                self.size += len(piece)
                if self.size - self._noted >= _NOTE_EVERY:
                    file.flush()
                    self._note()

            try:
                yield write
            except BaseException:
                if not self.version:
                    self.clear()
                raise
            finally:
                file.flush()
                self._note()

    def _note(self) -> None:
        if self.version:  # without it, the server cannot go on
            notes = {"size": self.size, "version": self.version, "sha256": self.digest.hexdigest()}
            self.notes.write_text(json.dumps(notes), encoding="utf-8")
            self._noted = self.size


def _version(headers: http.client.HTTPMessage) -> str:
    """What the server calls this content, good for If-Range: a strong ETag, else the time of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _content_range(headers: http.client.HTTPMessage) -> tuple[int, int | None]:
    """``Content-Range: bytes 5-9/10`` -> (5, 10)."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if not found:
        return -1, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_PIECE)
    except TimeoutError:
        raise _CutError(f"nothing came for {TIMEOUT:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"the connection was cut ({type(error).__name__})") from None


@contextmanager
def _open(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request, part: _Part
) -> Iterator[http.client.HTTPResponse]:
    """The response to a request; what cannot be tried again is one WeightsError."""
    url = shown(request.full_url)
    try:
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and part.size:
            part.clear()
            raise _CutError("the server has less than what came before") from None
        if error.code in _AGAIN:
            raise _CutError(f"the server answers {error.code} {error.msg}") from None
        advice = {
            401: "; it wants a login: fetch the file by hand, and load it by its path",
            403: "; it wants a login, or the link has run out: fetch the file by hand, and load it by its path",
            404: "; there is no such file: see whether the address is right",
            410: "; the file is there no more",
        }
        raise WeightsError(
            f"{url} cannot be fetched: the server answers {error.code} {' '.join(str(error.msg).split())}"
            f"{advice.get(error.code, '')}"
        ) from None
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, socket.gaierror):
            visited: dict[str, int] = getattr(request, "redirect_dict", {})  # urllib's, of where it was sent
            host = urlsplit([request.full_url, *visited][-1]).hostname
            raise WeightsError(
                f"{url} cannot be fetched: no address of {host} is known; is there a network? ({reason})"
            ) from None
        if isinstance(reason, ssl.SSLError):
            raise WeightsError(f"{url} cannot be fetched: no secure connection to {request.host} ({reason})") from None
        raise _CutError(f"no connection ({reason})") from None
    except TimeoutError:
        raise _CutError(f"no answer within {TIMEOUT:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"no answer ({type(error).__name__})") from None
    with response:
        yield response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to addresses that are as good as the first one."""

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request at the new address."""
        new, old = urlsplit(newurl), urlsplit(req.full_url)
        plain = new.scheme == "http" and (self.pinned or (old.scheme == "http" and _is_here(new.hostname)))
        if new.scheme != "https" and not plain:
            fp.close()
            raise WeightsError(
                f"{shown(req.full_url)} redirects to {shown(newurl)}, which is not followed: only to https: addresses"
            )
        try:
            _check_address(newurl, pinned=self.pinned)
        except ValueError as error:
            fp.close()
            raise WeightsError(f"{shown(req.full_url)} redirects where it is not followed: {error}") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(url: str, *, pinned: bool) -> urllib.request.OpenerDirector:
    """What knows http and https, and neither files nor ftp."""
    opener = urllib.request.OpenerDirector()
    proxies: dict[str, str] | None = {} if _is_here(urlsplit(url).hostname) else None  # None: those of the environment
    for handler in (
        urllib.request.ProxyHandler(proxies),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(pinned=pinned),
    ):
        opener.add_handler(handler)
    return opener


def _check_address(url: str, *, pinned: bool) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError as error:
        raise ValueError(f"{shown(url)} is no address: {error}") from None
    if not parts.hostname or not url.isascii() or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError(f"{shown(url)!r} is no address; https://HOST/PATH is, with %20 for spaces and the like")
    if parts.username or parts.password:
        raise ValueError(f"an address with a password in it is not fetched; fetch the file of {parts.hostname} by hand")
    if parts.scheme == "http" and not (pinned or _is_here(parts.hostname)):
        raise ValueError(
            f"{shown(url)}: over http: anybody on the way can change the file; use https:, or pin it with sha256="
        )


def _is_here(host: str | None) -> bool:
    """Whether a host is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _suffix(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).suffix


@contextmanager
def _bar(name: str, total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar where standard error is a terminal; a function that moves it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda count: progress.advance(task, count)

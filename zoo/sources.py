"""Where weights come from that are not on this machine yet: one function that brings any of them."""

from __future__ import annotations

import os
from pathlib import Path

from . import cache
from .blobs import Blobs, checked_sha256, shown

_REMOTE = ("https:", "http:", "hf:", "wandb:")


def is_remote(source: str) -> bool:
    """Whether a source has to be fetched: ``https:``, ``http:``, ``hf:`` or ``wandb:``."""
    return source.lower().startswith(_REMOTE)


def fetch(
    source: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    sha256: str | None = None,
) -> Path:
    """A local file with what ``source`` names, verified.

    Args:
        source: ``https://host/path``, see :func:`zoo.downloads.download`; ``hf:org/name[@revision][/file]`` of the
            Hugging Face hub (``model.safetensors`` without a file); or ``wandb:entity/project/artifact:alias``.
            ``#sha256=...`` at its end is the same as the argument.
        cache_dir: where files are kept; see :func:`zoo.cache.cache_dir`.
        offline: open no connection; see :func:`zoo.cache.is_offline`.
        sha256: of the whole file. It is computed at every call, also for what is in the cache, and compared with this
            one, else with what the source itself says of its content, else with that of the first use.

    Raises:
        ValueError: the source, or the sha256, is not written as it should be.
        WeightsError: the file cannot be fetched, or is not what it should be; nothing of it is used.
    """
    source, sha256 = _pinned(source, sha256)
    kind, _, rest = source.partition(":")
    blobs, is_offline = Blobs(cache.cache_dir(cache_dir)), cache.is_offline(offline)
    with blobs.keeping(source):
        match kind.lower():
            case "https" | "http":
                from .downloads import download

                return download(source, blobs, offline=is_offline, sha256=sha256)
            case "hf":
                from .hubs import fetch_from_hub

                return fetch_from_hub(rest, blobs, offline=is_offline, sha256=sha256)
            case "wandb":
                from .artifacts import fetch_artifact

                return fetch_artifact(rest, blobs, offline=is_offline, sha256=sha256)
    raise ValueError(f"{shown(source)!r} is nothing to be fetched; what is begins with {', '.join(_REMOTE)}")


def _pinned(source: str, sha256: str | None) -> tuple[str, str | None]:
    """``("https://x/y#sha256=ab...", None)`` -> ``("https://x/y", "ab...")``."""
    source, _, fragment = source.partition("#")
    if fragment:
        if not fragment.startswith("sha256="):
            raise ValueError(f"after # stands sha256=<64 hexadecimal digits>; given: {fragment!r}")
        written = checked_sha256(fragment.removeprefix("sha256="))
        if sha256 is not None and checked_sha256(sha256) != written:
            raise ValueError(f"{shown(source)} is pinned twice: to {written} after #, and to {sha256} by sha256=")
        return source, written
    return source, None if sha256 is None else checked_sha256(sha256)

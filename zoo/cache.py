"""Where files that are fetched stay."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "DEQ_ZOO_CACHE"
OFFLINE_VARIABLE = "DEQ_ZOO_OFFLINE"


def cache_dir(given: str | os.PathLike[str] | None = None) -> Path:
    """The folder of fetched files: ``given``, else ``$DEQ_ZOO_CACHE``, else ``deq-zoo`` in the user's cache folder.

    That is ``$XDG_CACHE_HOME``, else ``~/.cache``. The folder need not exist.
    """
    if given is not None:
        return Path(given).expanduser()
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "deq-zoo")


def is_offline(given: bool | None = None) -> bool:
    """Whether nothing may be fetched: ``given``, else whether ``$DEQ_ZOO_OFFLINE`` is set to anything but 0."""
    return os.environ.get(OFFLINE_VARIABLE, "0") not in {"", "0"} if given is None else given

"""Weights from W&B: the model artifacts that its runs log, checked against their manifest and kept in our cache."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from .blobs import Blobs, inline, refuse_other_files, require_room, sha256_of_file
from .errors import WeightsError

_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+/[\w.-]+):(?P<alias>[^\s/:]+)")
_SUFFIXES = (".safetensors", ".ckpt")


def fetch_artifact(name: str, blobs: Blobs, *, offline: bool, sha256: str | None = None) -> Path:
    """The one ``.safetensors`` or ``.ckpt`` file of the artifact ``entity/project/artifact:alias``, verified.

    A version (``v3``) never changes, and is served by the cache once it is there; of any other alias W&B is asked, at
    each call, which version it is now. Offline, it is the version that came last.

    Raises:
        ValueError: the name is not written like this.
        WeightsError: no login, no such artifact, not one such file in it, or not the content of its manifest.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise ValueError(f"wandb:{name} is no artifact; one is written wandb:entity/project/artifact:alias")
    source = f"wandb:{name}"
    known = blobs.recorded(source)
    wanted = sha256 or (known.sha256 if known else None)
    path = blobs.find(wanted) if wanted else None
    if path and (offline or sha256 or re.fullmatch(r"v\d+", found["alias"])):
        return path
    if offline:
        raise WeightsError(
            f"{source} is not in the cache (it would be noted in {blobs.note(source)}), and nothing is fetched "
            "offline; load it once where there is a network, with the same cache, or a copy of the file by its path"
        )
    artifact = _artifact(name)
    is_same = bool(known and (known.version == artifact.digest or re.fullmatch(r"v\d+", found["alias"])))
    if path and is_same:
        return path
    with blobs.lock(source):
        return _download(artifact, source, blobs, sha256, known.sha256 if known and is_same else None)


def _artifact(name: str) -> Any:
    """What W&B has under a name."""
    try:
        import wandb
    except ImportError as error:
        raise WeightsError(f"wandb:{name} needs the package wandb: {error}") from None
    try:
        return wandb.Api().artifact(name)
    except wandb.errors.UsageError as error:
        raise WeightsError(
            f"wandb:{name} cannot be fetched without a login: run `wandb login`, or set WANDB_API_KEY ({inline(error)})"
        ) from None
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise WeightsError(
            f"wandb:{name} cannot be fetched: {inline(error)}. See whether entity, project, artifact and alias exist, "
            "whether this login may read them, and whether there is a network"
        ) from None


def _download(artifact: Any, source: str, blobs: Blobs, sha256: str | None, known: str | None) -> Path:
    entries = artifact.manifest.entries
    names = [name for name in entries if PurePosixPath(name).suffix in _SUFFIXES]
    if len(names) != 1 or any(entry.ref is not None for entry in entries.values()):  # W&B follows references
        there = ", ".join(sorted(entries)) or "none"
        raise WeightsError(
            f"{source} does not have one {' or '.join(_SUFFIXES)} file of its own; its files: {there}. Fetch it with "
            "`wandb artifact get`, which follows references too, and load a file by its path"
        )
    folder = blobs.folder / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(entry.size or 0 for entry in entries.values())
    require_room(folder, source, size, f"{size:,}")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        import wandb

        try:
            artifact.download(root=place, skip_cache=True)
            artifact.verify(root=place)
        except (wandb.errors.Error, OSError, ValueError) as error:
            raise WeightsError(
                f"{source} did not come as its manifest says ({inline(error)}); nothing was loaded"
            ) from None
        file = Path(place, names[0])
        refuse_other_files(file, source)
        found = sha256_of_file(file)
        blobs.refuse_other_content(source, found, pinned=sha256, known=known)
        return blobs.add(source, file, found, file.suffix, artifact.digest)

"""Torchvision's weights of RAFT by name, as the start of a DEQ-Flow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.optical_flow import Raft_Large_Weights

from zoo import cache
from zoo.blobs import checked_sha256
from zoo.errors import WeightsError
from zoo.implicit.choices import nearest
from zoo.locating import TORCHVISION
from zoo.pickles import read_pickle
from zoo.weight_files import sha256_of

from . import flow


def load_raft(
    name: str,
    cache_dir: str | os.PathLike[str] | None,
    offline: bool | None,
    sha256: str | None,
    overrides: dict[str, Any],
) -> nn.Module:
    """A DEQ-Flow with torchvision's weights of RAFT: see :func:`load_pretrained`."""
    known = {f"{TORCHVISION}Raft_Large_Weights.{key}": entry for key, entry in Raft_Large_Weights.__members__.items()}
    if name not in known:
        if "small" in name.lower():
            raise ValueError(
                f"{name} are of raft_small, whose layers are others than DEQ-Flow's. Known: {', '.join(known)}."
            )
        raise ValueError(f"unknown weights {name!r}.{nearest(name, list(known))}")
    url = known[name].url
    folder = (
        Path(torch.hub.get_dir(), "checkpoints") if cache_dir is None else cache.cache_dir(cache_dir) / "torchvision"
    )
    path = folder / Path(url).name
    begins = path.stem.rpartition("-")[2]  # the digest begins so
    wanted = None if sha256 is None else checked_sha256(sha256)

    def check(data: bytes | bytearray) -> None:
        found = sha256_of(data)
        if not found.startswith(begins):
            raise WeightsError(
                f"{path} is damaged or was replaced: its sha256 does not begin with {begins}; nothing was loaded. "
                "Delete it"
            )
        if wanted not in (None, found):
            raise WeightsError(f"the sha256 of {path} is {found}, and {wanted} was asked for; nothing was loaded")

    if not path.exists():
        if cache.is_offline(offline):
            raise WeightsError(f"{url} is not at {path}, and offline nothing is fetched. Put it there")
        _download(url, path, begins)
    state = read_pickle(path, check=check)
    return flow.load(state, name, overrides)


def _download(url: str, path: Path, begins: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=begins)
    except OSError as error:
        raise WeightsError(
            f"{url} cannot be fetched ({error}). Fetch it where there is a network, and put it at {path}"
        ) from None
    except RuntimeError as error:  # another digest
        raise WeightsError(f"{url} was damaged on its way, and nothing was loaded: {error}") from None

"""Checkpoints of the original authors that have a record: of the right file, and the same one at every load."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from zoo.errors import WeightsError
from zoo.locating import Found, Pin
from zoo.records import WeightsRecord
from zoo.registry import ModelSpec, spec_of
from zoo.weight_files import sha256_of

from . import make_original, read_original


def pins_of(record: WeightsRecord, path: Path) -> Iterator[Pin]:
    """What the sha256 of an original has to be: as its record says, and as at its first use."""
    advice = f"Get {record.file} from {record.download} again, and put it at {path}"
    if record.sha256 is not None:
        yield Pin(record.sha256, "its record says", advice)
    beside = _beside(path)
    if beside.exists():
        written = beside.read_text(encoding="utf-8").partition(" ")[0].strip()
        yield Pin(written, f"{beside} says, of its first use,", f"{advice}; delete {beside} if it has to be another")


def _beside(path: Path) -> Path:
    """Where the sha256 of an original is kept, as sha256sum would write it."""
    return path.with_name(f"{path.name}.sha256")


def read_recorded(found: Found, record: WeightsRecord) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model and the tensors of an original checkpoint, whose sha256 is kept at its first use."""
    seen = []

    def check(data: bytes | bytearray) -> None:
        found.check(data)
        seen.append(sha256_of(data))

    model = make_original(read_original(found.path, check=check), os.fspath(found.path), record.arguments)
    spec = spec_of(model)
    if spec.model != record.model:
        raise WeightsError(
            f"{found.path} is of a model {spec.model}, and {record.name} are weights of {record.model}: it is another "
            f"file than {record.file} of {record.download}"
        )
    beside = _beside(found.path)
    if not beside.exists():
        with contextlib.suppress(OSError):  # where users may read only, it stays unpinned
            new = beside.with_name(f".{beside.name}.{os.getpid()}")
            new.write_text(f"{seen[0]}  {found.path.name}\n", encoding="utf-8")
            new.replace(beside)
    return spec, model.state_dict()

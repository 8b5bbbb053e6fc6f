"""Records of weights: what each file is, where it comes from, what to expect of it."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .cache import cache_dir
from .errors import WeightsError
from .implicit.choices import nearest

SHIPPED, ORIGINAL = "shipped", "original"


@dataclass(frozen=True)
class WeightsRecord:
    """What one set of weights is, where it comes from and what to expect of it.

    Attributes:
        name: ``"arch.tag"``, like ``"tanh_deq.digits"``.
        model: the registered model, ``arch``.
        arguments: the model's arguments as plain data.
        source: where the file is: ``"shipped"``, in ``checkpoints/``; ``"original"``, published by the original
            authors, to be fetched by hand.
        sha256: of the whole file, verified at each load; None of originals that nobody of this zoo has seen.
        num_parameters: of the model.
        trained_on: the data.
        recipe: the commands that made it, or would.
        metrics: measured by this zoo on that data's held-out part, by name; fractions, not percent.
        licence: of the weights.
        preprocessing: what the model expects as its input, and what it does to it.
        classes: names of the outputs, for classifiers.
        evaluation: what ``cli.py evaluate`` runs: ``{"task": {"class_path": ..., "init_args": {...}}, "data": {...}}``.
        published: what the authors report, by the same names as ``metrics``.
        origin: the repository, and the paper, of an original.
        download: where an original's file is found.
        file: what an original's file is called there.
        notes: what else one should know.
    """

    name: str
    model: str
    arguments: dict[str, Any]
    source: str
    sha256: str | None
    num_parameters: int
    trained_on: str
    recipe: str
    metrics: dict[str, float]
    licence: str
    preprocessing: str
    classes: list[str] | None = None
    evaluation: dict[str, Any] | None = None
    published: dict[str, float] = field(default_factory=dict)
    origin: str | None = None
    download: str | None = None
    file: str | None = None
    notes: str | None = None

    @property
    def path(self) -> Path:
        """The file: in ``checkpoints/`` if it ships; where it has to be put in the cache if it is an original."""
        if self.source == ORIGINAL:
            return cache_dir() / "originals" / self.name / str(self.file)
        return weights_dir() / f"{self.name}.safetensors"


def weights_dir() -> Path:
    """Where shipped weights are: ``checkpoints/`` of the checkout, or of the installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "checkpoints"
    return installed if installed.is_dir() else package.parent / "checkpoints"


def list_weights(pattern: str = "*", source: str | None = None) -> list[WeightsRecord]:
    """The records of all weights whose name matches ``pattern`` (shell wildcards), sorted by name.

    With ``source``, those that are ``"shipped"``, or ``"original"``.

    Raises:
        ValueError: ``source`` is neither.
    """
    if source not in {None, SHIPPED, ORIGINAL}:
        raise ValueError(f"unknown source {source!r}.{nearest(str(source), [SHIPPED, ORIGINAL])}")
    records = all_records()
    found = (records[name] for name in sorted(fnmatch.filter(records, pattern)))
    return [record for record in found if source in (None, record.source)]


def find_record(name: str) -> WeightsRecord:
    """The record of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    records = all_records()
    if name not in records:
        raise ValueError(f"unknown weights {name!r}.{nearest_weights(name)}")
    return records[name]


def nearest_weights(given: str, source: str | None = None) -> str:
    """`` Did you mean ...?`` for an error message about a name, and how to see all names."""
    names = [record.name for record in list_weights(source=source)]
    return nearest(re.sub(r"[*?]", "", given), names, "zoo.list_weights(), or cli.py list,")


def save_record(record: WeightsRecord) -> Path:
    """Write a record: beside its weights if they ship, in ``checkpoints/originals`` if they are originals."""
    folder = weights_dir() / "originals" if record.source == ORIGINAL else weights_dir()
    folder.mkdir(exist_ok=True)
    path = folder / f"{record.name}.json"
    path.write_text(json.dumps(dataclasses.asdict(record), indent=2) + "\n", encoding="utf-8")
    all_records.cache_clear()
    return path


@cache
def all_records() -> dict[str, WeightsRecord]:
    """Every record by its name."""
    records = {}
    for path in (*weights_dir().glob("*.json"), *weights_dir().glob("originals/*.json")):
        try:
            record = WeightsRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{path} is not a weights record: {error}") from None
        records[record.name] = record
    return records

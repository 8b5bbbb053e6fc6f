"""Pretrained weights: records of what they are, and loading that verifies every byte.

Weights are ``.safetensors`` files whose header holds the model's name and arguments. Beside each stands its record,
a JSON file of the same name. Both ship in ``checkpoints/``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models.optical_flow import Raft_Large_Weights

from .implicit.choices import nearest
from .registry import ModelSpec, create_model, spec_of

_TORCHVISION = "torchvision:"
_SPEC = "deq_zoo"  # the one key of the header: safetensors writes several in any order, and files could not be compared


class WeightsError(RuntimeError):
    """A weights file is missing, damaged, or does not belong to its record."""


class ReinitializedWarning(UserWarning):
    """Parts of a pretrained model were left at random because they were asked to have another shape."""


@dataclass(frozen=True)
class WeightsRecord:
    """What one set of weights is, where it comes from and what to expect of it.

    Attributes:
        name: ``"arch.tag"``, like ``"tanh_deq.digits"``.
        model: the registered model, ``arch``.
        arguments: the model's arguments as plain data.
        source: where the file is; ``"shipped"`` for those in ``checkpoints/``.
        sha256: of the whole file, verified at each load.
        num_parameters: of the model.
        trained_on: the data.
        recipe: the commands that made it.
        metrics: measured on that data's held-out part, by name; fractions, not percent.
        licence: of the weights.
        preprocessing: what the model expects as its input, and what it does to it.
        classes: names of the outputs, for classifiers.
    """

    name: str
    model: str
    arguments: dict[str, Any]
    source: str
    sha256: str
    num_parameters: int
    trained_on: str
    recipe: str
    metrics: dict[str, float]
    licence: str
    preprocessing: str
    classes: list[str] | None = None

    @property
    def path(self) -> Path:
        """The shipped file."""
        return weights_dir() / f"{self.name}.safetensors"


def weights_dir() -> Path:
    """Where shipped weights are: ``checkpoints/`` of the checkout, or of the installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "checkpoints"
    return installed if installed.is_dir() else package.parent / "checkpoints"


def list_weights(pattern: str = "*") -> list[WeightsRecord]:
    """The records of all weights whose name matches ``pattern`` (shell wildcards), sorted by name."""
    records = _records()
    return [records[name] for name in sorted(fnmatch.filter(records, pattern))]


def load_pretrained(name: str, **overrides: Any) -> nn.Module:
    """The model ``name``, with its trained weights, in eval mode and on the CPU.

    Args:
        name: one of ``list_weights()``, like ``"tanh_deq.digits"``; or ``"torchvision:Raft_Large_Weights.C_T_V2"``,
            torchvision's weights of RAFT as the start of a DEQ-Flow, as :func:`zoo.load_original` makes it of them.
            They are downloaded once, into ``torch.hub.get_dir()/checkpoints``.
        overrides: arguments of the model to change. ``solver`` and ``gradient`` can be anything; another
            ``num_classes`` leaves the classifier at random, with a :class:`ReinitializedWarning` that lists what.

    Raises:
        ValueError: unknown name or argument.
        WeightsError: the file is missing, cannot be downloaded, does not have the recorded sha256, or does not fit the
            model.
    """
    if name.startswith(_TORCHVISION):
        return _from_torchvision(name, overrides)
    records = _records()
    if name not in records:
        raise ValueError(f"unknown weights {name!r}.{nearest(name, sorted(records))}")
    record = records[name]
    data = _verified(record)
    spec, state = _parse(data, str(record.path))
    model = create_model(spec.model, **{**spec.arguments, **overrides})

    if "num_classes" in overrides:
        ours = model.state_dict()
        classifier = [key for key in ours if key.startswith(f"{model.classifier_name}.") and key in state]
        found = len(state[classifier[0]])
        if found != overrides["num_classes"]:
            state.update({key: ours[key] for key in classifier})
            warnings.warn(
                f"{name} was trained for {found} classes, and {overrides['num_classes']} were asked for: "
                f"{', '.join(classifier)} start at random",
                ReinitializedWarning,
                stacklevel=2,
            )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in overrides.items()) or "no argument"
        raise WeightsError(
            f"the weights {name} do not fit the model {spec.model} with {given} changed; "
            f"change only arguments that keep the shapes. {_first_lines(error)}"
        ) from None
    return model.eval()


def save_weights(model: nn.Module, path: str | Path) -> ModelSpec:
    """Write a model that the zoo made to a ``.safetensors`` file, its name and arguments in the header.

    Raises:
        ValueError: the model was not made by :func:`zoo.create_model` or :func:`zoo.load_pretrained`.
    """
    spec = spec_of(model)
    header = {_SPEC: json.dumps({"model": spec.model, "arguments": spec.arguments}, sort_keys=True)}
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    Path(path).write_bytes(safetensors.torch.save(state, metadata=header))
    return spec


def read_weights(path: str | Path) -> dict[str, Tensor] | None:
    """The tensors of a file that :func:`save_weights` wrote; None of a safetensors file that others wrote.

    Raises:
        WeightsError: the file cannot be read, or is no safetensors file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            if _SPEC not in (file.metadata() or {}):
                return None
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged, or not a safetensors file: {error}") from None


def save_record(record: WeightsRecord) -> Path:
    """Write a record beside its weights."""
    path = record.path.with_suffix(".json")
    path.write_text(json.dumps(dataclasses.asdict(record), indent=2) + "\n", encoding="utf-8")
    _records.cache_clear()
    return path


def write_table() -> Path:
    """Write ``checkpoints/README.md``, the table of all weights, from their records."""
    path = weights_dir() / "README.md"
    path.write_text(markdown_table(), encoding="utf-8")
    return path


def markdown_table() -> str:
    """The table of all weights. Generated, so that no figure is typed twice."""
    lines = [
        "# Weights that ship with the zoo",
        "",
        "Generated from the records beside them (`examples/publish_weights.py`); do not edit. Each is a safetensors",
        "file with the model's name and arguments in its header, and is verified at each load.",
        "",
        "| name | parameters | trained on | metrics | input | licence | made by | sha256 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in list_weights():
        metrics = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in r.metrics.items())
        lines.append(
            f"| `{r.name}` | {r.num_parameters:,} | {r.trained_on} | {metrics} | {r.preprocessing} | {r.licence} "
            f"| `{r.recipe}` | `{r.sha256[:12]}…` |"
        )
    return "\n".join(lines) + "\n"


def sha256_of(data: bytes) -> str:
    """The hexadecimal sha256 digest."""
    return hashlib.sha256(data).hexdigest()


def _from_torchvision(name: str, overrides: dict[str, Any]) -> nn.Module:
    """A DEQ-Flow with torchvision's weights of RAFT: see :func:`load_pretrained`."""
    from .originals import flow  # which needs this file

    known = {f"{_TORCHVISION}Raft_Large_Weights.{key}": entry for key, entry in Raft_Large_Weights.__members__.items()}
    if name not in known:
        if "small" in name.lower():
            raise ValueError(
                f"{name} are of raft_small, whose layers are others than DEQ-Flow's. Known: {', '.join(known)}."
            )
        raise ValueError(f"unknown weights {name!r}.{nearest(name, list(known))}")
    weights = known[name]
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    wanted = path.stem.rpartition("-")[2]  # the digest begins so
    if path.exists() and not sha256_of(path.read_bytes()).startswith(wanted):
        raise WeightsError(
            f"{path} is damaged or was replaced: its sha256 does not begin with {wanted}; nothing was loaded. Delete it"
        )
    try:
        state: dict[str, Tensor] = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(
            f"{weights.url} cannot be fetched ({error}). Fetch it where there is a network, and put it at {path}"
        ) from None
    except RuntimeError as error:  # another digest
        raise WeightsError(f"{weights.url} was damaged on its way, and nothing was loaded: {error}") from None
    return flow.load(state, name, overrides)


@cache
def _records() -> dict[str, WeightsRecord]:
    records = {}
    for path in weights_dir().glob("*.json"):
        try:
            record = WeightsRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{path} is not a weights record: {error}") from None
        records[record.name] = record
    return records


def _verified(record: WeightsRecord) -> bytes:
    """The bytes of the record's file, if they are the recorded ones."""
    try:
        data = record.path.read_bytes()
    except OSError as error:
        raise WeightsError(
            f"the weights {record.name} ship in {record.path}, which cannot be read ({error.strerror}); "
            "restore the file: git checkout -- checkpoints, or install the package again"
        ) from None
    found = sha256_of(data)
    if found != record.sha256:
        raise WeightsError(
            f"{record.path} is damaged or was replaced: its sha256 is {found}, its record says {record.sha256}; "
            "nothing was loaded. Restore the file: git checkout -- checkpoints, or install the package again"
        )
    return data


def _parse(data: bytes, where: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if _SPEC not in header:
        raise WeightsError(f"{where} does not say which model it belongs to: its header has no {_SPEC!r}")
    return ModelSpec(**json.loads(header[_SPEC])), safetensors.torch.load(data)


def _first_lines(error: Exception, most: int = 4) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:most]) + (f" (and {len(lines) - most} more)" if len(lines) > most else "")

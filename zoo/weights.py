"""Pretrained weights: records of what they are, and loading that verifies every byte."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.optical_flow import Raft_Large_Weights

from .errors import ReinitializedWarning, WeightsError
from .implicit.choices import nearest
from .records import WeightsRecord, find_record
from .registry import create_model
from .weight_files import parse_weights, sha256_of

_TORCHVISION = "torchvision:"


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
    record = find_record(name)
    data = _verified(record)
    spec, state = parse_weights(bytearray(data), str(record.path))
    if spec is None:
        raise WeightsError(f"{record.path} does not say which model it belongs to: its header has no 'deq_zoo'")
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


def _first_lines(error: Exception, most: int = 4) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:most]) + (f" (and {len(lines) - most} more)" if len(lines) > most else "")

"""Weights in ``.safetensors`` files whose header holds the model's name and arguments."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .errors import WeightsError
from .registry import ModelSpec, spec_of

_SPEC = "deq_zoo"  # the one key of the header: safetensors writes several in any order, and files could not be compared


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


def sha256_of(data: bytes) -> str:
    """The hexadecimal sha256 digest."""
    return hashlib.sha256(data).hexdigest()


def parse_weights(data: bytes, where: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model and the tensors in the bytes of such a file, which was read from ``where``."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if _SPEC not in header:
        raise WeightsError(f"{where} does not say which model it belongs to: its header has no {_SPEC!r}")
    return ModelSpec(**json.loads(header[_SPEC])), safetensors.torch.load(data)

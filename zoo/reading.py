"""The model and the tensors that a file of the zoo holds: safetensors, or a checkpoint of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import WeightsError
from .locating import Found
from .pickles import is_pickle, read_pickle, refuse_hollow
from .registry import ModelSpec
from .weight_files import read_weights

log = logging.getLogger("zoo")

_OF_THE_MODEL = "model."  # how the keys of a task's model begin in its checkpoints


class ForeignWeightsError(WeightsError):
    """A file is whole, and was not written by this zoo."""


def read(found: Found, *, averaged: bool) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model and the tensors in a file of the zoo, verified.

    Raises:
        WeightsError: see :func:`load_pretrained`; ForeignWeightsError if it is a file of others.
    """
    path = found.path
    if is_pickle(path):
        return _in_checkpoint(read_pickle(path, check=found.check), path, averaged=averaged)
    spec, state = read_weights(path, check=found.check)
    if spec is None:
        raise ForeignWeightsError(
            f"{path} does not say which model it belongs to: its header has no 'deq_zoo'. If the original authors "
            "published it, load it with zoo.load_original"
        )
    return spec, state


def _in_checkpoint(content: Any, path: Path, *, averaged: bool) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model and its tensors in a checkpoint of a run."""
    made_of = content.get("deq_zoo_model") if isinstance(content, dict) else None
    if not isinstance(made_of, dict):
        if isinstance(content, dict) and "deq_zoo_classes" in content:
            raise ForeignWeightsError(
                f"{path} is of a run before checkpoints said which model they hold. Load it with the class that made "
                "it, like ImageClassifier.load_from_checkpoint"
            )
        raise ForeignWeightsError(
            f"{path} is no checkpoint of this zoo: it has no 'deq_zoo_model'. If the original authors published it, "
            "load it with zoo.load_original"
        )
    model, arguments = made_of.get("model"), made_of.get("arguments")
    if not isinstance(model, str) or not isinstance(arguments, dict):
        raise WeightsError(f"{path} is damaged: its 'deq_zoo_model' names no model and arguments")
    return ModelSpec(model, arguments), state_of_checkpoint(content, path, averaged=averaged)


def state_of_checkpoint(
    content: Mapping[str, Any], path: str | os.PathLike[str], *, averaged: bool = True
) -> dict[str, Tensor]:
    """The tensors of the model in what a checkpoint of a run holds; averaged ones where there are, which is logged.

    Raises:
        WeightsError: there are none, or they have fewer numbers than their shapes say.
    """
    key = "state_dict"
    if "current_model_state" in content:  # as Lightning's WeightAveraging writes it
        if averaged:
            log.warning(
                "%s has averaged weights, and they are taken; averaged=False takes those of the last step", path
            )
        else:
            key = "current_model_state"
    state = content.get(key)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} is damaged: its {key!r} is no mapping of names to tensors")
    refuse_hollow(state, os.fspath(path))
    return {k.removeprefix(_OF_THE_MODEL): value for k, value in state.items() if k.startswith(_OF_THE_MODEL)}

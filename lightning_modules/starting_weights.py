"""All weights of a model from a file, whichever program of ours or of the original authors wrote it."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import zoo
from zoo.originals.common import problems
from zoo.pickles import is_pickle, read_pickle
from zoo.reading import state_of_checkpoint
from zoo.registry import builder_of
from zoo.weight_files import read_weights
from zoo.weights import is_source

from .checkpoints import CheckpointError
from .options import require

log = logging.getLogger("zoo")

_ALWAYS_FREE = ("solver", "gradient")


def started(
    model: str, arguments: dict[str, Any], pretrained: str | None, backbone: str | None, weights_from: str | None
) -> nn.Module:
    """The model with the weights that a run starts from; see :class:`EquilibriumModule`."""
    made = _make_model(model, pretrained, arguments)
    if backbone is not None:
        zoo.load_backbone(made, backbone)
    if weights_from is not None:
        load_weights(made, weights_from)
    return made


def freeze_parts(model: nn.Module, patterns: list[str] | None) -> None:
    """Leave these parts out of training, and ValueError if nothing is left."""
    if not patterns:
        return
    require(not isinstance(patterns, str), "freeze takes a list of patterns, like ['stem.*']", patterns)
    zoo.freeze(model, *patterns)
    require(
        any(parameter.requires_grad for parameter in model.parameters()),
        "freeze has to leave a part of the model to train, like its head",
        patterns,
    )


def load_weights(model: nn.Module, path: str) -> None:
    """Give a model all its weights from a file.

    Args:
        model: which is changed in place.
        path: a checkpoint of a run, a ``.safetensors`` file that ``zoo.save_weights`` wrote, a file that
            ``zoo.load_original`` reads, or what else ``zoo.load_pretrained`` takes.

    Raises:
        CheckpointError: there is no such file, or its weights are not those of the model; the message lists what
            differs.
        WeightsError, ValueError: it cannot be read, or does not fit the model's arguments.
    """
    state, spec = _read(path, model)
    if different := problems(state, model.state_dict()):
        raise CheckpointError(
            f"the weights in {path} are of another model than the one asked for: in it {different}. Ask for the "
            "model, and the model_args, that the file was made with"
        )
    if spec is not None and (changed := _changed(spec, zoo.spec_of(model))):
        log.warning("the weights in %s fit, but were trained with other arguments: %s", path, "; ".join(changed))
    model.load_state_dict(state)


def _read(path: str, model: nn.Module) -> tuple[dict[str, Tensor], zoo.ModelSpec | None]:
    """The weights, and the model that they are of, where the file says it."""
    file = Path(path).expanduser()
    if not file.is_file():
        if is_source(path):
            found = zoo.load_pretrained(path)
            return found.state_dict(), zoo.spec_of(found)
        raise CheckpointError(f"weights_from takes a file; there is none at {path}")
    if is_pickle(file):
        content = read_pickle(file)
        if isinstance(content, dict) and content.keys() & {"deq_zoo_classes", "deq_zoo_model"}:
            made_of = content.get("deq_zoo_model")  # which older checkpoints have not
            return state_of_checkpoint(content, path), None if made_of is None else zoo.ModelSpec(**made_of)
    else:
        spec, state = read_weights(file)
        if spec is not None:
            return state, spec
    # What no shape tells, as how wide a window of the correlation is, the model says.
    arguments = {key: value for key, value in zoo.spec_of(model).arguments.items() if key not in _ALWAYS_FREE}
    return zoo.load_original(file, **arguments).state_dict(), None


def _changed(theirs: zoo.ModelSpec, ours: zoo.ModelSpec) -> list[str]:
    """The arguments that differ, but for those that never matter to weights."""
    made = [_arguments(spec) for spec in (theirs, ours)]
    return [
        f"{key}={value!r}, and now {made[1][key]!r}"
        for key, value in made[0].items()
        if key not in _ALWAYS_FREE and key in made[1] and _as_lists(value) != _as_lists(made[1][key])
    ]


def _arguments(spec: zoo.ModelSpec) -> dict[str, Any]:
    """All of them, with the defaults."""
    parameters = inspect.signature(builder_of(spec.model)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters} | spec.arguments


def _as_lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _make_model(model: str, pretrained: str | None, arguments: dict[str, Any]) -> nn.Module:
    if pretrained is None:
        return zoo.create_model(model, **arguments)
    found = zoo.load_pretrained(pretrained, **arguments)
    if (theirs := zoo.spec_of(found).model) != model:
        raise ValueError(
            f"pretrained={pretrained!r} are weights of model {theirs!r}, but model={model!r} was asked for"
        )
    return found.train()

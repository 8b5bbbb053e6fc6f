"""Models of the zoo by ``torch.hub``: one entry a model, and one for each set of weights, as ``zoo`` lists them.

>>> torch.hub.load("path/to/deq-zoo", "mdeq_nano", weights="digits", source="local")
>>> torch.hub.load("path/to/deq-zoo", "mdeq_nano.digits", source="local")
"""

import inspect as _inspect
import warnings as _warnings
from collections.abc import Callable as _Callable
from typing import Any as _Any

import zoo as _zoo
from zoo.blobs import shown as _shown
from zoo.implicit.choices import nearest as _nearest
from zoo.weights import is_source as _is_source

dependencies = ["torch", "torchvision", "safetensors"]


def _weights_of(model: str) -> dict[str, _zoo.WeightsRecord]:
    """The records of a model's weights by their tag: what follows ``model.`` in their names."""
    return {record.name.removeprefix(f"{model}."): record for record in _zoo.list_weights(f"{model}.*")}


def _source(model: str, weights: str | bool) -> str:
    """What ``load_pretrained`` takes for the ``weights`` of an entry."""
    known = _weights_of(model)
    if weights is True:
        shipped = [record.name for record in known.values() if record.source == "shipped"]
        if len(shipped) != 1:
            raise ValueError(
                f"weights=True takes the one set of weights that ships for a model, and {model} has {len(shipped)}; "
                f"give its name (known: {', '.join(sorted(known)) or 'none'}), or a path, https:... or hf:org/name"
            )
        return shipped[0]
    source = str(weights)
    if source in known:
        return known[source].name
    if not source or (not _is_source(source) and not set("./:") & set(source)):
        raise ValueError(f"{model} has no weights {source!r}.{_nearest(source, sorted(known))}")
    return source


def _loaded(source: str, name: str, arguments: dict[str, _Any]) -> _Any:
    """Pretrained weights, if they are of this model; warnings have the line that calls ``torch.hub.load``."""
    with _warnings.catch_warnings(record=True) as said:
        model = _zoo.load_pretrained(source, **arguments)
    found = _zoo.spec_of(model).model
    if found != name:
        raise ValueError(f"weights={_shown(source)!r} are of {found}, not of {name}; load them by that name")
    for each in said:
        _warnings.warn(each.message, stacklevel=5)  # this, the entry, and two functions of torch.hub
    return model


def _check(model: str, arguments: dict[str, _Any]) -> None:
    """Raise ValueError for what a model with random weights does not take."""
    known = ["weights", *_inspect.signature(_zoo.registry.builder_of(model)).parameters]
    of_weights = set(_inspect.signature(_zoo.load_pretrained).parameters) - set(known)
    for key in arguments:
        if key == "pretrained":
            raise ValueError(f"{model} has no argument 'pretrained': weights=True takes the one set that ships")
        if key in of_weights:
            raise ValueError(f"{key}= is about weights, and {model} without weights= starts at random")
        if key not in known:
            raise ValueError(f"{model} has no argument {key!r}.{_nearest(key, known)}")


def _model(name: str) -> _Callable[..., _Any]:
    """The entry of a model."""

    def entry(weights: str | bool | None = None, **arguments: _Any) -> _Any:
        if weights is None or weights is False:
            _check(name, arguments)
            return _zoo.create_model(name, **arguments)
        return _loaded(_source(name, weights), name, arguments)

    builder = _zoo.registry.builder_of(name)
    known = [f"        - {tag!r}: {record.trained_on} ({record.source})" for tag, record in _weights_of(name).items()]
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = "\n".join(
        [
            f"The model {name} of the zoo.",
            "",
            "Args:",
            "    weights: None for random ones; True for the one set that ships; a path, https:..., hf:org/name or",
            "        whatever zoo.load_pretrained takes; or one of",
            *(known or ["        - none known of this model"]),
            "    arguments: of the model, below; with weights, also those of zoo.load_pretrained, like offline=True.",
            "",
            f"{builder.__name__}{_inspect.signature(builder)}",
            "",
            _inspect.getdoc(builder) or "",
        ]
    )
    return entry


def _weights(record: _zoo.WeightsRecord) -> _Callable[..., _Any]:
    """The entry of a set of weights."""

    def entry(**arguments: _Any) -> _Any:
        return _loaded(record.name, record.model, arguments)

    entry.__name__ = entry.__qualname__ = record.name
    measured = ", ".join(f"{key} {value:.4g}" for key, value in record.metrics.items())
    entry.__doc__ = "\n".join(
        [
            f"{record.model} with the weights {record.name}, {record.num_parameters:,} parameters.",
            "",
            f"Trained on: {record.trained_on}",
            f"Measured here: {measured or 'nothing'}",
            f"Input: {record.preprocessing}",
            f"Licence: {record.licence}",
            f"Where it is: {record.source}, {record.path}",
            "",
            "Args:",
            "    arguments: of the model, to change, and those of zoo.load_pretrained, like offline=True.",
        ]
    )
    return entry


globals().update({name: _model(name) for name in _zoo.list_models()})
globals().update({record.name: _weights(record) for record in _zoo.list_weights()})

"""Models of the zoo by ``torch.hub``: one entry a model, and one for each set of weights, as ``zoo`` lists them.

>>> torch.hub.load("path/to/deq-zoo", "mdeq_nano", weights="digits", source="local")
>>> torch.hub.load("path/to/deq-zoo", "mdeq_nano.digits", source="local")
"""

import inspect as _inspect
from collections.abc import Callable as _Callable
from typing import Any as _Any

import zoo as _zoo
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
    if not _is_source(source) and not set("./:") & set(source):
        raise ValueError(f"{model} has no weights {source!r}.{_nearest(source, sorted(known))}")
    return source


def _model(name: str) -> _Callable[..., _Any]:
    """The entry of a model."""

    def entry(weights: str | bool | None = None, **arguments: _Any) -> _Any:
        if weights is None or weights is False:
            return _zoo.create_model(name, **arguments)
        model = _zoo.load_pretrained(_source(name, weights), **arguments)
        found = _zoo.spec_of(model).model
        if found != name:
            raise ValueError(f"weights={weights!r} are of {found}, not of {name}; load them by that name")
        return model

    builder = _zoo.registry._MODELS[name].builder  # noqa: SLF001 - for its documentation only
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
        return _zoo.load_pretrained(record.name, **arguments)

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

"""Model names: what there is, and how to make it."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from torch import nn

from .implicit import Gradient, Solver, describe, from_description
from .implicit.choices import nearest

_CHOICES: dict[str, type[Solver] | type[Gradient]] = {"solver": Solver, "gradient": Gradient}


@dataclass(frozen=True)
class ModelSpec:
    """What makes a model: its registered name and its arguments as plain data. Stored with weights."""

    model: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    builder: Callable[..., nn.Module]
    preset: dict[str, Any]


_MODELS: dict[str, _Entry] = {}


def register_model(name: str, builder: Callable[..., nn.Module], **preset: Any) -> None:
    """Give ``builder`` a name in the zoo.

    Args:
        name: what users type, like ``"tanh_deq"``.
        builder: a module class, or a function that returns a module; its keyword arguments are the model's arguments.
        preset: arguments that this name fixes as its own defaults; variants of one family differ in these only.

    Raises:
        ValueError: the name is taken.
    """
    if name in _MODELS:
        raise ValueError(f"a model named {name!r} is registered already, by {_MODELS[name].builder.__qualname__}")
    _MODELS[name] = _Entry(builder, preset)


def list_models(pattern: str = "*", kind: type[nn.Module] = nn.Module) -> list[str]:
    """The names of all models that match ``pattern`` (shell wildcards), sorted.

    With ``kind``, those that are of that class.
    """
    names = sorted(fnmatch.filter(_MODELS, pattern))
    return [name for name in names if kind is nn.Module or _is_of(_MODELS[name].builder, kind)]


def _is_of(builder: Callable[..., nn.Module], kind: type[nn.Module]) -> bool:
    return isinstance(builder, type) and issubclass(builder, kind)


def builder_of(name: str) -> Callable[..., nn.Module]:
    """What a name was registered with: the class or function whose documentation and arguments are the model's.

    Raises:
        ValueError: unknown name; the message names the nearest valid one.
    """
    return _entry(name).builder


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}.{nearest(name, list_models(), 'zoo.list_models()')}")
    return _MODELS[name]


def create_model(name: str, **arguments: Any) -> nn.Module:
    """A model with random weights.

    Args:
        name: one of :func:`list_models`.
        arguments: of the model's constructor. ``solver`` and ``gradient`` take objects of ``zoo.implicit``, or their
            plain descriptions (:func:`zoo.implicit.describe`).

    Returns:
        the model; ``zoo.spec_of(model)`` tells how it was made.

    Raises:
        ValueError: unknown name or argument; the message names the nearest valid one.
        TypeError: an argument of another type than the constructor declares.
    """
    entry = _entry(name)
    parameters = inspect.signature(entry.builder, eval_str=True).parameters
    valid = list(parameters)
    for key in arguments:
        if key not in valid:
            raise ValueError(f"model {name!r} has no argument {key!r}.{nearest(key, valid)}")
    arguments = {**entry.preset, **arguments}
    for key, kind in _CHOICES.items():
        if arguments.get(key) is not None:
            arguments[key] = from_description(arguments[key], kind)
    for key, value in arguments.items():
        _check_type(name, key, value, parameters[key].annotation)
    model = entry.builder(**arguments)
    model._zoo_spec = ModelSpec(name, plain(arguments))  # type: ignore[assignment]  # noqa: SLF001
    return model


def _check_type(name: str, key: str, value: Any, hint: Any) -> None:
    """Raise TypeError where a number, a word, or a list of them is not of the type that the constructor declares."""
    if not _fits(value, hint):
        raise TypeError(
            f"argument {key!r} of model {name!r} takes {_in_words(hint)}; given: {value!r} ({type(value).__name__})"
        )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; True for types that are the constructor's business."""
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (Any, inspect.Parameter.empty) or not isinstance(hint, type) or get_origin(hint) is not None:
        return True
    given = type(value)
    return given is hint or (given is int and hint is float) or (given is not bool and isinstance(value, hint))


def _in_words(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(_in_words(option) for option in get_args(hint))
    if get_origin(hint) is Sequence:
        return f"a list of {_in_words(get_args(hint)[0])}"
    return "None" if hint is NoneType else str(getattr(hint, "__name__", hint))


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as plain data: solvers and gradients become their descriptions."""
    return {k: describe(v) if isinstance(v, Solver | Gradient) else v for k, v in arguments.items()}


def spec_of(model: nn.Module) -> ModelSpec:
    """How ``create_model`` or ``load_pretrained`` made this model.

    Raises:
        ValueError: the model was made in another way.
    """
    spec = getattr(model, "_zoo_spec", None)
    if not isinstance(spec, ModelSpec):
        raise ValueError(
            f"this {type(model).__name__} was not made by zoo.create_model or zoo.load_pretrained, "
            "so the zoo does not know its name and arguments; make it by name"
        )
    return spec

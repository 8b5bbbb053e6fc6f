"""Solvers and gradients as plain data, for configuration files, checkpoints and weight files, and back."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from .gradients import Gradient
from .solvers import Solver

Choice = TypeVar("Choice", Solver, Gradient)
Base = TypeVar("Base")

MOST = 12  # names in a message, where there is another way to see them


def describe(choice: Solver | Gradient) -> dict[str, Any]:
    """``Anderson(tol=1e-3)`` -> ``{"class_path": "zoo.implicit.Anderson", "init_args": {"tol": 1e-3, ...}}``."""
    arguments = {}
    for item in dataclasses.fields(choice):
        value = getattr(choice, item.name)
        arguments[item.name] = describe(value) if isinstance(value, Solver | Gradient) else value
    return {"class_path": _path(type(choice)), "init_args": arguments}


def in_short(description: Any) -> str:
    """``{"class_path": "zoo.implicit.Newton", "init_args": {"tol": 0.1}}`` -> ``Newton(tol=0.1)``."""
    if not (isinstance(description, dict) and "class_path" in description):
        return repr(description)
    arguments = ", ".join(f"{name}={in_short(value)}" for name, value in description.get("init_args", {}).items())
    return f"{description['class_path'].rpartition('.')[2]}({arguments})"


def from_description(description: str | Mapping[str, Any] | Choice, kind: type[Choice]) -> Choice:
    """The inverse of :func:`describe`. Nothing is imported: only classes that exist already are found.

    Args:
        description: what :func:`describe` returns, or a class name like ``"Anderson"``, short or with its module; an
            object of ``kind`` is returned as it is.
        kind: ``Solver`` or ``Gradient``.

    Raises:
        ValueError: unknown class or argument; the message names the nearest valid one.
        TypeError: the description is neither a name nor a mapping.
    """
    if isinstance(description, kind):
        return description
    if isinstance(description, str):
        description = {"class_path": description}
    if not isinstance(description, Mapping):
        raise TypeError(f"a {kind.__name__.lower()} is described by a name or a mapping; given: {description!r}")
    if unknown := set(description) - {"class_path", "init_args"}:
        raise ValueError(f"a description has the keys class_path and init_args; given besides: {sorted(unknown)}")
    classes: dict[str, type[Choice]] = {}
    for cls in concrete_subclasses(kind):  # the zoo's own first, so that nobody's class of the same name hides them
        for path in (cls.__name__, _path(cls)):
            classes.setdefault(path, cls)
    name = description.get("class_path", "")
    if not isinstance(name, str) or name not in classes:
        names = sorted(cls.__name__ for cls in concrete_subclasses(kind))
        raise ValueError(f"unknown {kind.__name__.lower()} {name!r}.{nearest(str(name), names)}")
    cls = classes[name]
    arguments = description.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise TypeError(f"init_args of {cls.__name__} is a mapping of argument names to values; given: {arguments!r}")
    arguments = dict(arguments)
    fields = [item.name for item in dataclasses.fields(cls)]
    for key in arguments:
        if key not in fields:
            raise ValueError(f"{cls.__name__} has no argument {key!r}.{nearest(str(key), fields)}")
    if "solver" in arguments:
        arguments["solver"] = from_description(arguments["solver"], Solver)
    return cls(**arguments)


def nearest(given: str, valid: list[str], listing: str | None = None) -> str:
    """`` Did you mean ...? Known: ...`` for an error message.

    Of more than ``MOST`` names only the close ones are shown, if there is a ``listing``: a call or a command that lists
    them all.
    """
    close = difflib.get_close_matches(given, valid)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if listing is None or len(valid) <= MOST:
        return f"{hint} Known: {', '.join(valid) if valid else 'none'}."
    near = f" Near too: {', '.join(close[1:])}." if close[1:] else ""
    return f"{hint}{near} {listing} lists all {len(valid)}."


def _path(cls: type) -> str:
    """Where a class is imported from; those of this package are public at its top."""
    package = __package__ or ""
    return f"{package}.{cls.__name__}" if cls.__module__.startswith(package) else f"{cls.__module__}.{cls.__qualname__}"


def concrete_subclasses(base: type[Base]) -> Iterator[type[Base]]:
    """All subclasses of ``base`` that exist by now and can be instantiated, the older before the younger."""
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls):
            yield cls
        yield from concrete_subclasses(cls)

"""What is typed: patterns of names, paths, and values as YAML, like ``solver={class_path: Broyden}``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import yaml


def unmatched(pattern: str, source: str | None) -> ValueError:
    """The error of a pattern that matches no weights, or none of a source; it names what is near."""
    from zoo.records import list_weights, nearest_weights

    if others := list_weights(pattern):
        there = f"{others[0].name} is {others[0].source}"
        return ValueError(f"{len(others)} weights match {pattern!r}, and none of them is {source}: {there}")
    return ValueError(f"no weights match {pattern!r}.{nearest_weights(pattern, source)}")


def expanded(text: str) -> str:
    """A path whose ``~`` is the user's home, also where the shell leaves it, as in ``--out=~/table``."""
    return os.path.expanduser(text)


class _Loader(yaml.SafeLoader):
    """YAML as it is commonly understood: ``1e-3`` is a number, which YAML 1.1 takes for a word."""


_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def parse_value(text: str) -> Any:
    """The plain data that ``text`` spells in YAML.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is no YAML value: {' '.join(str(error).split())}") from None


def parse_overrides(given: Sequence[str]) -> dict[str, Any]:
    """The arguments in ``["stem_stride=2", "norm=pre"]``.

    Raises:
        ValueError: one is not ``key=value``, or a key is given twice.
    """
    overrides: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"an override is KEY=VALUE, like stem_stride=2; given: {item!r}")
        if key in overrides:
            raise ValueError(f"the override {key!r} is given twice: once is enough")
        overrides[key] = parse_value(value)
    return overrides

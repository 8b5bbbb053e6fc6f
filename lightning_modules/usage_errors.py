"""jsonargparse's nested error messages, told in one sentence, with the nearest valid spelling."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.implicit.choices import concrete_subclasses, nearest


class UsageError(Exception):
    """What was typed, or written in a configuration file, cannot be used; the message says why and what can."""


_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_KEY = re.compile(r'Parser key "([^"]+)"')
_TYPE = re.compile(r"Expected (?:a |an )?(.+?)\. Got value: (.*)")
_NAME = re.compile(
    r"Expected a dot import path string: (\S+)"
    r"|Problem with given class_path '([^']+)':\s+(?:No module named|module '\S+' has no attribute)"
)
_SUBTYPES = re.compile(r"Subtypes: \[.*?<class '([^']+)'>")
_UNRECOGNIZED = re.compile(r"(?:unrecognized arguments:|does not accept option) '?([^\s']+)")
_PACKAGE = re.compile(r"Problem with given class_path '([^']+)':\s+([^\n]*pip install[^\n]*)")
_CONFIG = re.compile(r"Unexpected config:(.*)", re.DOTALL)
_FILE = re.compile(r"File does not exist: '([^']+)'")
_REQUIRED = re.compile(r"the following arguments are required: (.*)|Key \"(\w+)\" is required")
_NOISE = re.compile(r"Expected a <class 'NoneType'>|Does not validate|Problem with given|Expected a path but")


def explain(message: str, parser: argparse.ArgumentParser | None = None) -> str:
    """One sentence for an error of jsonargparse: the dotted key, what was given, what is valid.

    Args:
        message: the parser's text.
        parser: where valid options are looked up.

    Returns:
        the sentence; ``message`` itself where its kind is not known.
    """
    text = message.strip()
    for tell in (_missing_package, _unknown_option, _wrong_type, _unknown_class, _no_keys):
        if (told := tell(text)) is not None:
            return told
    if found := _UNRECOGNIZED.search(text):
        given, dashes = found[1].partition("=")[0], "--" if found[1].startswith("-") else ""
        valid = (dashes + option.removeprefix("--") for option in _options(parser))
        return f"unknown argument {found[1]!r}.{_closest(given, valid) or ' See --help'}"
    if found := _FILE.search(text):
        path = Path(found[1])
        return f"there is no file {found[1]}.{_closest(str(path), map(str, path.parent.glob('*' + path.suffix)))}"
    if found := _REQUIRED.search(text):
        names = re.sub(r"\b(?:fit|validate|test|predict)\.", "", found[1] or found[2])
        return (
            f"missing: {names}. Give a configuration, like -c configs/tanh_deq_digits.yaml, "
            "or to validate, test and predict a checkpoint, like --ckpt_path runs/.../best.ckpt"
        )
    return _innermost(text)


def _no_keys(text: str) -> str | None:
    found = _CONFIG.search(text)
    given = found and (repr(found[1].strip()) if found[1].strip() else "an empty file")
    return given and f"a configuration file holds keys and their values; given: {given}"


def _missing_package(text: str) -> str | None:
    found = _PACKAGE.search(text)
    return found and f"{found[1].rpartition('.')[2]} needs a package that is not installed. {found[2]}"


def _unknown_option(text: str) -> str | None:
    found = _OPTION.search(text)
    if found is None:
        return None
    before = text[: found.start()]
    cls = _resolve(_CLASS.findall(before)[-1]) if _CLASS.search(before) else None
    valid = list(_parameters(cls)) if cls is not None else []
    of = f" of {cls.__name__}" if cls is not None else ""
    return f"unknown argument '{_dotted(before, found[1])}'{of}.{nearest(found[1], valid)}"


def _wrong_type(text: str) -> str | None:
    found = _TYPE.search(text)
    if found is None or _NAME.search(text):
        return None
    return f"'{_dotted(text[: found.start()])}' takes {_types([found[1]])}; given: {found[2].strip()!r}"


def _unknown_class(text: str) -> str | None:
    found = _NAME.search(text)
    if found is None:
        return None
    before, given = text[: found.start()], found[1] or found[2]
    base = _expected_class(before)
    subclasses: Iterable[type[Any]] = concrete_subclasses(base) if base is not None else ()
    names = sorted({cls.__name__ for cls in subclasses if not cls.__name__.startswith("_")})
    return f"unknown class {given!r} for '{_dotted(before)}'.{nearest(given.rpartition('.')[2], names)}"


def _expected_class(before: str) -> type | None:
    """Whose subclass the value must be that the attempts in ``before`` lead to."""
    bases, owners = list(_SUBTYPES.finditer(before)), list(_CLASS.finditer(before))
    if owners and (not bases or bases[-1].start() < owners[-1].start()):  # an argument of one type, without a list
        found = _parameters(_resolve(owners[-1][1]), eval_str=True)[_KEY.findall(before)[-1]].annotation
        return found if isinstance(found, type) else None
    return _resolve(bases[-1][1]) if bases else None


def _innermost(text: str) -> str:
    """Of a tree of failed attempts the reasons at its leaves."""
    items = [match.strip() for match in re.findall(r"^\s*- (.*)$", text, re.MULTILINE)]
    reasons = list(dict.fromkeys(item for item in items if not _NOISE.match(item)))
    if not reasons:
        return text
    key = _dotted(text)
    types = [reason.removeprefix("Expected a ") for reason in reasons if reason.startswith("Expected a ")]
    others = [reason for reason in reasons if not reason.startswith("Expected a ")]
    told = f"{key}: {' or '.join(others)}" if others else f"'{key}' takes {_types(types)}"
    if given := re.findall(r"^\s*Given value: (.*)$", text, re.MULTILINE):
        # Values that a constructor refused are whole namespaces, and its message names what matters.
        told += f"; given: {given[0]!r}" if "Namespace(" not in given[0] and "NestedArg(" not in given[0] else ""
    return told.removeprefix(": ")


def _types(names: Iterable[str]) -> str:
    """``a value of type int or float``."""
    plain = (re.sub(r"<class '([\w.]+)'>|typing\.", lambda found: found[1] or "", name) for name in names)
    return f"a value of type {' or '.join(plain)}"


def _dotted(text: str, *last: str) -> str:
    """The dotted key that the nested ``Parser key`` lines of ``text`` spell."""
    keys = [key for key in _KEY.findall(text) if key not in {"class_path", "init_args"}]
    return ".".join((*keys, *last))


def _closest(given: str, valid: Iterable[str]) -> str:
    """A hint from a list that is too long to be shown whole."""
    return nearest(given, sorted(valid)).partition(" Known:")[0]


def _options(parser: argparse.ArgumentParser | None) -> set[str]:
    """All long options of a parser and of its subcommands."""
    options: set[str] = set()
    for action in [] if parser is None else parser._actions:  # noqa: SLF001 - argparse has no public list
        options.update(o for o in action.option_strings if o.startswith("--"))
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                options |= _options(sub)
    return options


def _parameters(cls: type, *, eval_str: bool = False) -> dict[str, inspect.Parameter]:
    """What a class takes; where it passes ``**options`` on, what its base classes take comes after it."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if base is not cls and not inspect.isfunction(vars(base).get("__init__")):
            continue
        parameters = inspect.signature(base, eval_str=eval_str).parameters
        passed_on = {key for key, item in parameters.items() if item.kind is inspect.Parameter.VAR_KEYWORD}
        found |= {key: item for key, item in parameters.items() if key not in passed_on | found.keys()}
        if not passed_on:
            break
    return found


def _resolve(path: str) -> Any:
    """A class that is imported already; nothing is imported here."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)

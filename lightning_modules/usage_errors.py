"""jsonargparse's nested error messages, told in one sentence, with the nearest valid spelling."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.implicit.choices import nearest


class UsageError(Exception):
    """What was typed, or written in a configuration file, cannot be used; the message says why and what can."""


_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_KEY = re.compile(r'Parser key "([^"]+)"')
_TYPE = re.compile(r"Expected (?:a |an )?(.+?)\. Got value: (.*)")
_NAME = re.compile(r"Expected a dot import path string: (\S+)")
_SUBTYPES = re.compile(r"Subtypes: \[<class '([^']+)'>")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)")
_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
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
    for tell in (_unknown_option, _wrong_type, _unknown_class):
        if (told := tell(text)) is not None:
            return told
    if found := _UNRECOGNIZED.search(text):
        return f"unknown argument {found[1]!r}.{_closest(found[1].partition('=')[0], _options(parser))}"
    if found := _CHOICE.search(text):
        commands = re.findall(r"[\w-]+", found[2])
        return f"unknown command {found[1]!r}.{nearest(found[1], commands)}"
    if found := _FILE.search(text):
        path = Path(found[1])
        return f"there is no file {found[1]}.{_closest(str(path), map(str, path.parent.glob('*' + path.suffix)))}"
    if found := _REQUIRED.search(text):
        names = (found[1] or found[2]).replace("fit.", "").replace("test.", "")
        return (
            f"missing: {names}. Give a configuration, like -c configs/tanh_deq_digits.yaml, "
            "or to validate, test and predict a checkpoint, like --ckpt_path runs/.../best.ckpt"
        )
    return _innermost(text)


def _unknown_option(text: str) -> str | None:
    found = _OPTION.search(text)
    if found is None:
        return None
    before = text[: found.start()]
    cls = _resolve(_CLASS.findall(before)[-1]) if _CLASS.search(before) else None
    valid = list(inspect.signature(cls).parameters) if cls is not None else []
    of = f" of {cls.__name__}" if cls is not None else ""
    return f"unknown argument '{_dotted(before, found[1])}'{of}.{nearest(found[1], valid)}"


def _wrong_type(text: str) -> str | None:
    found = _TYPE.search(text)
    if found is None or _NAME.search(text):
        return None
    expected = re.sub(r"<class '([\w.]+)'>|typing\.", lambda m: m[1] or "", found[1])
    return f"'{_dotted(text[: found.start()])}' takes a value of type {expected}; given: {found[2].strip()!r}"


def _unknown_class(text: str) -> str | None:
    found = _NAME.search(text)
    if found is None:
        return None
    before = text[: found.start()]
    bases = _SUBTYPES.findall(before)
    base = _resolve(bases[-1]) if bases else None
    names = sorted({cls.__name__ for cls in _concrete(base)}) if base is not None else []
    return f"unknown class {found[1]!r} for '{_dotted(before)}'.{nearest(found[1], names)}"


def _innermost(text: str) -> str:
    """Of a tree of failed attempts the reasons at its leaves."""
    items = [match.strip() for match in re.findall(r"^\s*- (.*)$", text, re.MULTILINE)]
    reasons = list(dict.fromkeys(item for item in items if not _NOISE.match(item)))
    if not reasons:
        return text
    key = _dotted(text)
    told = " or ".join(reasons)
    if given := re.findall(r"^\s*Given value: (.*)$", text, re.MULTILINE):
        # Values that a constructor refused are whole namespaces, and its message names what matters.
        told += f"; given: {given[0]!r}" if "Namespace(" not in given[0] and "NestedArg(" not in given[0] else ""
    return f"{key}: {told}" if key else told


def _dotted(text: str, *last: str) -> str:
    """The dotted key that the nested ``Parser key`` lines of ``text`` spell."""
    keys = [key for key in _KEY.findall(text) if key not in {"class_path", "init_args"}]
    return ".".join((*keys, *last))


def _closest(given: str, valid: Iterable[str]) -> str:
    """A hint from a list that is too long to be shown whole."""
    return nearest(given, sorted(valid)).partition(" Known:")[0] or " See --help"


def _options(parser: argparse.ArgumentParser | None) -> set[str]:
    """All long options of a parser and of its subcommands."""
    options: set[str] = set()
    for action in [] if parser is None else parser._actions:  # noqa: SLF001 - argparse has no public list
        options.update(o for o in action.option_strings if o.startswith("--"))
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                options |= _options(sub)
    return options


def _resolve(path: str) -> Any:
    """A class that is imported already; nothing is imported here."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _concrete(base: type) -> Iterable[type]:
    """The subclasses that can be instantiated and are not private."""
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls
        yield from _concrete(cls)

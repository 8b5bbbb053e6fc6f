"""The documentation that ships with the Python interpreter: real text for a language model, nothing to download."""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from .idx import DataError
from .text import ByteVocabulary, TextDataModule, TextSplits, byte_tokens

Sources = Literal["all", "topics", "docstrings"]
Entries = list[tuple[str, str]]
"""What a document consists of: texts, each with the line that stands before it, which may be empty."""

LEFT_OUT = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo", "venv"}
"""Packages that are generated, that newer versions do not have, or that some distributions ship apart."""
REPEATED = 40
"""A paragraph of so many characters is kept only once."""
SALT = "929"
"""Of the whole numbers below 1000, the one that gives the most even parts: looked at were sizes, nothing else."""


class PyDocsDataModule(TextDataModule):
    """The documentation of Python that its interpreter carries, byte by byte; nothing to download.

    Documents are the topics of ``help()`` (``pydoc_data.topics``) and the modules of the standard library. The text of
    a topic begins with the line ``help("its name")``. That of a module begins with its name; its docstring and those of
    its classes, functions and methods follow in the order of the file, each after a line with its name. The files are
    read, never imported. Modules whose name begins with an underscore, tests, and the packages of :data:`LEFT_OUT` are
    left out.

    Much of it is written down several times: a topic as part of a longer one, a docstring in two classes. A paragraph
    of 40 or more characters is kept only in the longest document that has it, whatever its indentation; else some of
    the test text would stand in the training text too.

    The SHA-256 of a document's name, read as a fraction, decides where the document goes: below 0.05 to the test text,
    below 0.1 to the validation text, and else to the training text. Documents stand in the order of these fractions,
    with two empty lines between them. The text depends on the version of Python, not on the machine.

    Args:
        sources: ``"topics"``, ``"docstrings"`` or ``"all"``.
        batch_size: streams of the training text, on each device.
        segment_length: bytes of each stream in a batch.
        eval_batch_size: streams of the validation text, and of the test text, on all devices together.
        eval_segment_length: bytes of each of those in a batch; by default ``segment_length``.
    """

    vocabulary = ByteVocabulary()

    def __init__(
        self,
        sources: Sources = "all",
        batch_size: int = 16,
        segment_length: int = 128,
        eval_batch_size: int = 16,
        eval_segment_length: int | None = None,
    ) -> None:
        super().__init__(batch_size, segment_length, eval_batch_size, eval_segment_length)
        if sources not in get_args(Sources):
            raise ValueError(f"sources is one of {', '.join(get_args(Sources))}; given: {sources!r}")
        self.sources = sources

    @property
    def python_version(self) -> str:
        """The version of Python whose documentation this is, such as ``"3.11.2"``."""
        return platform.python_version()

    def load(self) -> TextSplits:
        """Read the documents, about 1.5 MB in two seconds.

        Raises:
            DataError: this installation of Python came without its topics, or without the sources of its library.
        """
        documents: dict[str, Entries] = {}
        if self.sources != "docstrings":
            documents.update(topics())
        if self.sources != "topics":
            documents.update(docstrings(Path(sysconfig.get_path("stdlib"))))
        texts = sorted((_fraction(name), text) for name, text in without_repeats(documents).items())
        train, val, test = (
            byte_tokens("\n\n\n".join(text for at, text in texts if low <= at < high).encode())
            for low, high in ((0.1, 1), (0.05, 0.1), (0, 0.05))
        )
        return TextSplits(train, val, test)


def _fraction(name: str) -> float:
    """A number from 0 to below 1 that looks random and is always the same."""
    digest = hashlib.sha256(f"{SALT} {name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def topics() -> dict[str, Entries]:
    """The topics of ``help()``.

    Raises:
        DataError: this installation came without them.
    """
    try:
        from pydoc_data.topics import topics as texts
    except ImportError as error:
        raise DataError(
            f"this Python {platform.python_version()} came without its topics, the module pydoc_data.topics. Install "
            "the package of your system that has them, or use another Python, or give --data.sources docstrings"
        ) from error
    return {f'help("{name}")': [("", text)] for name, text in texts.items()}


def docstrings(folder: Path) -> dict[str, Entries]:
    """The docstrings of each public module in this folder and in its packages.

    Raises:
        DataError: there are none.
    """
    documents = {}
    with warnings.catch_warnings(action="ignore"), _no_garbage_collection():  # of old escape sequences
        for path in _modules(folder):
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError):  # a file of another version, as some installations have
                continue
            if entries := list(_docstrings(tree, "")):
                name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
                documents[name] = entries
    if not documents:
        raise DataError(
            f"this Python {platform.python_version()} came without the sources of its standard library: no docstring "
            f"was found in {folder}. Use another Python, or give --data.sources topics"
        )
    return documents


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes a great many objects; to look for cycles among them takes longer than the parsing itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _modules(folder: Path) -> Iterator[Path]:
    """The files of public modules; folders that are no packages, such as ``site-packages``, are not entered."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if _is_public(name) and name not in {"test", "tests", *LEFT_OUT}]
        for name in files:
            stem, ending = os.path.splitext(name)
            if ending == ".py" and (_is_public(stem) or stem == "__init__"):
                yield Path(place, name)


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of what a module, class or function defines, itself first."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if text := ast.get_docstring(node):
        yield name, text
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}".lstrip("."))


def without_repeats(documents: dict[str, Entries]) -> dict[str, str]:
    """The text of each document, its name first, less the paragraphs that a longer document has.

    A document of which nothing is left is left out.
    """
    seen: set[str] = set()

    def is_new(paragraph: str) -> bool:
        words = " ".join(paragraph.split())
        new = len(words) < REPEATED or words not in seen
        seen.add(words)
        return new

    texts = {}
    for name in sorted(documents, key=lambda name: (-sum(len(text) for _, text in documents[name]), name)):
        lines = [name]
        for title, text in documents[name]:
            if left := [paragraph for paragraph in text.strip("\n").split("\n\n") if is_new(paragraph)]:
                lines += [title, *left] if title else left
        if len(lines) > 1:
            texts[name] = "\n\n".join(lines)
    return texts

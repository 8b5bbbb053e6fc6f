"""The documentation of Python: what is read, what is kept, and how it is split."""

from __future__ import annotations

import gc
import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from datamodules import DataError, PyDocsDataModule, TextDataModule
from datamodules.pydocs import docstrings, topics, without_repeats


@pytest.fixture(scope="module")
def pydocs() -> PyDocsDataModule:
    """All of it, read once."""
    module = PyDocsDataModule()
    module.setup()
    return module


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


# ------------------------------------------------------------------------------------------------------------- the text


def parts(module: PyDocsDataModule) -> list[str]:
    """Training, validation and test text; each is whole UTF-8."""
    return [bytes(part.numpy()).decode() for part in module.splits]


def test_the_text_is_plentiful_and_split_as_stated(pydocs):
    train, val, test = (len(part) for part in pydocs.splits)
    total = train + val + test
    assert 1_300_000 < total < 2_000_000
    assert 0.03 < val / total < 0.08
    assert 0.03 < test / total < 0.08


def test_each_part_has_topics_and_docstrings(pydocs):
    for text in parts(pydocs):
        assert 'help("' in text
        documents = text.split("\n\n\n")
        assert sum(document.split("\n")[0] in sys.stdlib_module_names for document in documents) >= 5
    assert sum("\n\n\nheapq\n\nHeap queue algorithm" in text for text in parts(pydocs)) == 1


def test_no_long_paragraph_occurs_twice(pydocs):
    """Neither in two parts nor in one; a line with a name may be long too."""
    paragraphs = [" ".join(p.split()) for text in parts(pydocs) for p in text.split("\n\n")]
    long = [p for p in paragraphs if len(p) >= 40 and " " in p]
    assert len(long) > 5000
    assert len(set(long)) == len(long)


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="another Python has another text")
def test_the_text_of_one_version_never_changes(pydocs):
    """Published figures refer to it."""
    sizes = [len(part) for part in pydocs.splits]
    digests = [hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in pydocs.splits]
    assert sizes == [1481268, 82018, 74787]
    assert digests == ["4a753822822b2ebd", "528aee1245d841ff", "f14595cfc5bfe645"]


@pytest.mark.parametrize("sources", ["topics", "docstrings"])
def test_the_sources_can_be_had_apart(sources, pydocs, tmp_path, monkeypatch):
    write(tmp_path, {f"m{k}.py": f'"""Module number {k} of many small ones."""' for k in range(100)})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = parts(PyDocsDataModule(sources=sources))
    assert all(found)
    assert all(
        ('help("' in text, "\n\nModule number" in text) == (sources == "topics", sources != "topics") for text in found
    )


def test_what_it_says_of_itself(pydocs):
    assert pydocs.vocab_size == 256
    assert pydocs.python_version == platform.python_version()
    assert pydocs.decode(pydocs.splits.test) == parts(pydocs)[2]
    tokens, target = next(iter(pydocs.train_dataloader()))
    assert tokens.shape == target.shape == (16, 128)


def test_the_arguments_are_plain_enough_for_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    words = ["--data=PyDocsDataModule", "--data.sources=topics", "--data.segment_length=9"]
    module = parser.instantiate(parser.parse_args(words)).data
    assert isinstance(module, PyDocsDataModule)
    assert (module.sources, module.segment_length, module.hparams["sources"]) == ("topics", 9, "topics")


# ------------------------------------------------------------------------------------------------------- the docstrings

SHAPES = r'''"""Shapes.

  >>> 1 + 1
Two.
"""

raise RuntimeError("this file is read, not imported")

class Square:
    """Four sides."""

    def area(self):
        r"""Its area, \d."""
        def helper():
            """Not to be seen from outside."""

    class Corner:
        async def turn(self):
            """To the left."""

def plain():
    return "\d"  # an escape sequence that Python warns of
'''


def test_the_docstrings_of_a_module_in_the_order_of_the_file(tmp_path):
    write(tmp_path, {"shapes.py": SHAPES, "pkg/__init__.py": '"""A package."""'})
    assert docstrings(tmp_path) == {
        "shapes": [
            ("", "Shapes.\n\n  >>> 1 + 1\nTwo."),
            ("Square", "Four sides."),
            ("Square.area", "Its area, \\d."),
            ("Square.Corner.turn", "To the left."),
        ],
        "pkg": [("", "A package.")],
    }
    assert gc.isenabled()
    assert "shapes" not in sys.modules


def test_private_modules_tests_and_what_does_not_parse_are_left_out(tmp_path):
    kept = ("a.py", "pkg/__init__.py", "pkg/b.py")
    left_out = (
        *("_a.py", "pkg/_b.py", "pkg/__main__.py", "_pkg/c.py", "test/d.py", "pkg/tests/e.py", "tkinter/__init__.py"),
        *("site-packages/f.py", "config-3.11/g.py", "__pycache__/h.py", "pkg/notes.txt", "two-words.py"),
    )
    write(tmp_path, dict.fromkeys((*kept, *left_out), '"""Text."""'))
    write(
        tmp_path, {"old.py": 'print "hello"', "binary.py": b"\0\xff", "coding.py": b'"""\xff"""', "silent.py": "x = 1"}
    )
    assert set(docstrings(tmp_path)) == {"a", "pkg", "pkg.b"}


def test_a_paragraph_stays_in_the_longest_document_that_has_it():
    long = "A paragraph of more than forty characters, twice."
    indented = f"    {long[:11]}\n    {long[12:]}"
    assert without_repeats(
        {
            "short": [("", f"{long}\n\nFor example:")],
            "longer": [
                ("", "For example:"),
                ("f", f"\nBefore.\n\n{indented}\n\nAfter, at some length.\n"),
            ],
            "gone": [("g", long)],
            "twice": [
                ("h", "Another paragraph of more than forty letters."),
                ("i", "Another paragraph of more than forty letters."),
            ],
        }
    ) == {
        "longer": f"longer\n\nFor example:\n\nf\n\nBefore.\n\n{indented}\n\nAfter, at some length.",
        "twice": "twice\n\nh\n\nAnother paragraph of more than forty letters.",
        "short": "short\n\nFor example:",
    }


# ------------------------------------------------------------------------------------------------------ what is missing


def test_a_python_without_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"came without its topics, .* or give --data\.sources docstrings"):
        topics()
    with pytest.raises(DataError, match=platform.python_version()):
        PyDocsDataModule(sources="topics").setup("fit")


def test_a_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(
        DataError, match="without the sources of its standard library: no docstring was found in"
    ) as caught:
        PyDocsDataModule().setup("fit")
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_bad_arguments():
    with pytest.raises(ValueError, match="sources is one of all, topics, docstrings; given: 'topic'"):
        PyDocsDataModule(sources="topic")
    with pytest.raises(ValueError, match="batch_size is a whole number, at least 1; given: 0"):
        PyDocsDataModule(batch_size=0)

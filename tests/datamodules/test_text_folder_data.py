"""Folders of text: one file or many, cut in three or laid out in three."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from datamodules import DataError, TextDataModule, TextFolderDataModule


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def parts(root: Path, **arguments) -> list[bytes]:
    """Training, validation and test text."""
    module = TextFolderDataModule(str(root), **arguments)
    module.setup("fit")
    return [bytes(part.numpy()) for part in module.splits]


@settings(max_examples=20, deadline=None)
@given(content=st.binary(min_size=1, max_size=200), val=st.floats(0.01, 0.49), test=st.floats(0.01, 0.49))
def test_one_file_is_cut_in_three(content, val, test, tmp_path_factory):
    root = write(tmp_path_factory.mktemp("one"), {"book.txt": content})
    train, middle, end = parts(root, val_fraction=val, test_fraction=test)
    assert train + middle + end == content
    assert (len(middle), len(end)) == (round(val * len(content)), round(test * len(content)))


def test_of_many_files_each_is_cut_and_they_stand_in_order(tmp_path):
    """Including those in folders; a folder that looks like a file and other kinds of files are passed over."""
    files = {"b.txt": b"b" * 8 + b"cd", "a/x.txt": b"x" * 8 + b"yz", "a/y.md": b"other", "empty.txt": b""}
    root = write(tmp_path, files)
    (root / "folder.txt").mkdir()
    assert parts(root, val_fraction=0.1, test_fraction=0.1) == [b"x" * 8 + b"\n\n" + b"b" * 8, b"y\n\nc", b"z\n\nd"]
    assert parts(root, pattern="*/*.md", val_fraction=0.2, test_fraction=0.4) == [b"ot", b"h", b"er"]


def test_a_file_too_small_to_be_cut_is_training_text(tmp_path):
    root = write(tmp_path, {"a.txt": b"tiny", "b.txt": b"0123456789" * 10})
    assert [len(part) for part in parts(root)] == [4 + 2 + 90, 5, 5]


def test_folders_train_val_and_test_are_the_parts(tmp_path):
    root = write(
        tmp_path,
        {"train/2.txt": b"two", "train/1.txt": b"one", "val/a/b.txt": b"val", "test/t.txt": b"test", "more.txt": b"no"},
    )
    assert parts(root) == [b"one\n\ntwo", b"val", b"test"]


def test_a_folder_test_alone_is_a_folder_like_others(tmp_path):
    root = write(tmp_path, {"test/a.txt": b"0123456789"})
    assert parts(root, val_fraction=0.1, test_fraction=0.2) == [b"0123456", b"7", b"89"]


def test_it_is_read_byte_by_byte(tmp_path):
    text = "Zażółć gęślą jaźń.\r\n" * 50
    module = TextFolderDataModule(str(write(tmp_path, {"a.txt": text.encode()})), batch_size=2, eval_batch_size=1)
    assert module.decode(module.splits.train) == text[: len(module.decode(module.splits.train))]
    assert module.vocab_size == 256
    tokens, target = next(iter(module.train_dataloader()))
    assert tokens.shape == target.shape == (2, 128)
    assert len(list(module.test_dataloader())) == 1


def test_the_arguments_are_plain_enough_for_a_command_line(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    words = ["--data=TextFolderDataModule", f"--data.root={tmp_path}", "--data.pattern=*.md", "--data.val_fraction=0.1"]
    module = parser.instantiate(parser.parse_args(words)).data
    assert isinstance(module, TextFolderDataModule)
    assert (module.root, module.pattern, module.val_fraction) == (str(tmp_path), "*.md", 0.1)


# ------------------------------------------------------------------------------------------- what is missing or broken


def test_a_missing_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*/nowhere\. To look elsewhere, give --data\.root"
    ):
        parts(tmp_path / "nowhere")
    write(tmp_path, {"all.txt": b"text"})
    with pytest.raises(FileNotFoundError, match=r"all\.txt is a file, and a folder .* and --data\.pattern all\.txt"):
        parts(tmp_path / "all.txt")


def test_no_file_fits(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fits the pattern '\*\*/\*\.txt'; there is nothing\."):
        parts(tmp_path)
    write(tmp_path, {f"{k}.md": b"text" for k in range(7)})
    with pytest.raises(FileNotFoundError, match=r"there is: 0\.md, 1\.md, 2\.md, 3\.md, 4\.md, \.\.\.\. To read other"):
        parts(tmp_path)


def test_files_without_text(tmp_path):
    write(tmp_path, {"a.txt": b"", "b.txt": b""})
    with pytest.raises(DataError, match=r"all files in .* are empty: 2"):
        parts(tmp_path)


def test_a_layout_that_lacks_a_part(tmp_path):
    write(tmp_path, {"train/a.txt": b"text", "valid/a.txt": b"text"})
    with pytest.raises(FileNotFoundError, match="has a folder train but no folder val and no test"):
        parts(tmp_path)
    write(tmp_path, {"val/a.txt": b"text", "test/a.md": b"text"})
    with pytest.raises(FileNotFoundError, match=r"no file in .*/test fits the pattern"):
        parts(tmp_path)


def test_a_text_too_short_says_so(tmp_path):
    module = TextFolderDataModule(str(write(tmp_path, {"a.txt": b"some text"})))
    module.setup("fit")
    with pytest.raises(DataError, match="the training text has 9 tokens; 16 streams"):
        module.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": ""}, "pattern is relative to root, .* given: ''"),
        ({"pattern": "/etc/*.conf"}, "given: '/etc/"),
        ({"val_fraction": 0.0}, r"are above 0, and their sum is below 1; given: 0\.0 and 0\.05"),
        ({"test_fraction": 0.95}, r"given: 0\.05 and 0\.95"),
        ({"test_fraction": float("nan")}, "given: 0.05 and nan"),
        ({"segment_length": 0}, "segment_length is a whole number, at least 1; given: 0"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TextFolderDataModule(str(tmp_path), **arguments)

"""WikiText-103, on a few lines laid out like the real files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from datamodules import DataError, TextDataModule, WikiText103DataModule
from datamodules.wikitext import NAMES, WordVocabulary, read_training_words

TRAIN = " \n = Bee = \n \n the bee and the flower \n the <unk> and a <unk> \n"
WORDS = ["<eos>", "the", "=", "and", "<unk>", "bee", "flower", "a", "Bee"]


def write(
    root: Path, train: str = TRAIN, val: str = " the bee \n", test: str = " a wasp \n \n", names=NAMES[0]
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (train, val, test), strict=True):
        (root / name).write_text(text, encoding="utf-8")
    return root


def small(root: Path, **arguments) -> WikiText103DataModule:
    return WikiText103DataModule(**{"root": str(root), "batch_size": 2, "eval_batch_size": 1, **arguments})


# ------------------------------------------------------------------------------------------------------ the vocabulary


def test_words_by_falling_frequency_then_by_first_occurrence(tmp_path):
    module = small(write(tmp_path))
    assert module.vocabulary.words == ["<eos>", "the", "=", "and", "<unk>", "Bee", "bee", "flower", "a"]
    assert module.vocab_size == 9
    assert module.decode(module.splits.train) == "\n= Bee =\n\nthe bee and the flower\nthe <unk> and a <unk>\n"
    assert module.splits.train.dtype == torch.int32
    assert module.splits.val.tolist() == [1, 6, 0]
    assert module.splits.test.tolist() == [8, 4, 0, 0], "a wasp is unknown, an empty line has an end"


def by_the_book(text: str) -> tuple[list[str], list[int]]:
    """The published rule in two passes: count the words, sort them, look each up."""
    lines = text.split("\n")[:-1] if text.endswith("\n") or not text else text.split("\n")
    count = Counter(word for line in lines for word in line.strip().split())
    words = ["<eos>", *(word for word, _ in count.most_common() if word != "<eos>")]
    token_of = {word: token for token, word in enumerate(words)}
    return words, [token_of[word] for line in lines for word in [*line.strip().split(), "<eos>"]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ü", "<eos>", " ", " ", "\u3000", "\n"]), max_size=60))
def test_the_vocabulary_and_the_tokens_are_those_of_the_published_rule(pieces):
    text = "".join(pieces)
    vocabulary, tokens = read_training_words(text.splitlines(keepends=True))
    words, expected = by_the_book(text)
    assert vocabulary.words == words
    assert tokens.tolist() == expected
    assert vocabulary.encode_lines(text.splitlines(keepends=True), "it").tolist() == expected


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS[1:]), max_size=4), max_size=4))
def test_words_give_the_text_back(lines):
    text = "\n".join(" ".join(line) for line in lines)
    vocabulary = WordVocabulary(WORDS)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.int64
    assert len(tokens) == sum(len(line) for line in lines) + text.count("\n")
    assert vocabulary.decode(tokens) == text
    assert vocabulary.decode(vocabulary.encode(text.encode()).int()) == text


def test_a_prompt_goes_on_and_a_finished_line_has_its_end():
    vocabulary = WordVocabulary(WORDS)
    assert vocabulary.encode("the bee").tolist() == [1, 5]
    assert vocabulary.encode("the bee\n").tolist() == vocabulary.encode("the bee\r\n").tolist() == [1, 5, 0]
    assert vocabulary.encode("a\n\n").tolist() == [7, 0, 0]
    assert vocabulary.encode("").tolist() == []
    assert vocabulary.encode("the wasp").tolist() == [1, 4]


def test_how_many_bytes_a_token_stands_for():
    vocabulary = WordVocabulary(["<eos>", "the", "bête"])
    assert vocabulary.token_bytes.tolist() == [1, 4, 6]
    assert vocabulary.token_bytes.dtype == torch.float32
    tokens = vocabulary.encode("the bête the\n")
    assert vocabulary.token_bytes[tokens].sum() == len("the bête the \n".encode())


@pytest.mark.parametrize("words", [[], ["the"], ["<eos>", "the", "the"]])
def test_a_list_that_is_no_vocabulary(words):
    with pytest.raises(ValueError, match="the words begin with <eos> and each occurs once"):
        WordVocabulary(words)


def test_a_token_that_is_no_word():
    with pytest.raises(ValueError, match="a token of this vocabulary is from 0 to 8; given: 9"):
        WordVocabulary(WORDS).decode(torch.tensor([0, 9]))


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("folder", [".", "wikitext-103"])
def test_both_layouts_are_found(names, folder, tmp_path):
    write(tmp_path / folder, names=names)
    module = small(tmp_path)
    module.setup("fit")
    assert [len(part) for part in module.splits] == [18, 3, 4]


def test_batches(tmp_path):
    module = small(write(tmp_path), segment_length=3)
    batches = list(module.train_dataloader())
    assert [tuple(tokens.shape) for tokens, _ in batches] == [(2, 3), (2, 3), (2, 2)]
    assert batches[0][0].dtype == torch.int64
    rows = torch.cat([tokens for tokens, _ in batches], 1)
    assert torch.equal(rows.flatten(), module.splits.train.view(-1)[torch.tensor([*range(8), *range(9, 17)])].long())


def test_the_published_sizes_are_the_default(tmp_path):
    module = WikiText103DataModule(root=str(tmp_path))
    assert (module.batch_size, module.segment_length) == (56, 150)


def test_the_arguments_are_plain_enough_for_a_command_line(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    module = parser.instantiate(
        parser.parse_args(["--data=WikiText103DataModule", f"--data.root={write(tmp_path)}"])
    ).data
    assert isinstance(module, WikiText103DataModule)
    assert module.vocab_size == 9


# ------------------------------------------------------------------------------------------- what is missing or broken


def test_missing_files_are_one_clear_error(tmp_path):
    module = small(tmp_path / "nowhere")
    for step in (module.setup, lambda: module.vocab_size, lambda: module.encode("a")):
        with pytest.raises(FileNotFoundError, match=r"^WikiText-103 was not found: .*/nowhere has neither") as caught:
            step()
        for name in (*NAMES[0], *NAMES[1], "wikitext-103-v1.zip", "--data.root"):
            assert name in str(caught.value)


def test_a_part_alone_is_not_enough(tmp_path):
    write(tmp_path)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither train\.txt, valid\.txt, test\.txt nor"):
        small(tmp_path).setup("fit")


def test_an_unknown_word_is_named_where_there_is_no_unk(tmp_path):
    module = small(write(tmp_path, train="the bee \n", val="the bee \n", test="the \n a bee \n"))
    with pytest.raises(DataError, match=r"/test\.txt has the word 'a', which is not in the vocabulary, and neither is"):
        module.setup("fit")
    with pytest.raises(DataError, match=r"^the text has the word 'wasp'"):
        module.encode("the wasp")


@pytest.mark.parametrize("name", NAMES[0])
def test_a_file_that_is_not_utf_8(name, tmp_path):
    path = write(tmp_path) / name
    path.write_bytes(b"the b\xeate \n")
    with pytest.raises(DataError, match=f"{name} is corrupt: it is not UTF-8"):
        small(tmp_path).setup("fit")


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="eval_batch_size is a whole number, at least 1; given: 0"):
        small(tmp_path, eval_batch_size=0)

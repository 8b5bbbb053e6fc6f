"""WikiText-103: 103 million words of Wikipedia's good and featured articles.

S. Merity et al., "Pointer sentinel mixture models", ICLR 2017. The vocabulary is that of Z. Dai et al.,
"Transformer-XL", ACL 2019, which the published DEQ transformers share.
"""

from __future__ import annotations

import io
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from .idx import DataError, corrupt
from .text import TextDataModule, TextSplits, Vocabulary

EOS, UNKNOWN = "<eos>", "<unk>"
NAMES = (("train.txt", "valid.txt", "test.txt"), ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"))


class WordVocabulary(Vocabulary):
    """Words between white space, each a token; the end of a line is the token 0, ``<eos>``.

    Args:
        words: the words in the order of their tokens, ``<eos>`` first.
    """

    def __init__(self, words: list[str]) -> None:
        if not words or words[0] != EOS or len(set(words)) < len(words):
            raise ValueError(f"the words begin with {EOS} and each occurs once; given: {words[:5]}, ...")
        self.words = words
        self.token_of = {word: token for token, word in enumerate(words)}

    @property
    def size(self) -> int:
        return len(self.words)

    @cached_property
    def token_bytes(self) -> Tensor:
        """The bytes of a word's UTF-8 and of the space after it; 1 for the end of a line: float32 ``(size,)``."""
        return torch.tensor([1.0, *(len(word.encode()) + 1.0 for word in self.words[1:])])

    def encode(self, text: str | bytes) -> Tensor:
        """The tokens of a text: int64 ``(N,)``. A text that does not end with a line goes on there.

        Raises:
            DataError: a word is not in the vocabulary, and neither is ``<unk>``.
        """
        text = text if isinstance(text, str) else text.decode()
        tokens = self.encode_lines(io.StringIO(text, newline=None), "the text").long()
        return tokens[:-1] if text and not text.endswith(("\n", "\r")) else tokens

    def encode_lines(self, lines: Iterable[str], source: object) -> Tensor:
        """The tokens of lines of text: int32 ``(N,)``. ``source`` is what an error calls them."""
        tokens = array("i")
        unknown = self.token_of.get(UNKNOWN)
        for line in lines:
            for word in line.split():
                token = self.token_of.get(word, unknown)
                if token is None:
                    raise DataError(
                        f"{source} has the word {word!r}, which is not in the vocabulary, and neither is {UNKNOWN}: "
                        "the training text has to have one of them"
                    )
                tokens.append(token)
            tokens.append(0)
        return _tensor(tokens)

    def decode(self, tokens: Tensor) -> str:
        lines: list[list[str]] = [[]]
        for token in self._checked(tokens).tolist():
            if token == 0:
                lines.append([])
            else:
                lines[-1].append(self.words[token])
        return "\n".join(" ".join(line) for line in lines)


def read_training_words(lines: Iterable[str]) -> tuple[WordVocabulary, Tensor]:
    """The vocabulary of a training text, and the text's tokens: int32 ``(N,)``.

    Words are what stands between white space, as it is written. ``<eos>``, the end of each line, is token 0; the words
    follow by falling frequency, and those that are equally frequent in the order of their first occurrence.
    """
    first: defaultdict[str, int] = defaultdict()
    first.default_factory = first.__len__  # a new word has the number of those before it
    tokens = array("i")
    end = first[EOS]
    for line in lines:
        tokens.extend(map(first.__getitem__, line.split()))
        tokens.append(end)
    by_occurrence = _tensor(tokens)
    count = torch.bincount(by_occurrence, minlength=len(first))
    count[end] = len(tokens) + 1  # which no word reaches
    order = count.argsort(descending=True, stable=True)
    token_of = torch.empty(len(first), dtype=torch.int32)
    token_of[order] = torch.arange(len(first), dtype=torch.int32)
    words = list(first)
    return WordVocabulary([words[index] for index in order.tolist()]), token_of[by_occurrence]


def _tensor(tokens: array[int]) -> Tensor:
    """The same memory as int32 ``(N,)``."""
    return torch.from_numpy(np.frombuffer(tokens, np.int32))


class WikiText103DataModule(TextDataModule):
    """WikiText-103, word by word, with the published vocabulary.

    The files are ``train.txt``, ``valid.txt`` and ``test.txt``, or ``wiki.train.tokens``, ``wiki.valid.tokens`` and
    ``wiki.test.tokens``, in ``root`` or in ``root/wikitext-103``. Words are what stands between white space, as it is
    written; each line ends with the token ``<eos>``, an empty one too. ``<eos>`` is token 0; the words of the training
    text follow by falling frequency, and those that are equally frequent in the order of their first occurrence. The
    real files have 267,735 tokens in their vocabulary. A word of the other two files that the training text does not
    have is ``<unk>``. For the bits per byte, a word has the bytes of its UTF-8 and one for the space after it, and the
    end of a line has one.

    Args:
        root: folder of the files.
        batch_size: streams of the training text, on each device.
        segment_length: words of each stream in a batch.
        eval_batch_size: streams of the validation text, and of the test text, on all devices together.
        eval_segment_length: words of each of those in a batch; by default ``segment_length``.
    """

    def __init__(
        self,
        root: str = "data/wikitext-103",
        batch_size: int = 56,
        segment_length: int = 150,
        eval_batch_size: int = 16,
        eval_segment_length: int | None = None,
    ) -> None:
        super().__init__(batch_size, segment_length, eval_batch_size, eval_segment_length)
        self.root = root

    @property
    def vocabulary(self) -> WordVocabulary:
        """The tokens of this text; at the first use the training text is read.

        Raises:
            FileNotFoundError: a file is missing; the message says what to get, and how it is laid out.
            DataError: the file is not UTF-8.
        """
        return self._training[0]

    def load(self) -> TextSplits:
        """Read the files.

        Raises:
            FileNotFoundError: a file is missing; the message says what to get, and how it is laid out.
            DataError: a file is not UTF-8, or has a word that is unknown where ``<unk>`` is too.
        """
        vocabulary, train = self._training
        parts = []
        for path in self._files()[1:]:
            with _opened(path) as lines:
                parts.append(vocabulary.encode_lines(lines, path))
        return TextSplits(train, *parts)

    @cached_property
    def _training(self) -> tuple[WordVocabulary, Tensor]:
        with _opened(self._files()[0]) as lines:
            return read_training_words(lines)

    def _files(self) -> tuple[Path, ...]:
        """The files of the training, validation and test text."""
        root = Path(self.root).absolute()
        for folder in (root, root / "wikitext-103"):
            for names in NAMES:
                if all((folder / name).is_file() for name in names):
                    return tuple(folder / name for name in names)
        raise FileNotFoundError(
            f"WikiText-103 was not found: {root} has neither {', '.join(NAMES[0])} nor {', '.join(NAMES[1])}, and no "
            "folder wikitext-103 with them. The address it was published at is gone: get the word-level archive "
            "wikitext-103-v1.zip of Merity et al. (not the raw one, whose rare words are not <unk>) and unpack it "
            "there. To look elsewhere, give --data.root (in a script: WikiText103DataModule(root=...))"
        )


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The lines of a file.

    Raises:
        DataError: the file is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise corrupt(path, f"it is not UTF-8: {error}") from error

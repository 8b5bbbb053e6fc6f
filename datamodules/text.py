"""What all sets of text share: streams that run side by side through a text, and the bytes as a vocabulary.

Z. Dai et al., "Transformer-XL: attentive language models beyond a fixed-length context", ACL 2019, section 3.2: row b
of a batch goes on where row b of the batch before ended, so that a model can carry its memory from batch to batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from .base import whole_number
from .idx import DataError
from .processes import Pass, Place, no_place, place_in_training, processes_of, refuse_other_processes

Batch = tuple[Tensor, Tensor]
IGNORED = -100
"""The target of a place that does not count."""


class TextSplits(NamedTuple):
    """The three parts of a set of text: tokens ``(N,)`` each, as whole numbers of any type."""

    train: Tensor
    val: Tensor
    test: Tensor


class Vocabulary(ABC):
    """Which tokens there are, and what text they stand for."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many tokens there are; they are the numbers from 0 to below this."""

    @property
    @abstractmethod
    def token_bytes(self) -> Tensor:
        """How many bytes of text each token stands for: float32 ``(size,)``."""

    @abstractmethod
    def encode(self, text: str | bytes) -> Tensor:
        """The tokens of a text: int64 ``(N,)``. A ``str`` stands for its UTF-8."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> str:
        """The text of these tokens ``(N,)``, of any integer type.

        Raises:
            ValueError: the tensor is not that, or a token is not in the vocabulary.
        """

    def _checked(self, tokens: Tensor) -> Tensor:
        """``tokens``, if they are what :meth:`decode` takes."""
        if tokens.ndim != 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(
                f"tokens are whole numbers of shape (N,); given: {tokens.dtype} of shape {tuple(tokens.shape)}. "
                "Decode the rows of a batch one by one"
            )
        for token in (int(tokens.min()), int(tokens.max())) if len(tokens) else ():
            if not 0 <= token < self.size:
                raise ValueError(f"a token of this vocabulary is from 0 to {self.size - 1}; given: {token}")
        return tokens


class ByteVocabulary(Vocabulary):
    """Each byte of the UTF-8 of a text is a token; the token is its value, from 0 to 255.

    Nothing is unknown to it. Bytes that are not UTF-8, as a character that was cut in two, decode to U+FFFD.
    """

    size = 256

    @property
    def token_bytes(self) -> Tensor:
        return torch.ones(self.size)

    def encode(self, text: str | bytes) -> Tensor:
        return byte_tokens(text.encode() if isinstance(text, str) else text).long()

    def decode(self, tokens: Tensor) -> str:
        return bytes(self._checked(tokens).tolist()).decode(errors="replace")


def byte_tokens(content: bytes) -> Tensor:
    """The bytes as uint8 ``(N,)``."""
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


class TextBatches:
    """Streams through one text, side by side, as batches ``(tokens (B, L), target (B, L))``, int64.

    Stream b has the ``lengths[b]`` tokens from ``starts[b]`` on, and the target of each is the token after it. A batch
    is the next segment of every stream; the last may be shorter. Where a stream has ended before the longest one, the
    token is 0 and the target -100, which does not count.

    A Trainer takes this as it is, in place of a DataLoader: it draws no samples of its own and advises no workers. Its
    checkpoints keep the place in the text (``state_dict``): a run that is resumed within an epoch goes on there.

    Args:
        text: tokens ``(N,)``.
        starts: ``(S,)``.
        lengths: ``(S,)``.
        segment_length: L.
        rows: the streams wanted; by default all of them. The number and the length of the batches follow from all.
        place: where a pass is to begin, given the pass, as an epoch and a number of batches; where it gives None, at
            the beginning.
        processes: how many share the text; None if any number may read these rows.

    Raises:
        DataError: another number of processes is there when a pass begins.
    """

    def __init__(
        self,
        text: Tensor,
        starts: Tensor,
        lengths: Tensor,
        segment_length: int,
        rows: slice = slice(None),
        place: Callable[[object], Place | None] = no_place,
        processes: int | None = None,
    ) -> None:
        self.text = text
        self.starts = starts[rows]
        self.lengths = lengths[rows]
        self.segment_length = segment_length
        self.longest = int(lengths.max())
        self.place = place
        self.processes = processes
        self._trains = False
        self._next = self._first = 0

    def state_dict(self) -> dict[str, int]:
        """How far all streams were read; after the last batch that is to their end."""
        return {"position": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next pass reads on from there, unless all was read, and those after it from the beginning."""
        self._next = state_dict["position"]
        self._first = self._next if self._next < self.longest else 0

    def __len__(self) -> int:
        return math.ceil(self.longest / self.segment_length)

    def __iter__(self) -> Pass[Batch]:
        """A pass, begun when its first batch is asked for. A user's, while a Trainer trains, changes no state."""
        return Pass(self._pass)

    def _pass(self, asked: Pass[Batch]) -> Iterator[Batch]:
        if self.processes is not None:
            refuse_other_processes(self.processes)
        known = self.place(asked)
        counts = known is not None or not self._trains
        self._trains = self._trains or known is not None
        first, self._first = self._first if known is None else known[1] * self.segment_length, 0
        return self._batches(first, counts)

    def _batches(self, first: int, counts: bool) -> Iterator[Batch]:
        for begin in range(first, self.longest, self.segment_length):
            end = min(begin + self.segment_length, self.longest)
            if counts:
                self._next = end
            place = torch.arange(begin, end)
            over = place >= self.lengths.unsqueeze(1)
            at = (self.starts.unsqueeze(1) + place).masked_fill(over, 0)
            tokens, target = self.text[at].long(), self.text[at + 1].long()
            yield tokens.masked_fill(over, 0), target.masked_fill(over, IGNORED)


def training_streams(N: int, streams: int) -> Batch:
    """``starts`` and ``lengths`` that cut a text of N tokens into equal parts, as the published training does.

    Each part has ``N // streams`` tokens; those that remain, fewer than there are streams, are left out. The last
    token of a part is only a target.
    """
    part = N // streams
    return torch.arange(streams) * part, torch.full((streams,), part - 1)


def evaluation_streams(N: int, streams: int) -> Batch:
    """``starts`` and ``lengths`` with which each of N tokens but the first is a target exactly once.

    The lengths differ by one at most.
    """
    least, longer = divmod(N - 1, streams)
    lengths = torch.full((streams,), least)
    lengths[:longer] += 1
    return lengths.cumsum(0) - lengths, lengths


class TextDataModule(LightningDataModule, ABC):
    """Text in three parts, as streams side by side; a subclass says how it is loaded and what its tokens are.

    Batches are ``(tokens (B, L), target (B, L))``, int64: ``target[:, t]`` is the token after ``tokens[:, t]``; a
    target of -100 does not count. Row b of a batch goes on where row b of the batch before ended. The order is that
    of the text, in every epoch. All of it is in memory; the loaders work without a Trainer too.

    The training text is cut into ``batch_size`` streams for each device, :func:`training_streams`: two devices with B
    streams see together what one with 2 B sees. In validation and test, :func:`evaluation_streams`, the streams are
    ``eval_batch_size`` on all devices together, so that the figures do not depend on how many there are.

    Args:
        batch_size: streams of the training text, on each device.
        segment_length: tokens of each stream in a batch.
        eval_batch_size: streams of the validation text, and of the test text, on all devices together.
        eval_segment_length: tokens of each of those in a batch; by default ``segment_length``.
    """

    def __init__(
        self,
        batch_size: int = 16,
        segment_length: int = 128,
        eval_batch_size: int = 16,
        eval_segment_length: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # the subclass's arguments too, so that a checkpoint knows its data
        self.batch_size = whole_number("batch_size", batch_size, at_least=1)
        self.segment_length = whole_number("segment_length", segment_length, at_least=1)
        self.eval_batch_size = whole_number("eval_batch_size", eval_batch_size, at_least=1)
        if eval_segment_length is None:
            eval_segment_length = segment_length
        self.eval_segment_length = whole_number("eval_segment_length", eval_segment_length, at_least=1)
        self._streams_before: int | None = None

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The tokens of this text."""

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def token_bytes(self) -> Tensor:
        """How many bytes of text each token stands for: float32 ``(vocab_size,)``."""
        return self.vocabulary.token_bytes

    def encode(self, text: str | bytes) -> Tensor:
        """The tokens of a text: int64 ``(N,)``."""
        return self.vocabulary.encode(text)

    def decode(self, tokens: Tensor) -> str:
        """The text of these tokens ``(N,)``."""
        return self.vocabulary.decode(tokens)

    @abstractmethod
    def load(self) -> TextSplits:
        """Read the text."""

    @cached_property
    def splits(self) -> TextSplits:
        """The three parts, read at the first use."""
        return self.load()

    def setup(self, stage: str | None = None) -> None:
        """Read the text now, so that what is wrong with it is found before the first epoch; a fit is a new run."""
        _ = self.splits
        if stage == "fit":
            self._streams_before = None

    def state_dict(self) -> dict[str, Any]:
        """How many streams there are, on all devices."""
        return {"joint_batch": self._streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """How many there were."""
        self._streams_before = state_dict.get("joint_batch")

    @property
    def _streams(self) -> int:
        return self.batch_size * processes_of(self)[0]

    def _place(self, asked: object) -> Place | None:
        return place_in_training(self, asked, "streams", self._streams_before, self._streams)

    def train_dataloader(self) -> TextBatches:
        """This device's streams of the training text.

        Raises:
            DataError: the text is too short for that many streams.
        """
        devices, rank = processes_of(self)
        text, streams = self.splits.train, self._streams
        if len(text) < 2 * streams:
            raise DataError(
                f"the training text has {len(text)} tokens; {streams} streams ({_counted(self.batch_size, devices)}) "
                f"need at least 2 each: {2 * streams}. Choose a smaller batch_size, or a longer text"
            )
        rows = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        found = training_streams(len(text), streams)
        return TextBatches(text, *found, self.segment_length, rows, self._place, devices)

    def val_dataloader(self) -> TextBatches:
        """This device's streams of the validation text; :class:`DataError` as :meth:`test_dataloader`."""
        return self._evaluation("validation", self.splits.val)

    def test_dataloader(self) -> TextBatches:
        """This device's streams of the test text.

        Raises:
            DataError: the text is too short for that many streams, or there are fewer streams than devices.
        """
        return self._evaluation("test", self.splits.test)

    def predict_dataloader(self) -> TextBatches:
        """The test text."""
        return self._evaluation("test", self.splits.test)

    def _evaluation(self, part: str, text: Tensor) -> TextBatches:
        devices, rank = processes_of(self)
        streams = self.eval_batch_size
        if streams < devices:
            raise DataError(
                f"the {part} text is read in {streams} streams, fewer than the {devices} devices. "
                f"Set eval_batch_size to {devices} or more"
            )
        if len(text) <= streams:
            smaller = "Choose a smaller eval_batch_size, or a" if len(text) > 1 else "Give a"
            raise DataError(
                f"the {part} text has {len(text)} tokens; {streams} streams need at least {streams + 1}. {smaller} "
                "longer text"
            )
        rows = slice(rank * streams // devices, (rank + 1) * streams // devices)
        return TextBatches(text, *evaluation_streams(len(text), streams), self.eval_segment_length, rows)


def _counted(batch_size: int, devices: int) -> str:
    return f"batch_size {batch_size}" if devices == 1 else f"batch_size {batch_size} on each of {devices} devices"

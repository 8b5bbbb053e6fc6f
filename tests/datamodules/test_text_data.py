"""Streams of text: every token in its place, every target once, on one device and on several."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from datamodules import DataError, TextDataModule
from datamodules.text import (
    IGNORED,
    ByteVocabulary,
    TextBatches,
    TextSplits,
    byte_tokens,
    evaluation_streams,
    training_streams,
)


class Numbers(TextDataModule):
    """A text whose tokens are 0, 1, 2, ..., so that each says where it stands."""

    vocabulary = ByteVocabulary()

    def __init__(self, train: int = 100, val: int = 30, test: int = 40, **arguments) -> None:
        super().__init__(**{"batch_size": 4, "segment_length": 5, "eval_batch_size": 3, **arguments})
        self.sizes = (train, val, test)

    def load(self) -> TextSplits:
        return TextSplits(*(torch.arange(size, dtype=torch.int16) for size in self.sizes))


def on(rank: int, devices: int, module: TextDataModule) -> TextDataModule:
    """The module as the process of this rank has it."""
    module.trainer = SimpleNamespace(world_size=devices, global_rank=rank, training=False)
    return module


def side_by_side(batches: TextBatches) -> tuple[Tensor, Tensor]:
    """Tokens and targets of whole streams, ``(S, n)`` each."""
    found = list(batches)
    assert len(found) == len(batches)
    assert all(tokens.dtype == target.dtype == torch.int64 for tokens, target in found)
    assert all(tokens.shape == target.shape for tokens, target in found)
    lengths = [tokens.shape[1] for tokens, _ in found]
    assert all(length == batches.segment_length for length in lengths[:-1])
    assert 0 < lengths[-1] <= batches.segment_length
    tokens, target = zip(*found, strict=True)
    return torch.cat(tokens, 1), torch.cat(target, 1)


# ---------------------------------------------------------------------------------------------------------- the streams


@settings(max_examples=40, deadline=None)
@given(streams=st.integers(1, 7), each=st.integers(2, 30), more=st.integers(0, 6), segment_length=st.integers(1, 40))
def test_training_streams_side_by_side_are_the_text(streams, each, more, segment_length):
    text = torch.randperm(N := streams * each + more % streams).int()
    tokens, target = side_by_side(TextBatches(text, *training_streams(N, streams), segment_length))
    assert torch.equal(tokens[:, 1:], target[:, :-1]), "the target is the next token"
    rows = torch.cat([tokens, target[:, -1:]], dim=1)
    assert torch.equal(rows.flatten(), text[: streams * each].long()), "only the remainder is left out"


@settings(max_examples=40, deadline=None)
@given(streams=st.integers(1, 7), more=st.integers(1, 60), segment_length=st.integers(1, 40))
def test_in_evaluation_each_token_but_the_first_is_a_target_once(streams, more, segment_length):
    text = torch.randperm(N := streams + more).to(torch.uint8)
    tokens, target = side_by_side(TextBatches(text, *evaluation_streams(N, streams), segment_length))
    counted = target != IGNORED
    assert torch.equal(target[counted], text[1:].long()), "in the order of the text, row after row"
    assert torch.equal(tokens[counted], text[:-1].long())
    assert tokens[~counted].eq(0).all()
    assert counted.sum(1).min() >= tokens.shape[1] - 1, "no stream is shorter by more than one"


@settings(max_examples=30, deadline=None)
@given(
    devices=st.integers(1, 4),
    batch_size=st.integers(1, 3),
    eval_batch_size=st.integers(4, 9),
    size=st.integers(30, 90),
    segment_length=st.integers(1, 20),
)
def test_the_batches_of_several_devices_are_those_of_one(devices, batch_size, eval_batch_size, size, segment_length):
    arguments = {"train": size, "val": size, "test": size, "segment_length": segment_length}
    joint = Numbers(**arguments, batch_size=batch_size * devices, eval_batch_size=eval_batch_size)
    parts = [
        on(rank, devices, Numbers(**arguments, batch_size=batch_size, eval_batch_size=eval_batch_size))
        for rank in range(devices)
    ]
    for name in ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"):
        whole = list(getattr(joint, name)())
        for expected, *shares in zip(whole, *(getattr(part, name)() for part in parts), strict=True):
            for k in range(2):
                assert torch.equal(torch.cat([share[k] for share in shares]), expected[k])


def test_an_epoch_is_the_same_each_time():
    loader = Numbers().train_dataloader()
    for first, second in zip(loader, loader, strict=True):
        assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("read", range(8))
def test_reading_goes_on_where_it_was(read):
    """Within a pass, and after its last batch, where nothing of it is left, with the next one; then from the start."""
    whole = Numbers().train_dataloader()
    batches = iter(whole)
    for _ in range(min(read, len(whole))):
        next(batches)
    resumed = Numbers().train_dataloader()
    resumed.load_state_dict(whole.state_dict())
    assert resumed.state_dict() == whole.state_dict()
    for expected in ([*batches] or [*whole], [*whole]):
        assert [tokens.tolist() for tokens, _ in resumed] == [tokens.tolist() for tokens, _ in expected]


def test_a_pass_of_a_user_while_a_trainer_trains_changes_no_state():
    places = iter([(0, 2), None])
    batches = TextBatches(torch.arange(50), *training_streams(50, 2), 4, place=lambda _: next(places))
    own = iter(batches)
    next(own)
    before = batches.state_dict()
    assert len(list(batches)) == 6
    assert batches.state_dict() == before == {"position": 12}
    assert len(list(own)) == 3


def test_batches_by_hand():
    """Two streams of four tokens and one left out; in evaluation, streams of five and of four targets."""
    module = Numbers(9, 10, 3, batch_size=2, segment_length=2, eval_batch_size=2, eval_segment_length=4)
    train = [(tokens.tolist(), target.tolist()) for tokens, target in module.train_dataloader()]
    assert train == [([[0, 1], [4, 5]], [[1, 2], [5, 6]]), ([[2], [6]], [[3], [7]])]
    val = [(tokens.tolist(), target.tolist()) for tokens, target in module.val_dataloader()]
    assert val == [([[0, 1, 2, 3], [5, 6, 7, 8]], [[1, 2, 3, 4], [6, 7, 8, 9]]), ([[4], [0]], [[5], [-100]])]
    assert len(module.test_dataloader()) == 1


def test_the_segments_of_evaluation_are_those_of_training_unless_said_otherwise():
    assert Numbers().val_dataloader().segment_length == 5
    assert Numbers(eval_segment_length=7).test_dataloader().segment_length == 7


# ----------------------------------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize("name", ["batch_size", "segment_length", "eval_batch_size", "eval_segment_length"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"^{name} is a whole number, at least 1; given: 0"):
        Numbers(**{name: 0})


def test_a_training_text_too_short_for_its_streams():
    assert len(Numbers(train=8).train_dataloader()) == 1
    with pytest.raises(DataError, match=r"has 7 tokens; 4 streams \(batch_size 4\) need at least 2 each: 8\. Choose"):
        Numbers(train=7).train_dataloader()
    with pytest.raises(DataError, match=r"8 streams \(batch_size 4 on each of 2 devices\) need at least 2 each: 16"):
        on(1, 2, Numbers(train=15)).train_dataloader()


def test_an_evaluation_text_too_short_for_its_streams():
    assert len(Numbers(val=4).val_dataloader()) == 1
    with pytest.raises(DataError, match="the validation text has 3 tokens; 3 streams need at least 4"):
        Numbers(val=3).val_dataloader()
    for name in ("test_dataloader", "predict_dataloader"):
        with pytest.raises(DataError, match=r"the test text has 0 tokens; .* Give a longer text"):
            getattr(Numbers(test=0), name)()


def test_more_devices_than_streams_of_evaluation():
    with pytest.raises(DataError, match=r"in 3 streams, fewer than the 4 devices\. Set eval_batch_size to 4 or more"):
        on(0, 4, Numbers()).test_dataloader()


# ------------------------------------------------------------------------------------------------------------ the bytes


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_bytes_give_the_text_back(text):
    module = Numbers()
    tokens = module.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == list(text.encode())
    assert torch.equal(tokens, module.encode(text.encode()))
    assert module.decode(tokens) == text
    assert module.decode(byte_tokens(text.encode())) == text
    assert module.token_bytes[tokens].sum() == len(text.encode())


def test_every_byte_is_known():
    vocabulary = ByteVocabulary()
    assert vocabulary.encode(bytes(range(256))).tolist() == list(range(256))
    assert vocabulary.decode(torch.tensor([97, 0xC3])) == "a\ufffd", "half a character"
    assert vocabulary.token_bytes.shape == (Numbers().vocab_size,) == (256,)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([3, 256]), "a token of this vocabulary is from 0 to 255; given: 256"),
        (torch.tensor([-1, 2]), "given: -1"),
        (torch.zeros(2, 3, dtype=torch.int64), r"given: torch.int64 of shape \(2, 3\)\. Decode the rows"),
        (torch.zeros(3), "tokens are whole numbers of shape"),
        (torch.zeros(3, dtype=torch.bool), "given: torch.bool"),
    ],
)
def test_what_cannot_be_decoded(tokens, message):
    with pytest.raises(ValueError, match=message):
        Numbers().decode(tokens)


# ---------------------------------------------------------------------------------------------------------- the Trainer


class Recorder(LightningModule):
    """Keeps the tokens it is shown."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder
        self.shown: dict[str, list[Tensor]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.shown["train"].append(batch[0])
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        self.shown["val"].append(batch[0])

    def test_step(self, batch, batch_idx):
        self.shown["test"].append(batch[0])

    def predict_step(self, batch, batch_idx):
        self.shown["predict"].append(batch[0])
        return batch[0]

    def on_fit_end(self):
        torch.save(self.shown, self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **arguments) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", num_sanity_val_steps=0, default_root_dir=folder, **quiet, **arguments)


def test_a_trainer_reads_each_epoch_in_order_and_has_nothing_to_say(tmp_path):
    data, model = Numbers(), Recorder(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run = trainer(tmp_path, devices=1, max_epochs=2)
        run.fit(model, datamodule=data)
        run.test(model, datamodule=data, verbose=False)
        run.predict(model, datamodule=data, return_predictions=False)
    assert [str(w.message) for w in warned if "LeafSpec" not in str(w.message)] == []
    train = side_by_side(Numbers().train_dataloader())[0]
    assert torch.equal(torch.cat(model.shown["train"], 1), torch.cat([train, train], 1))
    test = side_by_side(Numbers().test_dataloader())[0]
    assert torch.equal(torch.cat(model.shown["test"], 1), test)
    assert torch.equal(torch.cat(model.shown["predict"], 1), test)


# From Python 3.12 a fork of a process with threads is warned of; Lightning's ddp_fork is such a fork.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_of_a_trainer_read_what_one_does(tmp_path):
    """Lightning puts no sampler of its own in, though ``use_distributed_sampler`` is on, as it is by default."""
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", max_epochs=1)
    run.fit(Recorder(tmp_path), datamodule=Numbers(batch_size=2))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for part in ("train", "val"):
        expected = side_by_side(getattr(Numbers(batch_size=4), f"{part}_dataloader")())[0]
        assert torch.equal(torch.cat([torch.cat(shown[part], 1) for shown in ranks]), expected)

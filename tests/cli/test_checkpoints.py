"""A checkpoint that is missing, damaged, foreign or dangerous gets one clear message, and is never half believed."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel

from lightning_modules.checkpoints import CheckpointError, read_checkpoint
from tests.command_line import DIGITS, QUIET, Fitted, refused, same
from zoo import create_model


def read(path: Path) -> Any:
    """All that a checkpoint holds, or the message with which it is refused."""
    try:
        found = read_checkpoint(str(path))
    except CheckpointError as error:
        return str(error)
    return {**found, "path": None, "content": torch.load(path, weights_only=True)}


# ------------------------------------------------------------------------------------------------------------ damage


def test_every_flipped_byte_is_harmless_or_found(fitted: Fitted, tmp_path: Path) -> None:
    """Anywhere in the file: its tensors, its pickle, the names and tables of its zip archive, its padding."""
    whole, damaged = Path(fitted.best), tmp_path / "damaged.ckpt"
    good, expected = whole.read_bytes(), read(whole)
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    for position in [*rng.sample(range(len(good)), 300), *range(len(good) - 100, len(good))]:
        bad = bytearray(good)
        bad[position] ^= rng.randrange(1, 256)
        damaged.write_bytes(bad)
        found = read(damaged)
        if isinstance(found, str):
            assert found.startswith(f"{damaged} "), found
            outcomes["refused"] += 1
        else:
            assert same(found, expected), f"byte {position} of {len(good)}"
            outcomes["harmless"] += 1
    assert outcomes["refused"] > 200
    assert outcomes["harmless"] > 0


def central_directory(data: bytes) -> list[int]:
    """Where the archive's table of contents has an entry."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start, count = archive.start_dir, len(archive.infolist())
    entries = []
    for _ in range(count):
        entries.append(start)
        name, extra, comment = struct.unpack_from("<HHH", data, start + 28)
        start += 46 + name + extra + comment
    return entries


@pytest.mark.parametrize(
    ("offset", "bit", "what"),
    [(38, 0x10, "marked as a folder, which torch.load leaves unread"), (10, 0x08, "marked as compressed")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_of_contents_that_lies(fitted: Fitted, tmp_path: Path, offset: int, bit: int, what: str) -> None:
    good, damaged = Path(fitted.best).read_bytes(), tmp_path / "damaged.ckpt"
    entries = central_directory(good)
    assert len(entries) > 20
    for entry in entries:
        bad = bytearray(good)
        bad[entry + offset] ^= bit
        damaged.write_bytes(bad)
        with pytest.raises(CheckpointError, match="does not match its checksum or its kind"):
            read_checkpoint(str(damaged))


def one_weight(good: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        (tensor,) = [archive.read(name) for name in archive.namelist() if name.endswith("/data/0")]
    return good.replace(tensor, bytes([tensor[0] ^ 1]) + tensor[1:])


NOT_A_ZIP = "mine.ckpt is damaged, or not a checkpoint: File is not a zip file"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: good[: len(good) // 2], NOT_A_ZIP),
        (lambda good: good[:-1], NOT_A_ZIP),
        (lambda good: b"", NOT_A_ZIP),
        (lambda good: b"model: tanh_deq\n", NOT_A_ZIP),
        (one_weight, "mine.ckpt is damaged: its part archive/data/0 does not match its checksum or its kind"),
    ],
    ids=["half", "all but the last byte", "empty", "text", "one bit of one weight"],
)
@pytest.mark.parametrize("form", ["--ckpt_path mine.ckpt", "--ckpt_path=mine.ckpt"])
def test_the_command_line_refuses_damage(
    fitted: Fitted, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], message: str, form: str
) -> None:
    Path("mine.ckpt").write_bytes(damage(Path(fitted.best).read_bytes()))
    assert refused(capsys, "test", *form.split(), *QUIET) == message


# ----------------------------------------------------------------------------------------------------------- missing


def test_a_missing_checkpoint_names_those_that_are_near(fitted: Fitted, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(fitted.best).parent
    for form in (["--ckpt_path", f"{folder}/bst.ckpt"], [f"--ckpt_path={folder}/bst.ckpt"]):
        message = refused(capsys, "test", *form)
        assert message == f"no checkpoint at {folder}/bst.ckpt; in that folder there are: {fitted.best}, {fitted.last}"
    message = refused(capsys, "test", "--ckpt_path", str(folder))
    assert message == f"no checkpoint at {folder}; in that folder there are: {fitted.best}, {fitted.last}"


@pytest.mark.parametrize(
    ("command", "path"),
    [("fit", "none.ckpt"), ("test", "nowhere/none.ckpt"), ("predict", ".")],
)
def test_a_missing_checkpoint(command: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, command, "-c", DIGITS, f"--ckpt_path={path}")
    assert message == f"no checkpoint at {path}; there is no checkpoint in that folder"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("path", ["https://example.org/best.ckpt", "http://example.org/best.ckpt", "hf:org/name"])
def test_nothing_is_fetched(command: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning would, and would read what it fetched as a pickle that may run code."""
    Path("mine.yaml").write_text(f"ckpt_path: {path}\n")
    for typed in ([f"--ckpt_path={path}"], ["-c", "mine.yaml"]):
        message = refused(capsys, command, "-c", DIGITS, *typed)
        assert message.startswith(f"--ckpt_path takes a local file; given: {path}. Fetch it first, and give its path")


# ----------------------------------------------------------------------------------------------------------- foreign


def test_a_checkpoint_of_another_model(fitted: Fitted, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("test", "fit"):
        message = refused(capsys, command, "--ckpt_path", fitted.best, "--model.model_args.width", "9", *QUIET)
        assert message == (
            f"{fitted.best} is a checkpoint of another model than the one asked for: "
            "model.classifier.weight: (10, 8) in the checkpoint, (10, 9) in the model; "
            "model.deq.cell.linear.parametrizations.weight.original: (8, 8) in the checkpoint, (9, 9) in the model; "
            "model.injection.bias: (8,) in the checkpoint, (9,) in the model; and 1 more. "
            "Leave out --model, and the checkpoint's own model is used"
        )
    Path("no_contraction.yaml").write_text("model: {init_args: {model_args: {in_features: 64, width: 8}}}")
    message = refused(capsys, "test", "-c", DIGITS, f"--ckpt_path={fitted.best}", "-c", "no_contraction.yaml", *QUIET)
    assert "model.deq.cell.linear.weight: absent in the checkpoint, (8, 8) in the model" in message


def test_a_checkpoint_of_another_project(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = pl.Trainer(
        fast_dev_run=1, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu"
    )
    trainer.fit(BoringModel())
    trainer.save_checkpoint("boring.ckpt", weights_only=False)
    capsys.readouterr()
    message = refused(capsys, "test", "--ckpt_path", "boring.ckpt")
    assert message.startswith("boring.ckpt is not a checkpoint of this zoo: it has no deq_zoo_classes; it holds ")
    assert "state_dict" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: create_model("tanh_deq").state_dict(),
            "mine.ckpt is not a checkpoint of this zoo: it has no state_dict; it holds",
        ),
        (lambda: torch.zeros(3), "mine.ckpt holds a Tensor, not a Lightning checkpoint"),
        (lambda: [1, 2], "mine.ckpt holds a list, not a Lightning checkpoint"),
    ],
    ids=["weights", "tensor", "list"],
)
def test_files_that_torch_wrote(content: Callable[[], Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content(), "mine.ckpt")
    assert refused(capsys, "test", "--ckpt_path", "mine.ckpt").startswith(message)


# --------------------------------------------------------------------------------------------------------- dangerous


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("where", ["alone", "in a checkpoint"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_a_pickle_is_not_executed(fitted: Fitted, where: str, zipped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    content: Any = Malicious()
    if where == "in a checkpoint":
        content = {**torch.load(fitted.best, weights_only=True), "more": Malicious()}
    torch.save(content, "mine.ckpt", _use_new_zipfile_serialization=zipped)
    Path("mine.yaml").write_text("ckpt_path: mine.ckpt\n")
    for typed in (
        ["test", "--ckpt_path", "mine.ckpt"],
        ["fit", "--ckpt_path=mine.ckpt", "--trainer.fast_dev_run", "1"],
        ["validate", "--ckpt_path", "mine.ckpt"],
        ["predict", "--ckpt_path", "mine.ckpt"],
        ["test", "-c", DIGITS, "-c", "mine.yaml"],
    ):
        message = refused(capsys, *typed)
        assert message.startswith(
            "mine.ckpt holds more than tensors and plain data, so loading it could run code, and it was refused; "
            "nothing was loaded. It asks for posix.mkdir. "
        )
    assert not Path("executed").exists()
    torch.load("mine.ckpt", weights_only=False)
    assert Path("executed").is_dir()


def test_a_module_that_needs_pickle(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(create_model("tanh_deq"), "module.ckpt")
    message = refused(capsys, "test", "--ckpt_path", "module.ckpt")
    assert message.startswith("module.ckpt holds more than tensors and plain data, so loading it could run code")

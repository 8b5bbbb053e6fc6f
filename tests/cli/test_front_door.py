"""What a newcomer runs into at the front door: each ends in one sentence, none in the insides."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
import zoo
from lightning_modules import ImageClassifier
from tests.command_line import DIGITS, QUIET, TINY, Fitted, fit, refused
from tests.toy_weights import publish


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_installed_command_succeeds_with_status_0(fitted: Fitted) -> None:
    """A console script ends with ``sys.exit(console())``."""
    script = "import sys; from cli import console; sys.argv[0] = 'deq-zoo'; sys.exit(console())"
    arguments = ["test", *QUIET, "--ckpt_path", str(Path(fitted.best).resolve())]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ZooCLI object" not in done.stdout + done.stderr


@pytest.mark.parametrize("word", ["best", "last"])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_lightnings_words_name_no_file(command: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, command, "-c", DIGITS, *QUIET, "--ckpt_path", word)
    assert message == "--ckpt_path takes a file, since every run has a folder of its own; there is none under runs"
    Path("runs").mkdir()
    Path("runs", "some.ckpt").touch()
    assert "the newest are runs/some.ckpt" in refused(capsys, command, "-c", DIGITS, "--ckpt_path", word)


@pytest.mark.parametrize("number", [5, 12])
def test_data_of_another_number_of_classes(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit", "-c", DIGITS, *TINY, "--model.num_classes", str(number))
    assert message == (
        f"the data have 10 classes, and the model was asked for {number}: "
        "give it num_classes=10 (--model.num_classes 10)"
    )


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (
            "in_features 63",
            "a batch of inputs of 63 entries (in_features); given: shape (64, 1, 8, 8), that is 64",
        ),
        ("in_features 0", "TanhDEQ(in_features=...) takes an integer >= 1; given: 0"),
        ("width 0", "TanhDEQ(width=...) takes an integer >= 1; given: 0"),
        ("std 0.0", "TanhDEQ(std=...) takes a number > 0; given: 0.0"),
    ],
)
def test_a_model_that_cannot_take_the_data(typed: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    key, value = typed.split()
    assert expected in refused(capsys, "fit", "-c", DIGITS, *TINY, f"--model.model_args.{key}", value)


def test_a_damaged_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    raw = Path("data", "MNIST", "raw")
    raw.mkdir(parents=True)
    for part, N in (("train", 24), ("t10k", 10)):
        Path(raw, f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4B3i", 0, 0, 8, 3, N, 28, 28) + bytes(N * 784))
        Path(raw, f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, N) + bytes(N))
    broken = raw / "train-images-idx3-ubyte"
    broken.write_bytes(broken.read_bytes()[:-1])
    arguments = ("--data", "MNISTDataModule", "--model.model_args.in_features", "784")
    message = refused(capsys, "fit", "-c", DIGITS, *TINY, *arguments)
    assert f"{broken} is corrupt: it announces 24 items of shape (28, 28)" in message


def test_a_fine_tuned_checkpoint_does_not_need_what_it_started_from(weights_folder: Path) -> None:
    publish(width=6)
    pretrained = ("--model.pretrained", "tanh_deq.toy", "--model.model_args", "{}", "--model.solver", "Newton")
    done = fit("-c", DIGITS, *TINY[:-2], *pretrained)
    for file in weights_folder.iterdir():
        file.unlink()
    zoo.records.all_records.cache_clear()
    module = ImageClassifier.load_from_checkpoint(done.best, weights_only=True)
    assert module.hparams["pretrained"] is None
    assert module.hparams["model_args"]["width"] == 6
    assert torch.equal(module.model.injection.weight, torch.load(done.best)["state_dict"]["model.injection.weight"])
    assert cli.main(["test", *QUIET, "--ckpt_path", done.best]) is not None

"""``cli.main`` in this process: small runs, what they said, and what they refused."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cli
from commands.training import ZooCLI

ROOT = Path(__file__).resolve().parents[1]
DIGITS = str(ROOT / "configs" / "tanh_deq_digits.yaml")

QUIET = (
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
)
TINY = (
    *QUIET,
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.log_every_n_steps", "1", "--model.model_args.width", "8"),
)
"""What makes the default recipe a matter of a second."""

# What TINY says again for fit --ckpt_path, where the checkpoint knows its own width.
RESUME = TINY[: TINY.index("--model.model_args.width")]


@dataclass(frozen=True)
class Fitted:
    """A finished ``fit``."""

    cli: ZooCLI
    folder: Path
    output: str

    @property
    def best(self) -> str:
        return str(self.folder / "checkpoints" / "best.ckpt")

    @property
    def last(self) -> str:
        return str(self.folder / "checkpoints" / "last.ckpt")


def main(*args: str) -> ZooCLI:
    done = cli.main(list(args))
    assert done is not None
    return done


def fit(*args: str) -> Fitted:
    """A fit in the working directory."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        done = main("fit", *args)
    callback = done.trainer.checkpoint_callback
    assert callback is not None
    return Fitted(done, Path(callback.best_model_path).absolute().parents[1], output.getvalue())


def metrics(done: ZooCLI) -> dict[str, float]:
    """What the trainer measured last."""
    return {name: value.item() for name, value in done.trainer.callback_metrics.items()}


def rows(file: Path, **where: str) -> list[dict[str, str]]:
    """The rows of a CSV file in which these columns have these values."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [row for row in csv.DictReader(lines) if all(row[key] == value for key, value in where.items())]


def weights(path: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def same(a: Any, b: Any) -> bool:
    """Equal bit by bit, whatever is nested in whatever."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message with which the command line refuses ``args``: exit code 2, one message, no traceback."""
    capsys.readouterr()
    argv = list(sys.argv)
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(args))
    assert exit_.value.code == 2
    assert sys.argv == argv
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    return printed.err.removeprefix("error: ").rstrip("\n")


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What Lightning's ``rank_zero_info`` says within this context."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, listener = logging.getLogger("pytorch_lightning.utilities.rank_zero"), Listener()
    logger.addHandler(listener)
    try:
        yield messages
    finally:
        logger.removeHandler(listener)

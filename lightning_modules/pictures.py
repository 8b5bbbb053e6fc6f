"""Pictures and texts of a run, to whichever loggers it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from torch import Tensor

from .png import write_png
from .run_folder import run_dir


def real_loggers(trainer: pl.Trainer) -> list[Logger]:
    """The loggers of the run, in every process, but for the one that Lightning puts in place of what it has not."""
    return [logger for logger in trainer.loggers if not isinstance(logger, DummyLogger)]


def log_picture(trainer: pl.Trainer, name: str, image: Tensor) -> None:
    """Give a picture to every logger of the run that takes any, as that of this step.

    Weights & Biases takes it as ``log_image``, TensorBoard as ``add_image``. Where there are only others, as CSVLogger
    is, it is the file ``pictures/<name>_<step>.png`` in the run's folder. Without a logger, or where the first one has
    no folder, there is none. Only the first process writes.

    Args:
        trainer: of the run.
        name: like ``"val/flow"``; ``/`` is ``_`` in the name of the file.
        image: uint8 ``(3, H, W)``.
    """
    step, image = trainer.global_step, image.cpu()
    _give(
        trainer,
        {
            "log_image": lambda log_image: log_image(name, [image.permute(1, 2, 0).numpy()], step=step),
            "experiment.add_image": lambda add_image: add_image(name, image, step),
        },
        Path("pictures", f"{name.replace('/', '_')}_{step:06d}.png"),
        lambda path: write_png(path, image),
    )


def log_text(trainer: pl.Trainer, name: str, text: str) -> None:
    """Give a text to every logger of the run that takes any, as :func:`log_picture` does with a picture.

    Weights & Biases takes it as ``log_text``, a table of one row, TensorBoard as ``add_text``. Where there are only
    others it is the file ``samples/<name>_<step>.txt`` in the run's folder.

    Args:
        trainer: of the run.
        name: like ``"val/samples"``; ``/`` is ``_`` in the name of the file.
        text: of any number of lines.
    """
    step = trainer.global_step
    # TensorBoard reads Markdown, in which lines that are set off by four spaces stay as they are.
    indented = "\n".join(f"    {line}" for line in text.split("\n"))
    _give(
        trainer,
        {
            "log_text": lambda log_text: log_text(name, columns=["text"], data=[[text]], step=step),
            "experiment.add_text": lambda add_text: add_text(name, indented, step),
        },
        Path("samples", f"{name.replace('/', '_')}_{step:06d}.txt"),
        lambda path: path.write_text(text + "\n", encoding="utf-8"),
    )


def _give(
    trainer: pl.Trainer,
    ways: Mapping[str, Callable[[Callable[..., Any]], Any]],
    file: Path,
    write: Callable[[Path], Any],
) -> None:
    """By the first of these methods that a logger has, for each logger; to a file where none has any."""
    if not (trainer.is_global_zero and (loggers := real_loggers(trainer))):
        return
    taken = False
    for logger in loggers:
        for method, give in ways.items():
            try:
                found = attrgetter(method)(logger)
            except AttributeError:
                continue
            give(found)
            taken = True
            break
    if not taken and loggers[0].save_dir is not None:
        path = run_dir(trainer) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)

"""Pictures of a run, to whichever logger it has."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor

from .callbacks import run_dir
from .png import write_png


def log_picture(trainer: pl.Trainer, name: str, image: Tensor) -> None:
    """Give a picture to every logger of the run that takes any, as that of this step.

    Weights & Biases takes it as ``log_image``, TensorBoard as ``add_image``. Where there are only others, as CSVLogger
    is, it is the file ``pictures/<name>_<step>.png`` in the run's folder. Without a logger there is none.

    Args:
        trainer: of the run.
        name: like ``"val/flow"``; ``/`` is ``_`` in the name of the file.
        image: uint8 ``(3, H, W)``.
    """
    loggers = [logger for logger in trainer.loggers if not isinstance(logger, DummyLogger)]
    if not (trainer.is_global_zero and loggers):
        return
    step, taken, image = trainer.global_step, False, image.cpu()
    for logger in loggers:
        if callable(log_image := getattr(logger, "log_image", None)):
            log_image(name, [image.permute(1, 2, 0).numpy()], step=step)
        elif callable(add_image := getattr(getattr(logger, "experiment", None), "add_image", None)):
            add_image(name, image, step)
        else:
            continue
        taken = True
    if not taken:
        folder = run_dir(trainer) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{name.replace('/', '_')}_{step:06d}.png", image)

"""Pictures go to the logger that takes them, and else to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from torch import Tensor

from lightning_modules.pictures import log_picture
from tests.lightning_modules.runs import Steps, trainer

PICTURE = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Board(Steps):
    """A logger with an experiment as TensorBoard's."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[tuple[str, Tensor, int]] = []
        self.experiment = self

    def add_image(self, tag: str, img_tensor: Tensor, global_step: int) -> None:
        self.added.append((tag, img_tensor, global_step))


def test_without_a_logger_for_pictures_it_is_a_file(tmp_path: Path) -> None:
    run = trainer(logger=CSVLogger(tmp_path, name="mine", version=3))
    log_picture(run, "val/flow", PICTURE)
    with Image.open(tmp_path / "mine" / "version_3" / "pictures" / "val_flow_000000.png") as png:
        assert np.array_equal(np.asarray(png), PICTURE.permute(1, 2, 0).numpy())


def test_tensorboard_takes_it(tmp_path: Path) -> None:
    """And then it is no file, also beside a logger that takes none."""
    board = Board()
    run = trainer(logger=[CSVLogger(tmp_path), board], default_root_dir=tmp_path)
    log_picture(run, "val/flow", PICTURE)
    ((tag, image, step),) = board.added
    assert (tag, step) == ("val/flow", 0)
    assert torch.equal(image, PICTURE)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("arguments", [{"logger": False}, {"logger": CSVLogger("."), "fast_dev_run": True}])
def test_without_a_logger_there_is_none(tmp_path: Path, arguments: Any) -> None:
    log_picture(trainer(default_root_dir=tmp_path, **arguments), "val/flow", PICTURE)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_takes_it_offline(tmp_path: Path) -> None:
    logger = WandbLogger(project="deq-zoo", save_dir=tmp_path / "runs", offline=True)
    log_picture(trainer(logger=logger), "val/flow", PICTURE)
    wandb.finish()
    (file,) = (tmp_path / "runs" / "wandb").rglob("*.png")
    assert "val" in str(file.relative_to(tmp_path / "runs"))
    with Image.open(file) as png:
        assert np.array_equal(np.asarray(png), PICTURE.permute(1, 2, 0).numpy())

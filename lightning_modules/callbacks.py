"""Callbacks of the command line: nothing is lost when a run stops, and predictions are written."""

from __future__ import annotations

import csv
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter, Callback
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor


def run_dir(trainer: pl.Trainer) -> Path:
    """The folder of this run alone: ``<save_dir>/<name>/<version>`` of the logger, as ModelCheckpoint has it."""
    logger = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir, str(logger.name), version)


class InterruptCheckpoint(Callback):
    """Writes a checkpoint when training is interrupted or fails, and says where it is and how to go on."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write ``interrupted.ckpt`` beside the other checkpoints, if training had begun."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step == 0:
            return
        folder = run_dir(trainer)
        path = folder / "checkpoints" / "interrupted.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        # The checkpoint knows the model and the data; the number of epochs, the logger and the rest are in this file.
        config = f"-c {folder / 'config.yaml'} " if (folder / "config.yaml").is_file() else ""
        rank_zero_info(
            f"Stopped at step {trainer.global_step} by {type(exception).__name__}. The state is saved in {path}\n"
            f"To go on:    python cli.py fit {config}--ckpt_path {path}\n"
            f"To test it:  python cli.py test --ckpt_path {path}"
        )


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returned to the run's folder: a dict, each entry with one row a sample.

    Numbers, tensors ``(B,)``, go to ``predictions.csv``. Label maps, uint8 ``(B, H, W)``, go to PNG files whose grey
    values are the classes, ``<name>/<index>.png``, and the CSV file has their paths. Under several processes each
    writes its own table, ``predictions.<rank>.csv``; the column ``index`` is the sample's position in the data set, or
    in what this process read where the data are no set of samples, as text is none.

    Raises:
        ValueError: an entry is neither of the two.
    """

    def __init__(self, write_interval: Literal["epoch"] = "epoch") -> None:
        super().__init__(write_interval)

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write one row a sample."""
        folder = run_dir(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions.{trainer.global_rank}.csv"
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            rows = 0
            for number, batch in enumerate(predictions):
                size = len(next(iter(batch.values())))
                indices = batch_indices[0][number] if batch_indices[0] else range(rows, rows + size)
                columns = {key: _column(folder, key, value, indices) for key, value in batch.items()}
                if rows == 0:
                    writer.writerow(["index", *columns])
                writer.writerows(zip(indices, *columns.values(), strict=True))
                rows += len(indices)
        rank_zero_info(f"Wrote {rows} predictions to {folder / name}")


def _column(folder: Path, name: str, value: Tensor, indices: Sequence[int]) -> list[Any]:
    """One entry of a batch of predictions as the table has it; maps are written to files."""
    if value.dim() == 1:
        return value.tolist()
    if value.dim() != 3 or value.dtype != torch.uint8:
        raise ValueError(
            f"predictions are numbers, one a sample, or label maps, uint8 (B, H, W); given: {name!r} of dtype "
            f"{value.dtype} and shape {tuple(value.shape)}. Write it with a BasePredictionWriter of your own"
        )
    (folder / name).mkdir(exist_ok=True)
    paths = [f"{name}/{index:06d}.png" for index in indices]
    for path, label_map in zip(paths, value, strict=True):
        write_png(folder / path, label_map)
    return paths


def write_png(path: Path, image: Tensor) -> None:
    """A grey image, uint8 ``(H, W)``, as a PNG file (ISO/IEC 15948), lossless."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    H, W = image.shape
    header = struct.pack(">IIBBBBB", W, H, 8, 0, 0, 0, 0)  # 8 bits, grey, not interlaced
    rows = torch.cat([image.new_zeros(H, 1), image], dim=1).cpu()  # each begins with its filter: 0, none
    data = zlib.compress(rows.numpy().tobytes())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))

"""Predictions are written to files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from .flow_files import colour_picture, longest, write_flo, write_kitti
from .png import write_png
from .run_folder import run_dir


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returned to the run's folder: a dict, each entry with one row a sample.

    Numbers, tensors ``(B,)``, go to ``predictions.csv``. Maps go to files, and the table has their paths:

    - label maps, uint8 ``(B, H, W)``: PNG files whose grey values are the classes, ``<name>/<index>.png``.
    - optical flow, floating ``(B, 2, H, W)``, in pixels: ``<name>/<index>.flo``, or with ``flow_format="kitti"`` a PNG
      file of 16 bits, and a picture of it, ``<name>_picture/<index>.png``, on a scale that ends at its longest vector,
      whose length is in the column ``<name>_longest``.

    Where the data module has ``names``, one a sample, files are called by them, and they are in the column ``name``.
    Under several processes each writes its own table, ``predictions.<rank>.csv``; the column ``index`` is the sample's
    position in the data set, or in what this process read where the data are no set of samples, as text is none.

    Each batch is written as it comes: with ``Trainer.predict(return_predictions=False)`` none is kept in memory.

    Args:
        flow_format: ``"flo"``, Middlebury's, or ``"kitti"``, which has no room for motions of more than 511 pixels.

    Raises:
        ValueError: an entry is none of these, or names occur twice.
    """

    def __init__(self, flow_format: Literal["flo", "kitti"] = "flo") -> None:
        super().__init__("batch")
        if flow_format not in ("flo", "kitti"):
            raise ValueError(f"flow_format takes 'flo' or 'kitti'; given: {flow_format!r}")
        self.flow_format = flow_format
        self._rows = 0
        self._names: Sequence[str] | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new table."""
        data: pl.LightningDataModule | None = getattr(trainer, "datamodule", None)
        names = getattr(data, "names", None)
        if names is not None and len(set(names)) < len(names):
            raise ValueError("files of predictions are called by the names of the data, and some of these occur twice")
        self._rows, self._names = 0, names
        table = self._table(trainer)
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one row a sample."""
        size = len(next(iter(prediction.values())))
        indices = batch_indices or range(self._rows, self._rows + size)
        names = self._names
        files = [f"{index:06d}" if names is None else names[index] for index in indices]
        columns: dict[str, Sequence[Any]] = {"index": indices} if names is None else {"index": indices, "name": files}
        for key, value in prediction.items():
            columns.update(self._columns(run_dir(trainer), key, value, files))
        with self._table(trainer).open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if batch_idx == 0:
                writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        self._rows += size

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was written."""
        rank_zero_info(f"Wrote {self._rows} predictions to {self._table(trainer)}")

    def _columns(self, folder: Path, name: str, value: Tensor, files: Sequence[str]) -> dict[str, list[Any]]:
        """What the table has of one entry of a batch; maps are written to files."""
        if value.dim() == 1:
            return {name: value.tolist()}
        if value.dim() == 3 and value.dtype == torch.uint8:
            return {name: _written(folder, name, ".png", files, value, write_png)}
        if value.dim() == 4 and value.shape[1] == 2 and value.is_floating_point():
            suffix, write = (".flo", write_flo) if self.flow_format == "flo" else (".png", write_kitti)
            pictures = [colour_picture(flow) for flow in value]
            return {
                name: _written(folder, name, suffix, files, value, write),
                f"{name}_picture": _written(folder, f"{name}_picture", ".png", files, pictures, write_png),
                f"{name}_longest": [float(longest(flow)) for flow in value],
            }
        raise ValueError(
            f"predictions are numbers, one a sample, optical flow, floating (B, 2, H, W), or label maps, uint8 "
            f"(B, H, W); given: {name!r} of dtype {value.dtype} and shape {tuple(value.shape)}. Write it with a "
            "BasePredictionWriter of your own"
        )

    @staticmethod
    def _table(trainer: pl.Trainer) -> Path:
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions.{trainer.global_rank}.csv"
        return run_dir(trainer) / name


def _written(
    folder: Path, name: str, suffix: str, files: Sequence[str], maps: Iterable[Tensor], write: Callable[..., None]
) -> list[str]:
    """The paths, from the folder, to which these maps were written."""
    paths = [f"{name}/{file}{suffix}" for file in files]
    for path, each in zip(paths, maps, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write(folder / path, each)
    return paths

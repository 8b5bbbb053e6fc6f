"""A run that goes on in its own folder: the same checkpoint for all processes, and one log from its beginning on."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_info

from .checkpoints import CheckpointError
from .safe_checkpoints import replacing


class ContinuedRun(Callback):
    """Sees that all processes go on from the same checkpoint, or all start afresh, and that the log goes on there.

    ``metrics.csv`` of a CSVLogger keeps what was logged before the checkpoint; what was logged after it is logged
    again.

    Args:
        path: of the checkpoint that this process found; None if it found none.
        step: of the checkpoint.

    Raises:
        CheckpointError: another process found another one.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        self.step = step
        self._logs: list[ContinuedMetrics] = []
        self._trained = False

    def take_up_logs(self, trainer: pl.Trainer) -> None:
        """Before the trainer's loggers are used: Lightning's would remove the files that they find."""
        for logger in trainer.loggers:
            if type(logger) is CSVLogger and self.path is not None and trainer.is_global_zero:
                self._logs.append(ContinuedMetrics(logger.log_dir))
                logger._experiment = self._logs[-1]  # noqa: SLF001 - the logger makes one only where it has none

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare, then drop from the log what will come again."""
        if stage != "fit":
            return
        own = "no checkpoint" if self.path is None else f"{self.path} (step {self.step})"
        first: str = trainer.strategy.broadcast(own)
        if not trainer.strategy.reduce_boolean_decision(own == first, all=True):
            raise CheckpointError(
                f"--resume auto found {first} in the first process, and not the same in all the others; this is "
                f"process {trainer.global_rank}, which found {own}. They all read the checkpoint, so that the folder "
                "of the run has to be on a disk that all machines share, under the same path"
            )
        for log in self._logs:
            log.keep_before(self.step)

    def on_train_batch_start(self, *args: Any) -> None:
        """There was something left to do."""
        self._trained = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if there was not."""
        if self.path is not None and not self._trained:
            rank_zero_info(
                f"This run was finished already: nothing is left to train after step {self.step}. To train it longer, "
                "give more --trainer.max_epochs or --trainer.max_steps"
            )


class ContinuedMetrics(ExperimentWriter):
    """Writes on in the ``metrics.csv`` that is there; one that is killed or interrupted leaves whole rows behind.

    Lightning's empties the file to write it anew whenever something is logged that has no column yet.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._header = next(self._lines(), [])
        self.metrics_keys = list(self._header)

    def keep_before(self, step: int) -> None:
        """Drop the rows of this step and of later ones, and what a kill left of a row."""
        lines = self._lines()
        header = next(lines, None)
        if header is None:
            return
        kept = [line for line in lines if len(line) == len(header) and int(line[header.index("step")]) < step]
        self._replace([header, *kept])

    def save(self) -> None:
        """Write what was logged since the last time."""
        if not self.metrics:
            return
        self._record_new_keys()
        rows = [[metrics.get(name, "") for name in self.metrics_keys] for metrics in self.metrics]
        if self._header == self.metrics_keys:
            self._append(rows)
        else:
            lines = self._lines()
            header = next(lines, [])
            before = (dict(zip(header, line, strict=True)) for line in lines)
            moved = [[row.get(name, "") for name in self.metrics_keys] for row in before]
            self._replace([self.metrics_keys, *moved, *rows])
        self.metrics, self._header = [], list(self.metrics_keys)

    def _check_log_dir_exists(self) -> None:
        """Lightning's removes the file."""

    def _lines(self) -> Iterator[list[str]]:
        """The whole ones of the file, the header first."""
        path = Path(self.metrics_file_path)
        text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
        yield from csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))

    def _append(self, lines: Iterable[list[Any]]) -> None:
        with Path(self.metrics_file_path).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)

    def _replace(self, lines: Iterable[list[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        with replacing(Path(self.metrics_file_path)) as file:
            file.write(text.getvalue().encode("utf-8"))

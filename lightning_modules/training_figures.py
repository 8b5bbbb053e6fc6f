"""What each logged training step has besides its loss: the learning rate, and how fast training goes."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils import _pytree as pytree

from zoo.implicit import DEQ


class LearningRate(Callback):
    """Logs ``train/lr``, the rate with which the step is made; of further parameter groups ``train/lr_1`` and so on."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Before the schedule goes on, which it does before the batch ends."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for i, group in enumerate(groups):
            pl_module.log(f"train/lr_{i}" if i else "train/lr", _number(group["lr"]))


class Throughput(Callback):
    """Logs how fast training goes since the last step that was logged.

    - ``train/samples_per_second``: rows of the batches of all processes, each taken to have as many as this one:
      images, pairs or sequences of frames, segments of text.
    - ``train/evaluations_per_second``: how often the cells are evaluated, each time on the whole batch of this process.
      Counted are the evaluations of forward solves, or the applications of an unrolled cell, and the products with the
      transposed Jacobian of the last adjoint solve of each layer, as their reports tell them. Not counted are what a
      gradient records on top, and the Jacobian penalty. A model without an equilibrium has none.

    The time is all that passes: waiting for data, optimizer and callbacks too, but for validation, which is left out.
    The first window begins when training does, or goes on. Nothing waits for the device: as every solve looks at its
    residuals on the host, the clock is never far ahead of it.
    """

    def __init__(self) -> None:
        self._layers: list[DEQ] = []
        self._reports: list[object] = []
        self._since = self._stopped = 0.0
        self._samples = self._evaluations = self._steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._layers = [module for module in pl_module.modules() if isinstance(module, DEQ)]
        self._reports = self._reports_now()
        self._begin(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._stopped = perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it run on. The solves of validation are not those of training."""
        self._since += perf_counter() - self._stopped
        self._reports = self._reports_now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log both, and begin a new window where they are written."""
        self._samples += _rows(batch) * trainer.world_size
        self._evaluations += self._new_evaluations()
        seconds = max(perf_counter() - self._since, 1e-9)
        pl_module.log("train/samples_per_second", _number(self._samples / seconds))
        if self._layers:
            pl_module.log("train/evaluations_per_second", _number(self._evaluations / seconds))
        step_was_made = trainer.global_step > self._steps  # not where gradients are accumulated
        if step_was_made and trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self._since = perf_counter()
        self._samples = self._evaluations = 0
        self._steps = trainer.global_step

    def _new_evaluations(self) -> int:
        """Those of the reports that were not there before."""
        before, self._reports = self._reports, self._reports_now()
        pairs = zip(before, self._reports, strict=True)
        return sum(now.evaluations for was, now in pairs if now is not None and now is not was)  # type: ignore[attr-defined]

    def _reports_now(self) -> list[object]:
        return [report for layer in self._layers for report in (layer.report, layer.adjoint_report)]


def _number(value: float | Tensor) -> Tensor:
    """On the host, where it is: logged as a float, Lightning would copy it to the device, and wait for that."""
    return torch.as_tensor(value, dtype=torch.float64)


def _rows(batch: Any) -> int:
    """The size of the first dimension of the first tensor in it; 0 where there is none."""
    return next((len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.dim() > 0), 0)

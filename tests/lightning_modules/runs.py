"""Small modules and short runs of them, in a script's way: a plain Trainer, four batches an epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import ImageClassifier


class Rates(pl.Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Steps(Logger):
    """What each training step logged."""

    name, version = "steps", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nowhere."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.logged.append(metrics)


def small(**arguments: Any) -> ImageClassifier:
    """The same small module each time, but for ``arguments``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageClassifier(**{"model_args": {"width": 6, "contraction": 0.9}, **arguments})


def batches(count: int = 4, size: int = 20) -> DataLoader[Any]:
    """The same batches each time."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(count * size, 1, 8, 8, generator=generator), torch.arange(count * size) % 10
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **arguments}, callbacks=list(callbacks))


def train(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    loader: Any = None,
    ckpt_path: Any = None,
    **arguments: Any,
) -> pl.Trainer:
    """Four steps an epoch."""
    run = trainer(*callbacks, **{"log_every_n_steps": 1, "num_sanity_val_steps": 0, **arguments})
    loader = batches() if loader is None else loader
    run.fit(module, loader, loader, ckpt_path=ckpt_path)
    return run


def trained(**arguments: Any) -> tuple[ImageClassifier, list[dict[str, float]]]:
    """A small module after four steps, and what they logged."""
    module, steps = small(**arguments), Steps()
    train(module, logger=steps)
    return module, steps.logged


def parameters(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients(module: Any, batch: Any) -> dict[str, Tensor]:
    """Those of one training step without a trainer; its loss stands under ``"loss"``."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in module.named_parameters()}}

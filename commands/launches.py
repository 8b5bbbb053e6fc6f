"""Processes that torchrun or SLURM started, and the Trainer's own idea of how many there are."""

from __future__ import annotations

import os

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lightning_modules.usage_errors import UsageError


def refuse_other_counts(trainer: pl.Trainer) -> None:
    """Raise where there are more or fewer processes than the Trainer was told.

    Lightning would let each of several that know of no other train by itself, in the same folder.

    Raises:
        UsageError: in the first process.
        SystemExit: in the others: the message is the same.
    """
    there = _started()
    asked = trainer.num_nodes * trainer.num_devices
    if there is None or there == asked:
        return
    if os.environ["RANK"] != "0":
        raise SystemExit(2)
    nodes = there // int(os.environ["LOCAL_WORLD_SIZE"])
    raise UsageError(
        f"torchrun started {there} processes, and the trainer was told of {trainer.num_nodes} node(s) with "
        f"{trainer.num_devices} device(s) each. Give it the same numbers as torchrun: --trainer.num_nodes {nodes} "
        f"--trainer.devices {there // nodes} --trainer.strategy ddp"
    )


def _started() -> int | None:
    """How many processes torchrun started; None if it did not."""
    return int(os.environ["WORLD_SIZE"]) if TorchElasticEnvironment.detect() else None

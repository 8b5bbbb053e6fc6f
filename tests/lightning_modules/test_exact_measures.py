"""What two processes measure in validation and test is what one measures, to rounding, though they have not as much.

Five samples in batches of one or two: the processes have other numbers of samples, and of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import TensorDataset

from datamodules.base import SplitDataModule, Splits
from lightning_modules import EquilibriumModule, PredictionWriter, SemanticSegmenter
from tests.command_line import rows
from tests.lightning_modules import flows, runs, texts
from zoo.implicit import FixedPointIteration

# From Python 3.12 a fork of a process with threads is warned of; Lightning's ddp_fork is such a fork.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Fixed(SplitDataModule[TensorDataset]):
    """The same samples for each part, in batches of so many."""

    def __init__(self, samples: TensorDataset, batch_size: int) -> None:
        super().__init__(batch_size)
        self.samples = samples

    def load(self) -> Splits[TensorDataset]:
        return Splits(self.samples, self.samples, self.samples)


def classes() -> tuple[EquilibriumModule, TensorDataset]:
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return runs.small(), TensorDataset(images, torch.tensor([0, 3, 3, 7, 9]))


def pixels(weights: list[float] | None) -> tuple[EquilibriumModule, TensorDataset]:
    """A third of the pixels does not count, nor does any of the last image."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(5, 1, 8, 8, generator=generator), torch.randint(11, (5, 8, 8), generator=generator)
    labels[torch.rand(5, 8, 8, generator=generator) < 0.3] = 255
    labels[-1] = 255
    torch.manual_seed(0)
    sizes = {"channels": (8, 8), "expansion": 1}
    solver = FixedPointIteration(max_steps=5)
    module = SemanticSegmenter("mdeq_nano_scenes", 11, sizes, solver=solver, class_weights=weights)
    module.model.deq.on_failure = "ignore"
    return module, TensorDataset(images, labels)


def flow() -> tuple[EquilibriumModule, TensorDataset]:
    return flows.small(), flows.pairs(5)


TASKS = [
    pytest.param(classes, id="classes"),
    pytest.param(lambda: pixels(None), id="pixels"),
    pytest.param(lambda: pixels([0.1, *[1.0] * 9, 5.0]), id="weighted pixels"),
    pytest.param(flow, id="flow"),
]


class Keep(pl.Callback):
    """Each process writes what it measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
        torch.save(measured, self.folder / f"{trainer.global_rank}.pt")

    on_test_end = on_validation_end


def measured(
    processes: int, stage: str, module: EquilibriumModule, data: pl.LightningDataModule, folder: Path
) -> list[dict[str, float]]:
    """What each process measured, but for the spectral radius, which is of the first samples of each."""
    devices = {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {"devices": 1}
    trainer = runs.trainer(Keep(folder), **devices)
    {"val": trainer.validate, "test": trainer.test}[stage](module, datamodule=data, verbose=False)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    return [{name: value for name, value in each.items() if "spectral" not in name} for each in found]


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("make", TASKS)
def test_two_processes_measure_what_one_does(
    make: Callable[[], tuple[EquilibriumModule, TensorDataset]], batch_size: int, stage: str, tmp_path: Path
) -> None:
    module, samples = make()
    (alone,) = measured(1, stage, module, Fixed(samples, 5), tmp_path)
    assert f"{stage}/loss" in alone
    for each in measured(2, stage, make()[0], Fixed(samples, batch_size), tmp_path):
        assert each == pytest.approx(alone, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_two_processes_read_what_one_does(stage: str, tmp_path: Path) -> None:
    """Three streams, of which one process has two."""
    (alone,) = measured(1, stage, texts.small(), texts.texts(), tmp_path)
    assert {f"{stage}/{name}" for name in ("loss", "perplexity", "bits_per_byte")} < set(alone)
    for each in measured(2, stage, texts.small(), texts.texts(), tmp_path):
        assert each == pytest.approx(alone, rel=2e-5, abs=1e-6)


def test_whole_numbers_of_samples_are_not_halved_as_such(tmp_path: Path) -> None:
    """Lightning 2.6 takes the mean over processes of their numbers of samples as a whole number: 5 would become 4."""
    module, samples = classes()
    found = measured(2, "val", module, Fixed(samples, 2), tmp_path)
    assert {each["val/converged"] for each in found} == {1.0}


def test_a_predicted_sample_keeps_its_index(tmp_path: Path) -> None:
    """Of five, in batches of two: the first process has the even ones."""
    module, samples = classes()
    folder = tmp_path / "predictions"
    trainer = runs.trainer(PredictionWriter(), devices=2, strategy="ddp_fork", default_root_dir=folder)
    trainer.predict(module, datamodule=Fixed(samples, 2), return_predictions=False)
    found = [rows(folder / f"predictions.{rank}.csv") for rank in range(2)]
    assert [[(row["index"], row["label"]) for row in part] for part in found] == [
        [("0", "0"), ("2", "3"), ("4", "9")], [("1", "3"), ("3", "7")]
    ]  # fmt: skip


def test_more_processes_than_samples_to_test(tmp_path: Path) -> None:
    module, samples = classes()
    data = Fixed(TensorDataset(*(tensor[:1] for tensor in samples.tensors)), 2)
    with pytest.raises(ProcessRaisedException, match="the test set has 1 samples, fewer than the 2 processes"):
        runs.trainer(devices=2, strategy="ddp_fork").test(module, datamodule=data, verbose=False)

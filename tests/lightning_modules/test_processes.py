"""Two processes train one model: the ranks stay equal, and equal to one process on the joint batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_modules import ImageClassifier, LanguageModel, PredictionWriter
from tests.command_line import rows, same
from tests.lightning_modules import flows, texts
from zoo.implicit import Anderson, ImplicitGradient

# From Python 3.12 a fork of a process with threads is warned of; Lightning's ddp_fork is such a fork.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

STEPS, BATCH = 4, 16


class KeepWeights(pl.Callback):
    """Each rank writes its weights to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        torch.save(module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")


class Data(pl.LightningDataModule):
    """The same samples in the same order each time; two processes take turns, so that their batches are one's."""

    def __init__(self, count: int) -> None:
        super().__init__()
        images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.samples = TensorDataset(images, torch.arange(count) % 10)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def _loader(self) -> DataLoader[Any]:
        processes = self.trainer.world_size
        sampler = DistributedSampler(self.samples, processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(self.samples, batch_size=BATCH // processes, sampler=sampler)


def module(**arguments: Any) -> ImageClassifier:
    torch.manual_seed(0)
    exact = Anderson(tol=1e-6)
    choices = {"solver": exact, "gradient": ImplicitGradient(exact), "schedule": "constant", "lr": 0.01}
    found = ImageClassifier(**{"model_args": {"width": 6, "contraction": 0.9}, **choices, **arguments})
    # Adam divides by |g|: where g is next to nothing a rounding error is a whole step. SGD does not.
    found.configure_optimizers = lambda: torch.optim.SGD(found.parameters(), lr=0.5)  # type: ignore[method-assign]
    return found


def trainer(processes: int, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    several = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {"devices": 1}
    few = {"max_epochs": 1, "limit_val_batches": 0}
    return pl.Trainer(
        accelerator="cpu",
        use_distributed_sampler=False,
        **{**quiet, **several, **few, **arguments},
        callbacks=list(callbacks),
    )


def trained(processes: int, folder: Path, **arguments: Any) -> list[dict[str, Tensor]]:
    """The weights of each rank after a few steps."""
    folder.mkdir()
    run = trainer(processes, KeepWeights(folder))
    run.fit(module(**arguments), datamodule=Data(STEPS * BATCH))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
def test_two_processes_are_one_process_on_the_joint_batch(tmp_path: Path) -> None:
    (start,) = [module().state_dict()]
    (one,) = trained(1, tmp_path / "one")
    first, second = trained(2, tmp_path / "two")
    assert same(dict(first), dict(second))
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
    moved = [name for name, value in one.items() if (value - start[name]).abs().max() > 1e-3]
    assert moved == list(one), "the steps were large enough for the comparison to mean something"


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
def test_the_ranks_stay_equal_with_the_jacobian_term(tmp_path: Path) -> None:
    """Each rank draws its own probes; the gradients are averaged all the same. The first step is unrolled."""
    stages = {"pretrain_steps": 1, "jacobian_pretrain_weight": 0.2, "jacobian_frequency": 0.9, "max_steps_jitter": 2}
    first, second = trained(2, tmp_path / "two", jacobian_weight=0.5, **stages)
    assert same(dict(first), dict(second))
    (without,) = trained(1, tmp_path / "one")
    assert max((first[name] - value).abs().max() for name, value in without.items()) > 1e-3


class KeepText(KeepWeights):
    """Its memory too, and what was measured; and a checkpoint of all."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, LanguageModel)
        content = {"weights": module.state_dict(), "memory": list(module._memories["train"])}
        content["measured"] = {name: value.double() for name, value in trainer.callback_metrics.items()}
        torch.save(content, self.folder / f"rank{trainer.global_rank}.pt")
        trainer.save_checkpoint(self.folder / "run.ckpt")


def read(processes: int, folder: Path) -> list[dict[str, Any]]:
    """What the ranks kept that read four streams of text together."""
    folder.mkdir()
    module = texts.small(schedule="constant")
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    run = trainer(processes, KeepText(folder), limit_val_batches=1.0, num_sanity_val_steps=0)
    run.fit(module, datamodule=texts.texts(batch_size=4 // processes))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_read_as_one_that_reads_all_their_streams(tmp_path: Path) -> None:
    """Each remembers its own streams; figures are sums over all, though one process has fewer streams to validate."""
    (one,) = read(1, tmp_path / "one")
    two = read(2, tmp_path / "two")
    assert same(two[0]["weights"], two[1]["weights"])
    for name, value in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], value, rtol=0, atol=2e-5)
    start = texts.small().state_dict()
    assert max((value - start[name]).abs().max() for name, value in one["weights"].items()) > 1e-2
    for memory, parts in zip(one["memory"], zip(*(rank["memory"] for rank in two), strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts), memory, rtol=0, atol=1e-3)
    names = ["train/perplexity", "train/bits_per_byte", "val/loss", "val/perplexity", "val/bits_per_byte"]
    for rank in two:
        found = {name: rank["measured"][name].item() for name in names}
        assert found == pytest.approx({name: one["measured"][name].item() for name in names}, rel=1e-4)
    for kept, ranks in (("one", [one]), ("two", two)):
        content = torch.load(tmp_path / kept / "run.ckpt", weights_only=True)["deq_zoo_memory"]
        parts = zip(*(rank["memory"] for rank in ranks), strict=True)
        assert same(content, [torch.cat(rows_) for rows_ in parts]), "a checkpoint has the memory of all"


class KeepMeasures(pl.Callback):
    """Each rank writes what it logged, and its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
        torch.save((measured, module.state_dict()), self.folder / f"rank{trainer.global_rank}.pt")


class Pairs(pl.LightningDataModule):
    """Of optical flow; two processes take turns."""

    def train_dataloader(self) -> DataLoader[Any]:
        processes = self.trainer.world_size
        data = flows.pairs(4)
        sampler = DistributedSampler(data, processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=2 // processes, sampler=sampler)

    val_dataloader = train_dataloader


def test_the_measures_of_flow_are_over_the_pixels_of_all_processes(tmp_path: Path) -> None:
    """Though the processes have other numbers of pixels whose flow is known, and one has images without any."""
    found = {}
    for processes in (1, 2):
        module = flows.small(schedule="constant", freeze_batch_norm=True)
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=1e-3)
        folder = tmp_path / str(processes)
        folder.mkdir()
        run = trainer(processes, KeepMeasures(folder), limit_val_batches=1.0, num_sanity_val_steps=0)
        run.fit(module, datamodule=Pairs())
        found[processes] = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    (one, _), (first, second) = found[1][0], found[2]
    assert same(dict(first[1]), dict(second[1]))
    names = [f"{stage}/{name}" for stage in ("train", "val") for name in flows.MEASURES]
    for measured, _ in (first, second):
        assert {name: measured[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-3)


def test_each_process_writes_its_own_predictions(tmp_path: Path) -> None:
    writer = PredictionWriter()
    run = trainer(2, writer, default_root_dir=tmp_path)
    run.predict(module(), datamodule=Data(10), return_predictions=False)
    assert not (tmp_path / "predictions.csv").exists()
    indices = [[int(row["index"]) for row in rows(tmp_path / f"predictions.{rank}.csv")] for rank in range(2)]
    assert indices == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]

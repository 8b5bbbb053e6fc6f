"""Two processes whose batches count unevenly many pixels, or tokens, are one process that counts them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import zoo
from lightning_modules import EquilibriumModule, SemanticSegmenter
from tests.command_line import same
from tests.lightning_modules import texts
from tests.lightning_modules.test_processes import KeepWeights, trainer
from zoo.implicit import Anderson, FixedPointIteration, ImplicitGradient, PhantomGradient
from zoo.vocabulary import IGNORED

# From Python 3.12 a fork of a process with threads is warned of; Lightning's ddp_fork is such a fork.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
]

STEPS, BATCH = 4, 4


class Pairs(pl.LightningDataModule):
    """Samples in order; two processes take turns."""

    def __init__(self, samples: TensorDataset) -> None:
        super().__init__()
        self.samples = samples

    def train_dataloader(self) -> DataLoader[Any]:
        processes = self.trainer.world_size
        sampler = DistributedSampler(self.samples, processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(self.samples, batch_size=BATCH // processes, sampler=sampler)


def uneven(target: Tensor, ignored: int) -> Tensor:
    """Most of what process 0 sees is ignored; in the second step all of it, in the third what process 1 sees too."""
    share = torch.tensor([0.9, 0.1]).repeat(len(target) // 2).view(-1, *(1 for _ in target.shape[1:]))
    target = target.where(torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) > share, ignored)
    target[BATCH : 2 * BATCH : 2] = ignored
    target[2 * BATCH : 3 * BATCH] = ignored
    return target


def scenes(weights: list[float] | None = None) -> tuple[EquilibriumModule, TensorDataset]:
    few = FixedPointIteration(tol=1e-9, max_steps=5)  # the same, however far random weights are from an equilibrium
    sizes = {"channels": [8, 8], "stem_stride": 1, "in_channels": 1, "expansion": 1}
    module = SemanticSegmenter(
        "mdeq_segmenter", 3, sizes, class_weights=weights, solver=few, gradient=PhantomGradient(steps=2)
    ).double()
    zoo.freeze_statistics(module.model)
    for deq in module.equilibria().values():
        deq.on_failure = "ignore"
    images = torch.rand(STEPS * BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return module, TensorDataset(images.double(), uneven((3 * images[:, 0]).long(), 255))


def words() -> tuple[EquilibriumModule, TensorDataset]:
    exact = Anderson(tol=1e-9, max_steps=200)
    module = texts.small(solver=exact, gradient=ImplicitGradient(exact)).double()
    text = torch.randint(texts.VOCAB, (STEPS * BATCH, 6), generator=torch.Generator().manual_seed(1))
    return module, TensorDataset(text[:, :-1], uneven(text[:, 1:], IGNORED))


def trained(make: Callable[[], tuple[EquilibriumModule, TensorDataset]], processes: int, folder: Path) -> list[Any]:
    """The weights before, and those of each process after four steps."""
    folder.mkdir()
    torch.manual_seed(0)
    module, samples = make()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    trainer(processes, KeepWeights(folder)).fit(module, datamodule=Pairs(samples))
    return [start, *(torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes))]


@pytest.mark.parametrize("make", [scenes, lambda: scenes([0.5, 1.0, 3.0]), words], ids=["scenes", "weighted", "words"])
def test_two_processes_are_one_that_counts_all(make: Any, tmp_path: Path) -> None:
    start, one = trained(make, 1, tmp_path / "one")
    _, first, second = trained(make, 2, tmp_path / "two")
    assert same(dict(first), dict(second))
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6)
    assert max(float((value - start[name]).abs().max()) for name, value in one.items()) > 1e-2

"""The four families, small and in float64, and data of which two processes read together what one reads alone.

In float64 the order in which sums are taken does not show in the sixth digit, and what does is an error: if solves are
short, since long ones that do not converge, as those of random weights may not, make much of a rounding error. Batch
norms have statistics of the batch that a process sees, so the models that have some keep theirs as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import zoo
from datamodules.text import TextSplits
from lightning_modules import EquilibriumModule, ImageClassifier
from tests.lightning_modules import flows, texts
from zoo.implicit import FixedPointIteration, Gradient, ImplicitGradient, Solver

BATCH = 4
STEPS, TOL = 5, 1e-9
SHORT = FixedPointIteration(tol=TOL, max_steps=STEPS, damping=0.5)
GRADIENT = ImplicitGradient(SHORT)
MDEQ = {"channels": (8, 8), "head_widths": (2, 2), "final_width": 8, "in_channels": 1, "expansion": 1}


class Pairs(pl.LightningDataModule):
    """Samples in the same order in each epoch, ``batches`` batches of them; several processes take turns."""

    def __init__(self, make: Callable[[int], TensorDataset], batches: int, batch_size: int) -> None:
        super().__init__()
        data = make(batches * batch_size)
        self.samples = TensorDataset(*(x.double() if x.is_floating_point() else x for x in data.tensors))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        processes = self.trainer.world_size
        sampler = DistributedSampler(self.samples, processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(self.samples, batch_size=self.batch_size // processes, sampler=sampler)

    val_dataloader = train_dataloader


class Texts(texts.Texts):
    """Four streams; several processes read some each."""

    def __init__(self, batches: int) -> None:
        super().__init__(batch_size=BATCH, segment_length=5, eval_batch_size=BATCH)
        self.batches = batches

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            self.batch_size = BATCH // self.trainer.world_size
        super().setup(stage)

    def load(self) -> TextSplits:
        words = torch.randint(
            texts.VOCAB, (BATCH * (5 * self.batches + 1),), generator=torch.Generator().manual_seed(1)
        )
        return TextSplits(words, words[:100], words[:100])


def images(count: int) -> TensorDataset:
    pixels = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(pixels, torch.arange(count) % 10)


def tanh(solver: Solver, gradient: Gradient, **options: Any) -> EquilibriumModule:
    sizes = {"width": 6, "contraction": 0.9}
    return ImageClassifier(model_args=sizes, solver=solver, gradient=gradient, **options)


def transformer(solver: Solver, gradient: Gradient, **options: Any) -> EquilibriumModule:
    return texts.small(solver=solver, gradient=gradient, **options)


def mdeq(solver: Solver, gradient: Gradient, **options: Any) -> EquilibriumModule:
    module = ImageClassifier("mdeq", model_args=MDEQ, solver=solver, gradient=gradient, **options)
    module.model.deq.on_failure = "ignore"
    for norm in (part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        module.model(images(8).tensors[0])  # statistics of what it will see: it would learn next to nothing with others
    zoo.freeze_statistics(module.model)
    return module


def flow(solver: Solver, gradient: Gradient, **options: Any) -> EquilibriumModule:
    arguments = {"losses": 2, "sliced": not gradient.through_solver, "freeze_batch_norm": True}
    return flows.small(solver=solver, gradient=gradient, **arguments, **options)


Make = Callable[..., EquilibriumModule]
FAMILIES: dict[Make, tuple[Callable[[int], pl.LightningDataModule], float]] = {
    tanh: (lambda batches: Pairs(images, batches, BATCH), 0.5),
    transformer: (Texts, 0.02),
    mdeq: (lambda batches: Pairs(images, batches, BATCH), 0.005),
    flow: (lambda batches: Pairs(flows.pairs, batches, 2), 5e-3),
}
"""Of each its data, so many batches of them, and the learning rate of SGD."""


def made(
    make: Make, solver: Solver = SHORT, gradient: Gradient | None = None, shrink: float = 1.0, **options: Any
) -> EquilibriumModule:
    """The same module each time, trained by SGD: Adam divides by |g|, and makes a step of a rounding error.

    Args:
        shrink: a factor of all weights of the cell; with a small one solves may converge.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gradient = GRADIENT if gradient is None else gradient
        module = make(solver, gradient, **{"schedule": "constant", **options}).double()
    for deq in module.equilibria().values():
        deq.on_failure = "ignore"
        with torch.no_grad():
            for parameter in deq.cell.parameters():
                parameter.mul_(shrink)
    parameters = [p for p in module.parameters() if p.requires_grad]
    lr = FAMILIES[make][1]
    module.configure_optimizers = lambda: torch.optim.SGD(parameters, lr=lr)  # type: ignore[method-assign]
    return module


class KeepWeights(pl.Callback):
    """Each process writes its weights to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        weights = {name: whole(value) for name, value in module.state_dict().items()}
        torch.save(weights, self.folder / f"rank{trainer.global_rank}.pt")


def whole(x: Tensor) -> Tensor:
    return cast(Any, x).full_tensor() if hasattr(x, "full_tensor") else x.clone()


def quiet(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    """A trainer that writes nothing."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    few = {"max_epochs": 1, "limit_val_batches": 0, "devices": 1, "use_distributed_sampler": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**off, **few, **arguments})


def kept(folder: Path, processes: int) -> list[dict[str, Tensor]]:
    """What :class:`KeepWeights` wrote in each process."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], before: EquilibriumModule) -> None:
    """Equal to 1e-7, after steps from ``before`` that were large enough for that to mean something."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    start = {name: p.detach() for name, p in before.named_parameters() if p.requires_grad}
    moved = {name: float((expected[name] - p).abs().max()) for name, p in start.items()}
    assert max(moved.values()) > 1e-3
    far = [name for name, by in moved.items() if by > 1e-6]  # a bias before a norm has no gradient
    assert len(far) > len(start) / 2, f"only {far}"

"""The four families, small, and data of which some batches are no numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import EquilibriumModule, ImageClassifier, SemanticSegmenter
from tests.lightning_modules import flows, texts
from tests.lightning_modules.runs import small, train
from zoo.implicit import FixedPointIteration

BATCHES, SIZE = 6, 4
NAN, INF = math.nan, math.inf


def multiscale(recompute: bool = False, **arguments: Any) -> ImageClassifier:
    """With batch norms in its stem and its head."""
    sizes = {"channels": [4, 4], "head_widths": [2, 2], "final_width": 8, "in_channels": 1, "expansion": 1, "groups": 2}
    solver = FixedPointIteration(tol=1e-2, max_steps=4)
    return _seeded(
        lambda: ImageClassifier("mdeq", model_args={**sizes, "recompute": recompute}, solver=solver, **arguments)
    )


def segmenter(**arguments: Any) -> SemanticSegmenter:
    sizes = {"channels": [4, 4], "stem_stride": 1, "in_channels": 1, "expansion": 1, "groups": 2}
    solver = FixedPointIteration(tol=1e-2, max_steps=4)
    return _seeded(
        lambda: SemanticSegmenter("mdeq_segmenter", 3, **{"model_args": sizes, "solver": solver, **arguments})
    )


def resnet(**arguments: Any) -> ImageClassifier:
    return _seeded(lambda: ImageClassifier("resnet", model_args={"widths": [4], "in_channels": 1}, **arguments))


def spectral(**arguments: Any) -> ImageClassifier:
    """With the vectors of a power iteration among its buffers."""
    module = small(**arguments)
    _seeded(lambda: nn.utils.parametrizations.spectral_norm(module.model.classifier))
    return module


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def digits(count: int = BATCHES * SIZE) -> TensorDataset:
    return TensorDataset(
        torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(count) % 10
    )


def scenes(count: int = BATCHES * SIZE) -> TensorDataset:
    images = digits(count).tensors[0]
    return TensorDataset(images, (3 * images[:, 0]).long())


def words(count: int = BATCHES * SIZE) -> TensorDataset:
    text = torch.randint(texts.VOCAB, (count, 6), generator=torch.Generator().manual_seed(1))
    return TensorDataset(text[:, :-1], text[:, 1:])


Family = tuple[Callable[..., EquilibriumModule], Callable[..., TensorDataset]]
FAMILIES: dict[str, Family] = {
    "tanh": (small, digits),
    "spectral norm": (spectral, digits),
    "mdeq": (multiscale, digits),
    "segmenter": (segmenter, scenes),
    "resnet": (resnet, digits),
    "transformer": (texts.small, words),
    "flow": (flows.small, lambda count=BATCHES * SIZE: flows.pairs(count)),
}


class PoisonedOutput(nn.Module):
    """In place of a model whose inputs are integers: what it gives, and remembers, is not finite at these steps."""

    def __init__(self, module: EquilibriumModule, value: float, steps: set[int]) -> None:
        super().__init__()
        self.module, self.value, self.steps, self.calls = [module], value, steps, 0

    def hook(self, model: nn.Module, inputs: Any, output: Any) -> Any:
        self.calls += 1
        if self.calls - 1 not in self.steps:
            return output
        return pytree.tree_map_only(Tensor, lambda x: x * self.value, output)


def loader(data: TensorDataset, bad: set[int], value: float = NAN) -> DataLoader[Any]:
    """Batches in order; of the bad ones one number of one sample is this value."""
    first, *rest = (x.clone() for x in data.tensors)
    for k in bad if first.is_floating_point() else ():
        first[k * SIZE + 1].view(-1)[7] = value
    return DataLoader(TensorDataset(first, *rest), batch_size=SIZE)


def without(data: TensorDataset, bad: set[int]) -> DataLoader[Any]:
    """The other batches."""
    keep = [i for i in range(len(data)) if i // SIZE not in bad]
    return DataLoader(TensorDataset(*(x[keep] for x in data.tensors)), batch_size=SIZE)


class Watch(pl.Callback):
    """What there is before each step, and after all."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.keep(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.keep(trainer, module)

    def keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.states.append(deepcopy((dict(module.state_dict()), trainer.optimizers[0].state_dict()["state"])))


def fit(module: EquilibriumModule, data: DataLoader[Any], *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    return train(module, *callbacks, loader=data, **{"limit_val_batches": 0, **arguments})


@contextmanager
def told_once() -> Iterator[list[str]]:
    """What is warned of skipped steps: one sentence, in a run that skips any."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(each.message) for each in caught if "was skipped" in str(each.message)]
    assert len(found) == 1

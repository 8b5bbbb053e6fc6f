"""What all sets share: three parts, and a loader for each stage of a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from typing import Generic, NamedTuple, TypeVar

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

Sample = tuple[Tensor, Tensor]
D = TypeVar("D", bound=Dataset[tuple[Tensor, ...]])


class Splits(NamedTuple, Generic[D]):
    """The three parts of a set, as datasets."""

    train: D
    val: D
    test: D


class SplitDataModule(LightningDataModule, ABC, Generic[D]):
    """A set in three parts; a subclass says how they are loaded. The loaders work without a Trainer too.

    Args:
        batch_size: samples a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.

    Attributes:
        augmentation: applied to the images of each training batch, and to nothing else; None leaves them as they are.
    """

    augmentation: Callable[[Tensor], Tensor] | None = None

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        # The subclass's arguments too, so that a checkpoint knows its data; this one a subclass sets for its user.
        self.save_hyperparameters(ignore=["eval_batch_size"])
        self.batch_size = whole_number("batch_size", batch_size, at_least=1)
        self.num_workers = whole_number("num_workers", num_workers, at_least=0)

    @property
    def eval_batch_size(self) -> int:
        """Samples a batch in validation, test and prediction, on each device."""
        return self.batch_size

    @abstractmethod
    def load(self) -> Splits[D]:
        """Read the set from disk."""

    @cached_property
    def splits(self) -> Splits[D]:
        """The three parts, read at the first use."""
        return self.load()

    def setup(self, stage: str | None = None) -> None:
        """Read the set now, so that a broken file is found before the first epoch."""
        _ = self.splits

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.splits.train, self.augmentation, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.splits.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test set."""
        return self._loader(self.splits.test)

    def _loader(
        self,
        dataset: Dataset[tuple[Tensor, ...]],
        augmentation: Callable[[Tensor], Tensor] | None = None,
        shuffle: bool = False,
    ) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size if shuffle else self.eval_batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=default_collate if augmentation is None else partial(_collate_augmented, augmentation),
        )


class LabelledDataModule(SplitDataModule[D]):
    """A set whose samples are images and classes; a subclass names the classes."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in the order of the labels."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def _collate_augmented(augmentation: Callable[[Tensor], Tensor], samples: list[Sample]) -> list[Tensor]:
    """``default_collate``, then one augmentation of the whole batch.

    Its random numbers come from torch's global generator, which a DataLoader seeds in each of its workers.
    """
    images, labels = default_collate(samples)
    return [augmentation(images), labels]


def whole_number(name: str, value: int, at_least: int) -> int:
    """``value``, if it is a whole number of at least that; else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is a whole number, at least {at_least}; given: {value!r}")
    return value

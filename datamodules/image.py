"""What the image classification sets share: images in memory, three fixed splits, four loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

Sample = tuple[Tensor, Tensor]
Indices = NDArray[np.int64]


class SplitIndices(NamedTuple):
    """Which samples of a set belong to which part."""

    train: Indices
    val: Indices
    test: Indices


class ImageDataset(Dataset[Sample]):
    """Samples ``(image float32 (C, H, W) in [0, 1], label int64 ())``, held in memory as whole numbers.

    Args:
        images: ``(N, C, H, W)``, whole numbers from 0 to ``white``.
        labels: ``(N,)``, class indices.
        white: the value that becomes 1.0.
    """

    def __init__(self, images: Tensor, labels: Tensor, white: int) -> None:
        self.images = images
        self.labels = labels.long()
        self.white = white

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index].float() / self.white, self.labels[index]


class ImageSplits(NamedTuple):
    """The three parts of a set, as datasets."""

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset


class ImageDataModule(LightningDataModule, ABC):
    """An image classification set; a subclass names its classes and says how it is loaded.

    Batches are ``(images float32 (B, C, H, W) in [0, 1], labels int64 (B,))``. Nothing is normalised: the models do
    that themselves. The loaders work without a Trainer too.

    Args:
        batch_size: images a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.

    Attributes:
        image_shape: ``(C, H, W)``.
        class_names: one name a class, in the order of the labels.
        augmentation: applied to each batch of training images, and to nothing else; None leaves them as they are.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    augmentation: Callable[[Tensor], Tensor] | None = None

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()  # the subclass's arguments too, so that a checkpoint knows its data
        self.batch_size = _whole_number("batch_size", batch_size, at_least=1)
        self.num_workers = _whole_number("num_workers", num_workers, at_least=0)

    @abstractmethod
    def load(self) -> ImageSplits:
        """Read the set from disk."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def splits(self) -> ImageSplits:
        """The three parts, read at the first use."""
        return self.load()

    def setup(self, stage: str | None = None) -> None:
        """Read the set now, so that a broken file is found before the first epoch."""
        _ = self.splits

    def train_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.splits.train, self.augmentation, shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.splits.val)

    def test_dataloader(self) -> DataLoader[Sample]:
        return self._loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The test set."""
        return self._loader(self.splits.test)

    def _loader(
        self, dataset: ImageDataset, augmentation: Callable[[Tensor], Tensor] | None = None, shuffle: bool = False
    ) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=default_collate if augmentation is None else partial(_collate_augmented, augmentation),
        )


def _collate_augmented(augmentation: Callable[[Tensor], Tensor], samples: list[Sample]) -> list[Tensor]:
    """``default_collate``, then one augmentation of the whole batch.

    Its random numbers come from torch's global generator, which a DataLoader seeds in each of its workers.
    """
    images, labels = default_collate(samples)
    return [augmentation(images), labels]


def _whole_number(name: str, value: int, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is a whole number, at least {at_least}; given: {value!r}")
    return value

"""What the image classification sets share, and images in memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .base import D, LabelledDataModule, Sample

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


class ImageDataModule(LabelledDataModule[D]):
    """An image classification set; a subclass names its classes and says how it is loaded.

    Batches are ``(images float32 (B, C, H, W) in [0, 1], labels int64 (B,))``. Nothing is normalised: the models do
    that themselves.

    Attributes:
        image_shape: ``(C, H, W)``.
    """

    image_shape: tuple[int, int, int]

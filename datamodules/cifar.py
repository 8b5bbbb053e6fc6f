"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test colour images of 32x32, in 10 and 100 classes.

A. Krizhevsky, "Learning multiple layers of features from tiny images", University of Toronto (2009).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import pad
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from .base import Splits, whole_number
from .download import DownloadedImages
from .idx import corrupt
from .image import ImageDataset, Indices

FINE_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


def cifar_split(labels: Indices, val_size: int = 5000) -> tuple[Indices, Indices]:
    """The training and validation indices of a training set with these labels: 45,000 and 5,000 of 50,000.

    They never change. scikit-learn alone gives the same arrays, in the same order, from one line::

        train, val = train_test_split(np.arange(50000), test_size=5000, stratify=labels, random_state=0)

    With ``val_size=0`` all indices are training indices, in their order.
    """
    indices = np.arange(len(labels))
    if val_size == 0:
        return indices, indices[:0]
    train, val = train_test_split(indices, test_size=val_size, stratify=labels, random_state=0)
    return train, val


@dataclass(frozen=True)
class RandomCropFlip:
    """Shifts and mirrors each image of a batch by its own random amounts, all images at once.

    Each image gets a border of zeros, a window of its own size is cut out at a random place, and every second one on
    average is mirrored left to right. The random numbers come from torch's global generator.

    Args:
        padding: width of the border, in pixels; an image is shifted by at most that along each axis.
    """

    padding: int

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the same shape, dtype and range."""
        B, C, H, W = images.shape
        top, left = torch.randint(2 * self.padding + 1, (2, B, 1))
        rows = top + torch.arange(H)
        columns = left + torch.arange(W)
        columns = torch.where(torch.rand(B, 1) < 0.5, columns, columns.flip(1))
        padded = pad(images, (self.padding,) * 4)
        sample, channel = torch.arange(B).view(B, 1, 1, 1), torch.arange(C).view(1, C, 1, 1)
        return padded[sample, channel, rows.view(B, 1, H, 1), columns.view(B, 1, 1, W)]


class CIFAR10DataModule(DownloadedImages):
    """CIFAR-10: 32x32 colour images, 45,000 training, 5,000 validation and 10,000 test images.

    Images are ``(3, 32, 32)``. The validation images are the part of the published training set that
    :func:`cifar_split` holds out. Published accuracies come from models trained on all 50,000 images:
    ``val_size=0`` does that, and leaves nothing to validate on. ``validate_on_test=True`` then validates on the test
    images; a model chosen by that validation has seen them, and its test accuracy flatters it.

    Args:
        root: folder of datasets; the files are in its subfolder ``cifar-10-batches-py`` or ``cifar-100-python``.
        download: fetch the files if they are not there.
        batch_size: images a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        augment: pad each training image by 4 pixels, cut out 32x32 at random, and mirror every second one.
        val_size: training images held out for validation.
        validate_on_test: validate on the test images; only with ``val_size=0``.
    """

    source: Any = datasets.CIFAR10
    image_shape = (3, 32, 32)
    class_names: tuple[str, ...] = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 64,
        num_workers: int = 2,
        augment: bool = True,
        val_size: int = 5000,
        validate_on_test: bool = False,
    ) -> None:
        super().__init__(root, download, batch_size, num_workers)
        self.augmentation = RandomCropFlip(padding=4) if augment else None
        self.val_size = whole_number("val_size", val_size, at_least=0)
        if validate_on_test and val_size:
            raise ValueError(
                f"validate_on_test leaves no use for the val_size={val_size} images held out: add val_size=0 to train "
                "on them, or leave validate_on_test out to validate on them"
            )
        self.validate_on_test = validate_on_test

    @property
    def folder(self) -> Path:
        return Path(self.root).absolute() / str(self.source.base_folder)

    def load(self) -> Splits[ImageDataset]:
        self._require_files()
        images, labels = self._read(train=True)
        N, classes = len(images), self.num_classes
        if self.val_size and not classes <= self.val_size <= N - classes:
            raise ValueError(
                f"val_size={self.val_size} does not split {N} training images of {classes} classes: "
                f"choose 0, or from {classes} to {N - classes}"
            )
        train, val = cifar_split(labels.numpy(), self.val_size)
        test = ImageDataset(*self._read(train=False), white=255)
        return Splits(
            ImageDataset(images[train], labels[train], white=255),
            test if self.validate_on_test else ImageDataset(images[val], labels[val], white=255),
            test,
        )

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Images ``(N, 3, 32, 32)``, uint8, and labels ``(N,)``. torchvision unpickles only what has the right md5."""
        try:
            with warnings.catch_warnings():
                # The files were pickled by a NumPy that wrote 0 where today's expects False, and says so.
                warnings.filterwarnings("ignore", r"dtype\(\): align should be passed as")
                data = self.source(self.root, train=train)
        except RuntimeError as error:
            for name, md5 in self._files():
                if not check_integrity(self.folder / name, md5):
                    raise corrupt(self.folder / name, f"its md5 is not {md5}") from error
            raise
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)

    def _files(self) -> list[tuple[str, str]]:
        """Name and md5 of each file."""
        meta = self.source.meta
        return [*map(tuple, self.source.train_list + self.source.test_list), (meta["filename"], meta["md5"])]

    def _missing(self) -> list[str]:
        return [name for name, _ in self._files() if not (self.folder / name).exists()]

    def _by_hand(self) -> str:
        return f"By hand: unpack this file into {self.folder.parent}:\n  {self.source.url}"


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: images, split and arguments as for CIFAR-10, in 100 classes (the fine labels)."""

    source = datasets.CIFAR100
    class_names = tuple(FINE_LABELS.split())

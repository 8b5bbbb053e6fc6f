"""MNIST and Fashion-MNIST: 60,000 training and 10,000 test images of 28x28, in ten classes each.

Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86 (1998). H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST", arXiv:1708.07747 (2017).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets

from .base import Splits
from .download import DownloadedImages
from .idx import corrupt, read_idx
from .image import ImageDataset, Indices


def mnist_split(labels: Indices) -> tuple[Indices, Indices]:
    """The training and validation indices of a training set with these labels: 55,000 and 5,000 of 60,000.

    They never change. A training set of another size is split in the same proportion, 11 to 1. scikit-learn alone gives
    the same arrays, in the same order, from one line::

        train, val = train_test_split(np.arange(60000), test_size=5000, stratify=labels, random_state=0)
    """
    N = len(labels)
    train, val = train_test_split(np.arange(N), test_size=N // 12, stratify=labels, random_state=0)
    return train, val


class MNISTDataModule(DownloadedImages):
    """MNIST: 28x28 handwritten digits, 55,000 training, 5,000 validation and 10,000 test images.

    Images are ``(1, 28, 28)``. The validation images are the part of the published training set that
    :func:`mnist_split` holds out.

    Args:
        root: folder of datasets; the files are in its subfolder ``MNIST/raw`` or ``FashionMNIST/raw``, gzipped or not.
        download: fetch the files if they are not there.
        batch_size: images a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    source: Any = datasets.MNIST
    image_shape = (1, 28, 28)
    class_names = tuple("0123456789")

    @property
    def folder(self) -> Path:
        return Path(self.root).absolute() / self._name / "raw"

    def load(self) -> Splits[ImageDataset]:
        self._require_files()
        images, labels = self._read("train")
        train, val = mnist_split(labels.numpy())
        return Splits(
            ImageDataset(images[train], labels[train], white=255),
            ImageDataset(images[val], labels[val], white=255),
            ImageDataset(*self._read("t10k"), white=255),
        )

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        """Images ``(N, 1, 28, 28)`` and labels ``(N,)`` of the part ``"train"`` or ``"t10k"``, uint8."""
        images = read_idx(self._path(f"{part}-images-idx3-ubyte"), self.image_shape[1:])
        path = self._path(f"{part}-labels-idx1-ubyte")
        labels = read_idx(path, ())
        if len(labels) != len(images):
            raise corrupt(path, f"it holds {len(labels)} labels for {len(images)} images")
        if len(labels) and int(labels.max()) >= self.num_classes:
            raise corrupt(path, f"it holds the label {int(labels.max())}; expected: 0 to {self.num_classes - 1}")
        return images.unsqueeze(1), labels

    def _path(self, name: str) -> Path:
        """The file of this name, as it is if it is there, else gzipped."""
        path = self.folder / name
        return path if path.exists() else path.with_name(f"{name}.gz")

    def _missing(self) -> list[str]:
        """The published names, ``.gz``, of those of the four files that are not there."""
        names = [name for name, _ in self.source.resources]
        return [name for name in names if not self._path(name.removesuffix(".gz")).exists()]

    def _by_hand(self) -> str:
        urls = [f"  {mirror}{name}" for mirror in self.source.mirrors for name in self._missing()]
        return "\n".join([f"By hand: put these files, as they are or unpacked, into {self.folder}:", *urls])


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 28x28 images of clothes, split and stored like MNIST, in the folder ``FashionMNIST``."""

    source = datasets.FashionMNIST
    class_names = tuple(datasets.FashionMNIST.classes)

"""One LightningDataModule a dataset, for the CLI, for ``Trainer.fit`` and as plain DataLoaders."""

from .digits import DigitsDataModule, digits_split
from .idx import DataError
from .image import ImageDataModule
from .mnist import FashionMNISTDataModule, MNISTDataModule, mnist_split
from .scenes import DigitScenesDataModule
from .segmentation import SegmentationDataModule

__all__ = [
    "DataError",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "MNISTDataModule",
    "SegmentationDataModule",
    "digits_split",
    "mnist_split",
]

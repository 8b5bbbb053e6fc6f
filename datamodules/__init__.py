"""One LightningDataModule a dataset, for the CLI, for ``Trainer.fit`` and as plain DataLoaders."""

from .cifar import CIFAR10DataModule, CIFAR100DataModule, cifar_split
from .cityscapes import CityscapesDataModule
from .digits import DigitsDataModule, digits_split
from .flow import FlowDataModule
from .flying_chairs import FlyingChairsDataModule
from .flying_things import FlyingThings3DDataModule
from .frames import FramesDataModule
from .hd1k import HD1KDataModule
from .idx import DataError
from .image import ImageDataModule
from .imagenet import ImageNetDataModule
from .kitti_flow import KittiFlowDataModule
from .mnist import FashionMNISTDataModule, MNISTDataModule, mnist_split
from .pydocs import PyDocsDataModule
from .scenes import DigitScenesDataModule
from .segmentation import SegmentationDataModule
from .sintel import SintelDataModule
from .synthetic_flow import SyntheticFlowDataModule
from .text import TextDataModule
from .text_folder import TextFolderDataModule
from .wikitext import WikiText103DataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CityscapesDataModule",
    "DataError",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "FlowDataModule",
    "FlyingChairsDataModule",
    "FlyingThings3DDataModule",
    "FramesDataModule",
    "HD1KDataModule",
    "ImageDataModule",
    "ImageNetDataModule",
    "KittiFlowDataModule",
    "MNISTDataModule",
    "PyDocsDataModule",
    "SegmentationDataModule",
    "SintelDataModule",
    "SyntheticFlowDataModule",
    "TextDataModule",
    "TextFolderDataModule",
    "WikiText103DataModule",
    "cifar_split",
    "digits_split",
    "mnist_split",
]

"""FlyingChairs: 22,232 training and 640 validation pairs of 384x512, chairs that fly over photographs.

A. Dosovitskiy et al., "FlowNet: learning optical flow with convolutional networks", ICCV 2015.
"""

from __future__ import annotations

from torch.utils.data import Dataset
from torchvision import datasets

from .base import Splits
from .flow import FlowSample
from .flow_augmentation import DenseFlowAugmentation
from .published_flow import Published, PublishedFlowDataModule

CHAIRS = Published(
    "FlyingChairs",
    datasets.FlyingChairs,
    "FlyingChairs/data/*_{img1.ppm,img2.ppm,flow.flo} and FlyingChairs/FlyingChairs_train_val.txt",
    "https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html (FlyingChairs.zip and the list "
    "FlyingChairs_train_val.txt)",
)


class FlyingChairsDataModule(PublishedFlowDataModule):
    """FlyingChairs, the first stage of the published recipes.

    The files are laid out as torchvision reads them: ``root/FlyingChairs/data/*_img1.ppm``, ``*_img2.ppm`` and
    ``*_flow.flo``, and ``root/FlyingChairs/FlyingChairs_train_val.txt``, the published split. The test pairs are the
    validation pairs.

    Training pairs are changed as :class:`DenseFlowAugmentation` says, the others are given whole, one a batch.

    Args:
        root: the folder in which ``FlyingChairs`` lies.
        crop_height: height of the training images, in pixels.
        crop_width: width of the training images, in pixels.
        min_scale: base-2 logarithm of the smallest magnification in training.
        max_scale: that of the largest.
        batch_size: pairs a batch of training, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    def __init__(
        self,
        root: str = "data",
        crop_height: int = 368,
        crop_width: int = 496,
        min_scale: float = -0.1,
        max_scale: float = 1.0,
        batch_size: int = 12,
        num_workers: int = 4,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        self.changes = DenseFlowAugmentation(crop_height, crop_width, min_scale, max_scale)

    def load(self) -> Splits[Dataset[FlowSample]]:
        """Find the files; see :meth:`Published.read` for the errors."""
        val = CHAIRS.read(self.root, "val")
        return Splits(CHAIRS.read(self.root, "train", augmentation=self.changes), val, val)

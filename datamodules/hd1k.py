"""HD1K: about 1,000 pairs of 1080x2560 from a car, in 36 sequences, with flow where it was measured.

D. Kondermann et al., "The HCI benchmark suite: stereo and flow ground truth with uncertainties for urban autonomous
driving", CVPR workshops 2016.
"""

from __future__ import annotations

from torch.utils.data import Dataset
from torchvision import datasets

from .base import Splits
from .flow import FlowSample
from .flow_augmentation import SparseFlowAugmentation
from .published_flow import Published, PublishedFlowDataModule, held_out

HD1K = Published(
    "HD1K",
    datasets.HD1K,
    "hd1k/hd1k_input/image_2/*.png and hd1k/hd1k_flow_gt/flow_occ/*.png",
    "http://hci-benchmark.iwr.uni-heidelberg.de (hd1k_input.zip and hd1k_flow_gt.zip)",
)


class HD1KDataModule(PublishedFlowDataModule):
    """HD1K's pairs with flow; in the published recipes a part of the mixture of :class:`SintelDataModule`.

    The files are laid out as torchvision reads them: ``root/hd1k/hd1k_input/image_2`` and
    ``root/hd1k/hd1k_flow_gt/flow_occ``. The validation and the test pairs are the training pairs, unless some are
    ``held_out``.

    Training pairs are changed as :class:`SparseFlowAugmentation` says, the others are given whole, one a batch.

    Args:
        root: the folder in which ``hd1k`` lies.
        held_out: fraction of the pairs, the last ones, that are not trained on and that are validated and tested on;
            0 trains and tests on all.
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
        held_out: float = 0.0,
        crop_height: int = 368,
        crop_width: int = 768,
        min_scale: float = -0.5,
        max_scale: float = 0.2,
        batch_size: int = 6,
        num_workers: int = 4,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        self.held_out = held_out
        self.changes = SparseFlowAugmentation(crop_height, crop_width, min_scale, max_scale)

    def load(self) -> Splits[Dataset[FlowSample]]:
        """Find the files; see :meth:`Published.read` for the errors."""
        train, whole = (HD1K.read(self.root, "train", augmentation=changes) for changes in (self.changes, None))
        return held_out(train, whole, self.held_out)

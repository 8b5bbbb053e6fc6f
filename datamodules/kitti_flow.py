"""KITTI 2015: 200 pairs of about 375x1242 from a car, with flow where a laser scanner saw it.

M. Menze and A. Geiger, "Object scene flow for autonomous vehicles", CVPR 2015.
"""

from __future__ import annotations

from torch.utils.data import Dataset
from torchvision import datasets

from .base import Splits
from .flow import FlowSample
from .flow_augmentation import SparseFlowAugmentation
from .published_flow import Published, PublishedFlowDataModule, held_out

KITTI = Published(
    "KITTI 2015",
    datasets.KittiFlow,
    "KittiFlow/training/image_2/*_{10,11}.png and KittiFlow/training/flow_occ/*_10.png",
    "https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php?benchmark=flow (data_scene_flow.zip; rename its folder)",
)


class KittiFlowDataModule(PublishedFlowDataModule):
    """KITTI 2015's 200 training pairs, the last stage of the published recipes, and a test of all others.

    The files are laid out as torchvision reads them: ``root/KittiFlow/training/image_2`` and ``flow_occ``. The flow of
    the pairs of the benchmark's test is not public. As published, all 200 pairs are trained on, and the validation and
    the test pairs are the same 200: their numbers say how well a model knows them. For a model trained on other sets
    they are a true test; for one trained here choose ``held_out``.

    Training pairs are changed as :class:`SparseFlowAugmentation` says, not mirrored: cars keep to one side. The others
    are given whole, one a batch, as their sizes differ.

    Args:
        root: the folder in which ``KittiFlow`` lies.
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
        crop_height: int = 288,
        crop_width: int = 960,
        min_scale: float = -0.2,
        max_scale: float = 0.4,
        batch_size: int = 6,
        num_workers: int = 4,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        self.held_out = held_out
        self.changes = SparseFlowAugmentation(crop_height, crop_width, min_scale, max_scale, flip=False)

    def load(self) -> Splits[Dataset[FlowSample]]:
        """Find the files; see :meth:`Published.read` for the errors."""
        train, whole = (KITTI.read(self.root, "train", augmentation=changes) for changes in (self.changes, None))
        return held_out(train, whole, self.held_out)

"""MPI Sintel: 1,041 training pairs of 436x1024 from an animated film, in 23 scenes, and the mixture trained with it.

D. J. Butler et al., "A naturalistic open source movie for optical flow evaluation", ECCV 2012.
"""

from __future__ import annotations

from typing import Literal

from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets

from .base import Splits
from .flow import FlowSample
from .flow_augmentation import DenseFlowAugmentation, SparseFlowAugmentation
from .flying_things import THINGS, render_of
from .hd1k import HD1K
from .kitti_flow import KITTI
from .published_flow import Published, PublishedFlowDataModule

SINTEL = Published(
    "MPI Sintel",
    datasets.Sintel,
    "Sintel/training/{clean,final}/<scene>/*.png and Sintel/training/flow/<scene>/*.flo",
    "http://sintel.is.tue.mpg.de (MPI-Sintel-complete.zip; rename its folder)",
)


class SintelDataModule(PublishedFlowDataModule):
    """MPI Sintel's training pairs: a test for models of other sets, and the third stage of the published recipes.

    The files are laid out as torchvision reads them: ``root/Sintel/training/clean``, ``final`` and ``flow``. The flow
    of the benchmark's test is not public: the validation and the test pairs are the 1,041 training pairs, in one
    render. For a model trained on other sets they are a true test, and this set needs none of the others; for one that
    was trained here they say how well it knows them.

    The published mixture of training, with how often each part is there in an epoch: Sintel clean 100 times, Sintel
    final 100 times, KITTI 2015 200 times, HD1K 5 times and FlyingThings3D clean once. A part whose root is not given
    is left out, with a warning when training begins; without any of them an epoch has both renders once.

    Training pairs are changed as :class:`DenseFlowAugmentation` says and those of KITTI and HD1K as
    :class:`SparseFlowAugmentation` says, with magnifications of their own: 2**-.3 to 2**.5 and 2**-.5 to 2**.2. The
    others are given whole, one a batch.

    Args:
        root: the folder in which ``Sintel`` lies.
        things_root: the folder in which ``FlyingThings3D`` lies; see :class:`FlyingThings3DDataModule`.
        kitti_root: the folder in which ``KittiFlow`` lies; see :class:`KittiFlowDataModule`.
        hd1k_root: the folder in which ``hd1k`` lies; see :class:`HD1KDataModule`.
        render: the images of validation and test: ``clean``, or ``final`` with blur, fog and shading.
        crop_height: height of the training images, in pixels.
        crop_width: width of the training images, in pixels.
        min_scale: base-2 logarithm of the smallest magnification of Sintel and FlyingThings3D in training.
        max_scale: that of the largest.
        batch_size: pairs a batch of training, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    def __init__(
        self,
        root: str = "data",
        things_root: str | None = None,
        kitti_root: str | None = None,
        hd1k_root: str | None = None,
        render: Literal["clean", "final"] = "final",
        crop_height: int = 368,
        crop_width: int = 768,
        min_scale: float = -0.2,
        max_scale: float = 0.6,
        batch_size: int = 6,
        num_workers: int = 4,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        self.things_root = things_root
        self.kitti_root = kitti_root
        self.hd1k_root = hd1k_root
        self.render = render_of(render)
        self.changes = DenseFlowAugmentation(crop_height, crop_width, min_scale, max_scale)
        self.kitti_changes = SparseFlowAugmentation(crop_height, crop_width, -0.3, 0.5)
        self.hd1k_changes = SparseFlowAugmentation(crop_height, crop_width, -0.5, 0.2)

    def setup(self, stage: str | None = None) -> None:
        """Find the files, and warn before training of the parts of the mixture that are left out."""
        super().setup(stage)
        roots = {"things_root": self.things_root, "kitti_root": self.kitti_root, "hd1k_root": self.hd1k_root}
        missing = [name for name, root in roots.items() if root is None]
        if missing and stage in {"fit", None}:
            rank_zero_warn(
                f"training on Sintel without {', '.join(missing)}: the published mixture has FlyingThings3D, "
                f"KITTI 2015 and HD1K too. Give {' '.join(f'--data.{name} FOLDER' for name in missing)} to add them"
            )

    def load(self) -> Splits[Dataset[FlowSample]]:
        """Find the files; see :meth:`Published.read` for the errors."""
        whole = SINTEL.read(self.root, "train", self.render)
        others: list[Dataset[FlowSample]] = []
        if self.things_root is not None:
            others.append(THINGS.read(self.things_root, "train", "clean", augmentation=self.changes))
        if self.kitti_root is not None:
            others += [KITTI.read(self.kitti_root, "train", augmentation=self.kitti_changes)] * 200
        if self.hd1k_root is not None:
            others += [HD1K.read(self.hd1k_root, "train", augmentation=self.hd1k_changes)] * 5
        own: Dataset[FlowSample] = SINTEL.read(self.root, "train", "both", augmentation=self.changes)
        train = ConcatDataset([own] * 100 + others) if others else own
        return Splits(train, whole, whole)

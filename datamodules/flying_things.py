"""FlyingThings3D: more than 20,000 training frames of 540x960 from each camera, things that fly through rooms.

N. Mayer et al., "A large dataset to train convolutional networks for disparity, optical flow, and scene flow
estimation", CVPR 2016.
"""

from __future__ import annotations

from typing import Literal

from torch.utils.data import Dataset
from torchvision import datasets

from .base import Splits
from .flow import FlowSample
from .flow_augmentation import DenseFlowAugmentation
from .published_flow import Published, PublishedFlowDataModule

THINGS = Published(
    "FlyingThings3D",
    datasets.FlyingThings3D,
    "FlyingThings3D/{frames_cleanpass,frames_finalpass}/{TRAIN,TEST}/<A,B,C>/<scene>/left/*.png and "
    "FlyingThings3D/optical_flow/{TRAIN,TEST}/<A,B,C>/<scene>/{into_future,into_past}/left/*.pfm",
    "https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html (of FlyingThings3D, the full "
    "set: RGB images, cleanpass and finalpass, and optical flow)",
)


class FlyingThings3DDataModule(PublishedFlowDataModule):
    """FlyingThings3D, the second stage of the published recipes.

    The files are laid out as torchvision reads them: ``root/FlyingThings3D/frames_cleanpass``, ``frames_finalpass``
    and ``optical_flow``. In training both renders are seen, in evaluation one of them; always from the left camera,
    and both forwards and backwards in time. The validation and the test pairs are those of the part ``TEST``.

    Training pairs are changed as :class:`DenseFlowAugmentation` says, the others are given whole, one a batch.

    Args:
        root: the folder in which ``FlyingThings3D`` lies.
        render: the images of validation and test: ``clean``, or ``final`` with motion blur and depth of field.
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
        render: Literal["clean", "final"] = "final",
        crop_height: int = 400,
        crop_width: int = 720,
        min_scale: float = -0.4,
        max_scale: float = 0.8,
        batch_size: int = 6,
        num_workers: int = 4,
    ) -> None:
        super().__init__(root, batch_size, num_workers)
        self.render = render_of(render)
        self.changes = DenseFlowAugmentation(crop_height, crop_width, min_scale, max_scale)

    def load(self) -> Splits[Dataset[FlowSample]]:
        """Find the files; see :meth:`Published.read` for the errors."""
        test = THINGS.read(self.root, "test", self.render)
        return Splits(THINGS.read(self.root, "train", "both", augmentation=self.changes), test, test)


def render_of(render: str) -> str:
    """``clean`` or ``final``; else a ValueError."""
    if render not in ("clean", "final"):
        raise ValueError(f"render is 'clean' or 'final'; given: {render!r}")
    return render

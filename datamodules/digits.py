"""The 8x8 digits of scikit-learn: 1,797 real handwritten digits that ship inside that package.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from .base import Splits
from .image import ImageDataModule, ImageDataset, SplitIndices


def digits_split() -> SplitIndices:
    """The 1,257 training, 180 validation and 360 test indices of the 1,797 digits, as int64 arrays.

    They never change. scikit-learn alone gives the same arrays, in the same order, from two lines, where ``labels`` is
    ``load_digits().target``::

        rest, test = train_test_split(np.arange(1797), test_size=360, stratify=labels, random_state=0)
        train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    """
    labels = load_digits().target
    rest, test = train_test_split(np.arange(1797), test_size=360, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    return SplitIndices(train, val, test)


@dataclass(frozen=True)
class RandomAffine:
    """Shifts, turns and scales each image of a batch by its own random amounts, bilinearly, all images at once.

    The output at pixel p, measured from the image's centre, is the input at A p + t, with A a rotation times a scale
    and t a shift; outside the image the input is 0. Each amount is uniform in plus or minus its bound, and drawn from
    torch's global generator.

    Args:
        max_shift: pixels, along each axis.
        max_rotation: degrees.
        max_scale: fraction; 0.1 scales by 0.9 to 1.1.
    """

    max_shift: float
    max_rotation: float
    max_scale: float

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("max_shift", self.max_shift, math.inf),
            ("max_rotation", self.max_rotation, math.inf),
            ("max_scale", self.max_scale, 1),
        ):
            if not 0 <= value < limit:
                raise ValueError(f"{name} is at least 0 and below {limit}; given: {value!r}")

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] -> the same shape and range."""
        B, _, H, W = images.shape
        x, y, angle, scale = 2 * torch.rand(4, B, dtype=images.dtype, device=images.device) - 1
        x, y = self.max_shift * x, self.max_shift * y
        angle, scale = math.radians(self.max_rotation) * angle, 1 + self.max_scale * scale
        cos, sin = scale * angle.cos(), scale * angle.sin()
        # grid_sample measures each axis in halves of the image, so a pixel is 2/W wide and 2/H high.
        A = torch.stack([cos, -sin * H / W, 2 * x / W, sin * W / H, cos, 2 * y / H], dim=1)
        grid = affine_grid(A.view(B, 2, 3), list(images.shape), align_corners=False)
        return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp(0, 1)


class DigitsDataModule(ImageDataModule[ImageDataset]):
    """The 1,797 real 8x8 digits of scikit-learn; nothing to download.

    Images are ``(1, 8, 8)``. The split (1,257 training, 180 validation, 360 test) is that of :func:`digits_split`.

    Args:
        batch_size: images a batch, on each device.
        num_workers: processes that prepare batches; 0, in the training process, is fastest for a set this small.
        augment: shift, turn and scale each training image at random, anew in every epoch.
        max_shift: largest shift along each axis, in pixels.
        max_rotation: largest rotation either way, in degrees.
        max_scale: largest change of scale either way, as a fraction.
    """

    image_shape = (1, 8, 8)
    class_names = tuple("0123456789")

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        augment: bool = True,
        max_shift: float = 0.5,
        max_rotation: float = 10.0,
        max_scale: float = 0.1,
    ) -> None:
        super().__init__(batch_size, num_workers)
        transform = RandomAffine(max_shift, max_rotation, max_scale)
        self.augmentation = transform if augment else None

    def load(self) -> Splits[ImageDataset]:
        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target)
        return Splits(*(ImageDataset(images[part], labels[part], white=16) for part in digits_split()))

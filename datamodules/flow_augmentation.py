"""The augmentation of optical flow training in RAFT's recipes: colours, an eraser, scale, stretch, mirrors and a crop.

Z. Teed and J. Deng, "RAFT: recurrent all-pairs field transforms for optical flow", ECCV 2020, and its published code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from .base import whole_number

Pair = tuple[Tensor, Tensor, Tensor, Tensor]
"""``(image1 (3, H, W), image2 (3, H, W), flow (2, H, W), valid (H, W))``; see :class:`FlowDataModule`."""


@dataclass(frozen=True)
class FlowAugmentation(ABC):
    """Changes one pair of images and its flow together, so that the flow stays true.

    In this order:

    1. Colours: brightness, contrast, saturation and hue change by random amounts, as one image for both or, with
       probability ``asymmetric``, for each by itself.
    2. Eraser: with probability .5 one or two rectangles, of 50 to 99 pixels a side, of image 2 take its mean colour.
    3. Size: with probability .8 both images are magnified by ``2**s``, s uniform from ``min_scale`` to ``max_scale``;
       with probability ``stretch``, height and width then once more by ``2**t``, t uniform in [-.2, .2], each by its
       own. No side is magnified by less than makes the image ``spare`` pixels higher and wider than the crop:
       smaller images are enlarged, whatever was drawn. Sizes are whole pixels, and the flow is multiplied by the ratios
       of the sizes, exactly. Images are resized bilinearly, without smoothing.
    4. Mirrors, if ``flip``: left and right with probability .5, top and bottom with probability ``upside_down``.
    5. Crop: ``height`` x ``width`` at a random place. A place that is drawn up to ``overhang`` pixels outside of the
       image, below it or at its sides, is moved inside, so that pixels near these edges are not seen too rarely.

    The random numbers come from torch's global generator.

    Args:
        height: of the crop, in pixels.
        width: of the crop, in pixels.
        min_scale: base-2 logarithm of the smallest magnification.
        max_scale: that of the largest.
        flip: whether pairs are mirrored.
    """

    height: int
    width: int
    min_scale: float
    max_scale: float
    flip: bool = True

    jitter: ClassVar[v2.ColorJitter]
    asymmetric: ClassVar[float]
    stretch: ClassVar[float]
    upside_down: ClassVar[float]
    spare: ClassVar[int]
    overhang: ClassVar[tuple[int, int]]
    """Below the image, and at each of its sides."""

    def __post_init__(self) -> None:
        whole_number("crop_height", self.height, at_least=1)
        whole_number("crop_width", self.width, at_least=1)
        if not -math.inf < self.min_scale <= self.max_scale < math.inf:
            raise ValueError(
                "min_scale and max_scale are finite numbers, the base-2 logarithms of the smallest and the largest "
                f"magnification; given: {self.min_scale!r} and {self.max_scale!r}"
            )

    @abstractmethod
    def resize_flow(self, flow: Tensor, valid: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Flow ``(2, H, W)`` and where it is known ``(H, W)``, at another size; the vectors keep their lengths."""

    def __call__(self, image1: Tensor, image2: Tensor, flow: Tensor, valid: Tensor) -> Pair:
        """Images in [0, 1] ``(3, H, W)``, flow ``(2, H, W)``, valid ``(H, W)`` -> the same, of the crop's size."""
        image1, image2 = self._recoloured(image1, image2)
        if _happens(0.5):
            image2 = _erased(image2)
        pair = self._resized(image1, image2, flow, valid)
        if self.flip and _happens(0.5):
            pair = _mirrored(*pair, axis=-1)
        if self.flip and _happens(self.upside_down):
            pair = _mirrored(*pair, axis=-2)
        return self._cropped(*pair)

    def _recoloured(self, image1: Tensor, image2: Tensor) -> tuple[Tensor, Tensor]:
        if _happens(self.asymmetric):
            return self.jitter(image1), self.jitter(image2)
        image1, image2 = self.jitter(torch.cat([image1, image2], dim=1)).chunk(2, dim=1)
        return image1, image2

    def _resized(self, image1: Tensor, image2: Tensor, flow: Tensor, valid: Tensor) -> Pair:
        H, W = valid.shape
        sy = sx = 1.0
        if _happens(0.8):
            sy = sx = 2 ** _uniform(self.min_scale, self.max_scale)
            if _happens(self.stretch):
                sy, sx = sy * 2 ** _uniform(-0.2, 0.2), sx * 2 ** _uniform(-0.2, 0.2)
        least = max((self.height + self.spare) / H, (self.width + self.spare) / W)
        h, w = round(H * max(sy, least)), round(W * max(sx, least))
        if (h, w) == (H, W):
            return image1, image2, flow, valid
        images = interpolate(torch.stack([image1, image2]), (h, w), mode="bilinear", align_corners=False)
        flow, valid = self.resize_flow(flow, valid, h, w)
        return images[0], images[1], flow * flow.new_tensor([w / W, h / H]).view(2, 1, 1), valid

    def _cropped(self, image1: Tensor, image2: Tensor, flow: Tensor, valid: Tensor) -> Pair:
        below, beside = self.overhang
        rows, columns = (side - crop for side, crop in zip(valid.shape, (self.height, self.width), strict=True))
        top = min(int(torch.randint(0, rows + below + 1, ())), rows)
        left = min(max(int(torch.randint(-beside, columns + beside + 1, ())), 0), columns)
        y, x = slice(top, top + self.height), slice(left, left + self.width)
        # Copies: a view would hold all of the resized image, and send it from a worker to the training process.
        image1, image2, flow, valid = (each[..., y, x].clone() for each in (image1, image2, flow, valid))
        return image1, image2, flow, valid


class DenseFlowAugmentation(FlowAugmentation):
    """For sets whose flow is known at nearly every pixel: it is resized bilinearly.

    Where a pixel of which the flow is not known would weigh in, it is not known afterwards.
    """

    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.5 / math.pi)
    asymmetric = 0.2
    stretch = 0.8
    upside_down = 0.1
    spare = 8
    overhang = (0, 0)

    def resize_flow(self, flow: Tensor, valid: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        together = torch.cat([flow * valid, valid.unsqueeze(0).to(flow.dtype)]).unsqueeze(0)
        (resized,) = interpolate(together, (height, width), mode="bilinear", align_corners=False)
        known = resized[2] > 0.999
        return resized[:2] * known, known


class SparseFlowAugmentation(FlowAugmentation):
    """For sets whose flow is known at scattered pixels: each of them moves to the pixel nearest to its new place.

    Of two that come to the same pixel the later one in the image stays. No vector is made from others.
    """

    jitter = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3 / math.pi)
    asymmetric = 0.0
    stretch = 0.0
    upside_down = 0.0
    spare = 1
    overhang = (20, 50)

    def resize_flow(self, flow: Tensor, valid: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        H, W = valid.shape
        y, x = valid.nonzero(as_tuple=True)
        row, column = (
            ((at + 0.5) * (new / old) - 0.5).round().long() for at, new, old in ((y, height, H), (x, width, W))
        )
        order = torch.arange(len(y))
        last = torch.full((height * width,), -1).scatter_reduce(0, row * width + column, order, "amax")
        last = last.view(height, width)
        resized = flow.new_zeros(2, height, width)
        resized[:, last >= 0] = flow[:, y, x][:, last[last >= 0]]
        return resized, last >= 0


def _happens(probability: float) -> bool:
    return float(torch.rand(())) < probability


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _erased(image: Tensor) -> Tensor:
    """A copy in which one or two rectangles have the mean colour of the image ``(3, H, W)``."""
    H, W = image.shape[1:]
    mean, image = image.mean(dim=(1, 2)).view(3, 1, 1), image.clone()
    for _ in range(int(torch.randint(1, 3, ()))):
        top, left = int(torch.randint(H, ())), int(torch.randint(W, ()))
        height, width = torch.randint(50, 100, (2,)).tolist()
        image[:, top : top + height, left : left + width] = mean
    return image


def _mirrored(image1: Tensor, image2: Tensor, flow: Tensor, valid: Tensor, axis: int) -> Pair:
    """Left and right change places for ``axis=-1``, top and bottom for -2."""
    image1, image2, flow, valid = (each.flip(axis) for each in (image1, image2, flow, valid))
    u, v = flow
    return image1, image2, torch.stack([-u, v] if axis == -1 else [u, -v]), valid

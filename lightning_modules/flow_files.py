"""Optical flow as files: Middlebury's and KITTI's formats, and pictures in colours."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import flow_to_image

from .png import write_png

MAGIC = 202021.25
"""The float32 number that a ``.flo`` file begins with."""


def write_flo(path: Path, flow: Tensor) -> None:
    """Flow ``(2, H, W)``, in pixels, as a ``.flo`` file (Baker et al., "A Database and Evaluation Methodology", 2011).

    That is, little-endian: the float32 202021.25, the int32 width and height, and float32 (u, v) row by row.
    """
    _, H, W = flow.shape
    values = flow.permute(1, 2, 0).float().cpu().contiguous()
    path.write_bytes(struct.pack("<fii", MAGIC, W, H) + values.numpy().astype("<f4").tobytes())


def write_kitti(path: Path, flow: Tensor) -> None:
    """Flow ``(2, H, W)``, in pixels, as a PNG file of 16 bits (Menze and Geiger, "Object Scene Flow", 2015).

    Red is 64 u + 2^15, green is 64 v + 2^15, rounded to whole numbers, and blue is 1 where the flow is known. Pixels
    whose flow is not finite, or for which the format has no room, below -512 or above 511.98, are written as not known.
    """
    values = (64 * flow.double() + 2**15).round()
    known = ((values >= 0) & (values < 2**16)).all(dim=0, keepdim=True)
    write_png(path, torch.cat([values.where(known, 0), known]).to(torch.int32))


def longest(flow: Tensor) -> Tensor:
    """The greatest length of a flow ``(2, H, W)``, in pixels; 0 where none is finite."""
    length = flow.float().square().sum(dim=0).sqrt()
    return length.where(length.isfinite(), 0).amax()


def colour_picture(flow: Tensor, scale: Tensor | None = None) -> Tensor:
    """Flow in colours: the hue is its direction, and it is the stronger the longer it is; white does not move.

    Args:
        flow: ``(2, H, W)``, in pixels.
        scale: the length, in pixels, that has the full colour; longer ones have it too. The longest of the flow if not
            given.

    Returns:
        uint8 ``(3, H, W)``, the colours of ``torchvision.utils.flow_to_image``. What is not finite is white.
    """
    flow = flow.detach().float().cpu()
    flow = flow.where(flow.isfinite().all(dim=0), 0)
    scale = longest(flow) if scale is None else scale.cpu()
    if scale == 0:
        return flow.new_full((3, *flow.shape[1:]), 255, dtype=torch.uint8)
    flow = flow * (scale / flow.square().sum(dim=0).sqrt().clamp_min(1e-30)).clamp_max(1)
    # torchvision scales by the longest: a pixel that is so long as the scale, which is taken away again.
    mark = flow.new_zeros(2, flow.shape[1], 1)
    mark[0] = scale
    picture: Tensor = flow_to_image(torch.cat([flow, mark], dim=2))
    return picture[:, :, :-1]


def comparison(image: Tensor, target: Tensor, flow: Tensor, samples: int = 3) -> Tensor:
    """The first image, the flow that is known and the one that was found, side by side, one sample below another.

    Args:
        image: ``(B, 3, H, W)`` in [0, 1].
        target: ``(B, 2, H, W)``, in pixels; 0, and so white, where it is not known.
        flow: ``(B, 2, H, W)``, in pixels.
        samples: at most so many.

    Returns:
        uint8 ``(3, samples H, 3 W)``. Both flows of a sample are on one scale, whose end is the longest of the target,
        or of what was found where that does not move.
    """
    rows = []
    for one, true, found in zip(image[:samples], target[:samples], flow[:samples], strict=True):
        scale = longest(true) or longest(found)
        pixels = (255 * one.float().cpu().clamp(0, 1)).round().to(torch.uint8)
        rows.append(torch.cat([pixels, colour_picture(true, scale), colour_picture(found, scale)], dim=2))
    return torch.cat(rows, dim=1)

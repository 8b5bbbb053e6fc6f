"""All-pairs correlation of two feature maps, and the look-up of a window in it (Teed and Deng, "RAFT", ECCV 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def correlation_pyramid(F1: Tensor, F2: Tensor, levels: int) -> tuple[Tensor, ...]:
    """C_ij = F1_i . F2_j / sqrt(D) for all places i of the first map and j of the second, at several resolutions.

    Level l is level 0 averaged over squares of 2^l x 2^l places j (RAFT, section 3.2).

    Args:
        F1, F2: ``(B, D, h, w)``.
        levels: how many; 2^levels is to be at most h and w, so that the last one has two places each way.

    Returns:
        ``(B, h w, h // 2^l, w // 2^l)`` for each level l, batch first as inputs of an equilibrium are.
    """
    B, D, h, w = F1.shape
    volume = torch.bmm(F1.flatten(2).mT, F2.flatten(2)) / math.sqrt(D)
    pyramid = [volume.view(B, h * w, h, w)]
    for _ in range(levels - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return tuple(pyramid)


def look_up(pyramid: Sequence[Tensor], c: Tensor, radius: int) -> Tensor:
    """The correlation of each place i with the window of places around c_i / 2^l, at every level l.

    Args:
        pyramid: of :func:`correlation_pyramid`.
        c: ``(B, 2, h, w)``, where in the second map, as (x, y) in places of level 0. Values between places are
            interpolated bilinearly, and are 0 outside the map.
        radius: r, in places of each level.

    Returns:
        ``(B, levels (2r + 1)^2, h, w)``: level by level; in a window the x offset changes slowest, as in RAFT.
    """
    B, _, h, w = c.shape
    side = 2 * radius + 1
    offset = torch.arange(-radius, radius + 1, device=c.device, dtype=c.dtype)
    centres = c.permute(0, 2, 3, 1).reshape(B * h * w, 1, 1, 2)
    found = []
    for level, volume in enumerate(pyramid):
        H, W = volume.shape[2:]
        # grid_sample counts from -1 to 1, from the first place to the last
        x = (centres[..., 0] / 2**level + offset.view(side, 1)) * (2 / (W - 1)) - 1
        y = (centres[..., 1] / 2**level + offset) * (2 / (H - 1)) - 1
        grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
        values = F.grid_sample(volume.reshape(B * h * w, 1, H, W), grid, align_corners=True)
        found.append(values.view(B, h, w, side * side))
    return torch.cat(found, dim=3).permute(0, 3, 1, 2).contiguous()

"""A small model of optical flow, and pairs of images to give it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_modules import OpticalFlow
from zoo.implicit import FixedPointIteration

SMALL: dict[str, Any] = {
    "hidden": 6, "feature_width": 6, "encoder_widths": [4, 4, 4, 4], "corr_widths": [4, 4], "flow_widths": [4, 4],
    "motion_width": 4, "head_width": 4, "mask_width": 4, "corr_levels": 1, "corr_radius": 1,
}  # fmt: skip

MEASURES = ("epe", "epe_per_image", "epe_zero", "1px", "3px", "f1_all", "epe_visible", "epe_occluded")


def small(model_args: dict[str, Any] | None = None, **arguments: Any) -> OpticalFlow:
    """The same small module each time, but for ``arguments``. It does not mind that random weights do not converge."""
    choices = {"solver": FixedPointIteration(tol=1e-3, norm="absolute", max_steps=6), "losses": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = OpticalFlow(model_args={**SMALL, **(model_args or {})}, **{**choices, **arguments})
    module.model.deq.on_failure = "ignore"
    return module


def pairs(count: int = 5, size: tuple[int, int] = (16, 24), seed: int = 0, occluded: bool = True) -> TensorDataset:
    """Random images and flow, a third of which is not known, and the last image's not at all."""
    generator = torch.Generator().manual_seed(seed)
    image1, image2 = torch.rand(2, count, 3, *size, generator=generator)
    valid = torch.rand(count, *size, generator=generator) < 0.7
    valid[-1] = False
    flow = 4 * torch.randn(count, 2, *size, generator=generator)
    flow[~valid.unsqueeze(1).expand_as(flow)] = 0
    hidden = torch.rand(count, *size, generator=generator) < 0.2
    return TensorDataset(image1, image2, flow, valid, *([hidden] if occluded else []))


def sequences(count: int = 2, frames: int = 4, size: tuple[int, int] = (16, 24)) -> TensorDataset:
    """Random frames and flow, as a data module of sequences gives them."""
    generator = torch.Generator().manual_seed(1)
    flow = 4 * torch.randn(count, frames - 1, 2, *size, generator=generator)
    masks = torch.rand(2, count, frames - 1, *size, generator=generator) < 0.5
    return TensorDataset(torch.rand(count, frames, 3, *size, generator=generator), flow, *masks)


def batch_of(data: TensorDataset) -> list[Tensor]:
    return list(data.tensors)

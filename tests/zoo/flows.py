"""A small model of optical flow, and images for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.flow import DEQFlow

SMALL: dict[str, Any] = {
    "hidden": 8,
    "feature_width": 8,
    "encoder_widths": (4, 4, 4, 8),
    "corr_widths": (8, 4),
    "flow_widths": (4, 4),
    "motion_width": 8,
    "head_width": 8,
    "mask_width": 8,
    "corr_levels": 2,
    "corr_radius": 1,
}


class Pulled(nn.Module):
    """Half of what another cell gives: a contraction, whose equilibrium is found in a few steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell: Any = cell

    def forward(self, z: Any, *inputs: Any) -> Any:
        return tuple(0.5 * f for f in self.cell(z, *inputs))

    def initial_state(self, *inputs: Any) -> Any:
        return self.cell.initial_state(*inputs)


def model(contracting: bool = False, **changes: Any) -> DEQFlow:
    """A small one in eval mode, silent about solves that fail, as with random weights they do."""
    torch.manual_seed(0)
    flow = DEQFlow(**{**SMALL, **changes}).eval()
    flow.deq.on_failure = "ignore"
    if contracting:
        flow.deq.cell = Pulled(flow.deq.cell)
        flow.deq.on_failure = "raise"
    return flow


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)

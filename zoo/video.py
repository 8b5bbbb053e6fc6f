"""Flow of a video: each solve starts where the one before ended, moved along by its own flow."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .flow import DEQFlow


class FlowState(NamedTuple):
    """The equilibrium of a :class:`~zoo.DEQFlow`.

    Attributes:
        h: ``(B, C, h, w)``.
        flow: ``(B, 2, h, w)``, in places of 8 pixels.
    """

    h: Tensor
    flow: Tensor


def moved_on(state: FlowState) -> FlowState:
    """The state a frame later, if everything goes on as it moves: what is at p goes to p + flow(p).

    Each value is shared among the four places around its target by bilinear weights; a place takes the weighted mean
    of what arrives, or keeps its own value where nothing does. The published warm start (Bai et al., CVPR 2022,
    section 4.3) moves the flow alone, as RAFT's does.
    """
    h, flow = state
    B, C, height, width = h.shape
    values = torch.cat([h, flow, torch.ones_like(flow[:, :1])], dim=1).flatten(2)  # (B, C + 3, h w)
    y, x = torch.meshgrid(
        torch.arange(height, device=h.device, dtype=flow.dtype),
        torch.arange(width, device=h.device, dtype=flow.dtype),
        indexing="ij",
    )
    to_x, to_y = flow[:, 0] + x, flow[:, 1] + y  # (B, h, w)
    arrived = torch.zeros_like(values)
    for corner_x in (to_x.floor(), to_x.floor() + 1):
        for corner_y in (to_y.floor(), to_y.floor() + 1):
            weight = (1 - (to_x - corner_x).abs()) * (1 - (to_y - corner_y).abs())
            inside = (corner_x >= 0) & (corner_x < width) & (corner_y >= 0) & (corner_y < height)
            place = (corner_y * width + corner_x).where(inside, 0).long().flatten(1).unsqueeze(1)
            weighted = values * weight.where(inside, 0).flatten(1).unsqueeze(1)
            arrived.scatter_add_(2, place.expand_as(values), weighted)
    total = arrived[:, -1:]
    mean = torch.where(total > 1e-3, arrived / total.clamp_min(1e-3), values).view(B, C + 3, height, width)
    return FlowState(mean[:, :C], mean[:, C : C + 2])


def next_start(state: FlowState) -> FlowState:
    """Where the next solve starts, without a gradient: the state :func:`moved_on`, or rest where it is not finite."""
    h, flow = (x.detach() for x in state)
    finite = (h.isfinite().flatten(1).all(dim=1) & flow.isfinite().flatten(1).all(dim=1)).view(-1, 1, 1, 1)
    return moved_on(FlowState(h.where(finite, 0), flow.where(finite, 0)))


class FlowStream:
    """Takes the frames of a video one by one, and gives the flow from each to the next.

    The features of a frame are computed once, and a solve starts from the equilibrium of the one before, moved on by
    its flow. Nothing is recorded for gradients.

    Args:
        model: in eval mode.
        warm_start: False starts every solve from rest.

    Example:
        >>> stream = model.stream()
        >>> for frame in video:
        ...     flow = stream(frame)  # None for the first
    """

    def __init__(self, model: DEQFlow, warm_start: bool = True) -> None:
        self.model = model
        self.warm_start = warm_start
        self.reset()

    def reset(self) -> None:
        """Forget the frames so far: another video begins."""
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self._state: FlowState | None = None

    @torch.no_grad()
    def __call__(self, frame: Tensor) -> Tensor | None:
        """The flow from the frame before to this one, ``(B, 2, H, W)`` in pixels; None for the first.

        Args:
            frame: ``(B, 3, H, W)``, floating in [0, 1] or uint8.

        Raises:
            InputError: the frame is not as described, or of another shape than the one before.
        """
        model = self.model
        model.check_images(frame, frame)
        if self._before is not None and self._before[0].shape != frame.shape:
            raise InputError(
                f"the frames of a video have one shape: {tuple(self._before[0].shape)} until now; given: "
                f"{tuple(frame.shape)}. Call reset() where another video begins"
            )
        F2 = model.features(frame)
        flow = None
        if self._before is not None:
            image1, F1, context = self._before
            (state,) = model.solved(F1, F2, context, self._start())
            flow, self._state = model.upsampled(state, image1.shape[2:]), state
        self._before = frame, F2, model.context(frame)
        return flow

    def _start(self) -> FlowState | None:
        return next_start(self._state) if self._state is not None and self.warm_start else None

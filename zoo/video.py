"""Flow of a video: each solve starts from the flow of the one before, moved on by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .implicit.unroll import check_steps

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


def moved_on(flow: Tensor) -> Tensor:
    """The flow a frame later, if all goes on as it moves: what is at p is then at p + flow(p), and moves as before.

    Each vector is shared among the four pixels around its target by bilinear weights; a pixel takes the weighted mean
    of what arrives, or keeps its own vector where nothing does.

    Shape:
        ``(B, 2, H, W)`` in pixels -> the same.
    """
    _, _, height, width = flow.shape
    values = torch.cat([flow, torch.ones_like(flow[:, :1])], dim=1).flatten(2)  # (B, 3, H W)
    y = torch.arange(height, device=flow.device, dtype=flow.dtype).view(height, 1)
    x = torch.arange(width, device=flow.device, dtype=flow.dtype)
    to_x, to_y = flow[:, 0] + x, flow[:, 1] + y  # (B, H, W)
    arrived = torch.zeros_like(values)
    for corner_x in (to_x.floor(), to_x.floor() + 1):
        for corner_y in (to_y.floor(), to_y.floor() + 1):
            weight = (1 - (to_x - corner_x).abs()) * (1 - (to_y - corner_y).abs())
            inside = (corner_x >= 0) & (corner_x < width) & (corner_y >= 0) & (corner_y < height)
            place = (corner_y * width + corner_x).where(inside, 0).long().flatten(1).unsqueeze(1)
            arrived.scatter_add_(2, place.expand_as(values), values * weight.where(inside, 0).flatten(1).unsqueeze(1))
    total = arrived[:, 2:]
    return torch.where(total > 1e-3, arrived[:, :2] / total.clamp_min(1e-3), values[:, :2]).view_as(flow)


class FlowStream:
    """Takes the frames of a video one by one, and gives the flow from each to the next.

    The features of a frame are computed once, and a solve starts from the flow of the one before, moved on by itself
    (Bai et al., CVPR 2022, section 4.3). Nothing is recorded for gradients.

    Args:
        model: in eval mode.
        warm_start: False starts every solve from rest. Where solves do not converge, what they creep is carried on
            from frame to frame by a warm start; then start from rest, or take few ``steps``.
        steps: from the second pair on apply the cell so often, in place of solving to the model's tolerance. After a
            warm start two or three will do, where a solve from rest takes several times as many.

    Raises:
        ValueError: ``steps`` is no integer >= 1.

    Example:
        >>> stream = model.stream()
        >>> for frame in video:
        ...     flow = stream(frame)  # None for the first
    """

    def __init__(self, model: DEQFlow, warm_start: bool = True, steps: int | None = None) -> None:
        if steps is not None:
            check_steps("stream(steps=...)", steps)
        self.model = model
        self.warm_start = warm_start
        self.steps = steps
        self.reset()

    def reset(self) -> None:
        """Forget the frames so far: another video begins."""
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self._start: FlowState | None = None
        self._pairs = 0

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
            with self._few_steps() if self._pairs else nullcontext():
                (state,) = model.solved(F1, F2, context, self._start)
            flow = model.upsampled(state, image1.shape[2:])
            self._start = model.next_start(state) if self.warm_start else None
            self._pairs += 1
        self._before = frame, F2, model.context(frame)
        return flow

    @contextmanager
    def _few_steps(self) -> Iterator[None]:
        deq = self.model.deq
        before = deq.unrolled
        try:
            deq.unrolled = before if self.steps is None else self.steps
            yield
        finally:
            deq.unrolled = before

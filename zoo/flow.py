"""Deep equilibrium optical flow: RAFT's update, iterated to its fixed point.

Bai, Geng, Savani and Kolter, "Deep Equilibrium Optical Flow Estimation" (CVPR 2022). Encoders, update and upsampling
are torchvision's modules of RAFT (Teed and Deng, ECCV 2020), which reproduce the published model: it differs from RAFT
in that the hidden state starts at 0, that the context encoder gives nothing but the context, and that the mask of the
upsampling is looked at once, at the equilibrium.

Letters: B batch, H x W image, h x w = H/8 x W/8, C channels of the hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .correlation import correlation_pyramid, look_up
from .errors import InputError
from .implicit import (
    DEQ,
    FixedPointIteration,
    Gradient,
    ImplicitGradient,
    NeumannGradient,
    PhantomGradient,
    Solver,
    Trajectory,
    normalize_weights,
)
from .implicit.solvers.base import is_count
from .registry import register_model
from .video import FlowState, FlowStream, moved_on

Padding = Literal["both", "bottom"]
STRIDE = 8
"""Pixels a place of the feature maps."""


def pixel_grid(like: Tensor) -> Tensor:
    """(x, y) of each place of a map ``(B, *, h, w)``: ``(1, 2, h, w)``."""
    h, w = like.shape[2:]
    y = torch.arange(h, device=like.device, dtype=like.dtype).view(h, 1).expand(h, w)
    x = torch.arange(w, device=like.device, dtype=like.dtype).expand(h, w)
    return torch.stack([x, y]).unsqueeze(0)


class GlobalMotion(nn.Module):
    """m + gamma A V(m): motion of places that look alike, for those that are hidden (Jiang et al., ICCV 2021).

    Args:
        width: channels of the motion features m.

    Shape:
        m ``(B, M, h, w)``, attention A ``(B, h w, h w)`` -> ``(B, M, h, w)``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_v = nn.Conv2d(width, width, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, m: Tensor, attention: Tensor) -> Tensor:
        v = self.to_v(m).flatten(2).mT
        return m + self.gamma * torch.bmm(attention, v).mT.view_as(m)


class ContextAttention(nn.Module):
    """A = softmax(q k^T / sqrt(d)) over all places, with q and k from the context (Jiang et al., ICCV 2021).

    Shape:
        context ``(B, C, h, w)`` -> ``(B, h w, h w)``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qk = nn.Conv2d(width, 2 * width, 1, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        q, k = self.to_qk(context).flatten(2).chunk(2, dim=1)
        return torch.bmm(q.mT * q.shape[1] ** -0.5, k).softmax(dim=2)


class FlowCell(nn.Module):
    """f(h, v) = (h', v + D(h')): look up the correlation at p + v, encode that, update h, read a step of v off it.

    m = motion(v, look-up at p + v); h' = GRU(h, [context, m]); D is the flow head; p are the places of the first map.

    Args:
        hidden: channels of h and of the context.
        corr_widths, flow_widths, motion_width: of the motion encoder.
        head_width: of the flow head.
        corr_levels, corr_radius: of the look-up.
        gma: also give the GRU the global motion, for which f takes an attention.
        all_grad: whether gradients flow through v. If not, v is a constant to f in train mode, as in RAFT and in the
            published training on FlyingChairs: that is a rule of training, not the derivative of f.
        weight_norm: normalise the weights of all convolutions.

    Shape:
        state (h ``(B, C, h, w)``, v ``(B, 2, h, w)`` in places), context ``(B, C, h, w)``, a pyramid of
        :func:`~zoo.correlation.correlation_pyramid`, with ``gma`` an attention ``(B, h w, h w)`` -> state.
    """

    def __init__(
        self,
        hidden: int,
        corr_widths: Sequence[int],
        flow_widths: Sequence[int],
        motion_width: int,
        head_width: int,
        corr_levels: int,
        corr_radius: int,
        gma: bool,
        all_grad: bool,
        weight_norm: bool,
    ) -> None:
        from torchvision.models.optical_flow import raft  # here: its import takes as long as torch's own

        super().__init__()
        self.hidden = hidden
        self.corr_radius = corr_radius
        self.all_grad = all_grad
        self.update_block = raft.UpdateBlock(
            motion_encoder=raft.MotionEncoder(
                in_channels_corr=corr_levels * (2 * corr_radius + 1) ** 2,
                corr_layers=(corr_widths[0], corr_widths[1]),
                flow_layers=(flow_widths[0], flow_widths[1]),
                out_channels=motion_width,
            ),
            recurrent_block=raft.RecurrentBlock(
                input_size=hidden + motion_width * (2 if gma else 1), hidden_size=hidden
            ),
            flow_head=raft.FlowHead(in_channels=hidden, hidden_size=head_width),
        )
        self.aggregate = GlobalMotion(motion_width) if gma else None
        if weight_norm:
            normalize_weights(self, "weight")

    def forward(
        self,
        z: tuple[Tensor, Tensor],
        context: Tensor,
        pyramid: tuple[Tensor, ...],
        attention: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        h, v = z
        if self.training and not self.all_grad:
            v = v.detach()
        block = self.update_block
        m = block.motion_encoder(v, look_up(pyramid, pixel_grid(v) + v, self.corr_radius))
        u = [context, m]
        if self.aggregate is not None:
            u.append(self.aggregate(m, attention))
        h = block.recurrent_block(h, torch.cat(u, dim=1))
        return h, v + block.flow_head(h)

    def initial_state(self, context: Tensor, *_: Any) -> tuple[Tensor, ...]:
        """Both 0, in the dtype of the weights also where autocast made the context narrower."""
        B, size = context.shape[0], context.shape[2:]
        dtype = next(self.parameters()).dtype
        return tuple(context.new_zeros(B, C, *size, dtype=dtype) for C in (self.hidden, 2))


class DEQFlow(nn.Module):
    """Optical flow by an equilibrium: where each pixel of one image is in another.

    Args:
        hidden: channels of the hidden state, and of the context.
        feature_width: channels of the features that are correlated.
        encoder_widths: of both encoders: of the first convolution and of three pairs of residual blocks.
        corr_widths, flow_widths, motion_width, head_width, corr_levels, corr_radius, gma, all_grad: see
            :class:`FlowCell`.
        mask_width: of the predictor of the mask that upsamples the flow.
        normalize_features: bring each channel of the features to mean 0 and variance 1 over an image before they are
            correlated. Not published; a small model then finds its first matches several times sooner.
        weight_norm: normalise the weights of all convolutions of the cell.
        padding: where images whose size is no multiple of 8, or is below ``least_size``, are padded, by repeating
            their border: on all sides (``"both"``, published for Sintel), or at the bottom, left and right
            (``"bottom"``, published for KITTI).
        unrolled: apply the cell this many times instead of solving, as RAFT does.
        recompute: see :func:`~zoo.implicit.fixed_point`; saves memory in training.
        solver, gradient: see :class:`~zoo.implicit.DEQ`; by default those of the published models:
            plain iteration to an absolute residual of 1e-3, and one phantom step.

    Shape:
        two images ``(B, 3, H, W)``, floating in [0, 1] or uint8, of any size -> flow ``(B, 2, H, W)`` in pixels:
        what is at (x, y) in the first image is at (x + flow[:, 0], y + flow[:, 1]) in the second.

    Raises:
        ValueError: an argument is not as described.

    Attributes:
        deq: the equilibrium layer; ``deq.report`` tells of the last solve.
        multiple: images are padded to multiples of so many pixels.
        least_size: and to at least so many.

    Example:
        >>> flow = model(image1, image2)
        >>> for frame in video:  # each solve starts where the one before ended
        ...     flow = stream(frame)
    """

    def __init__(
        self,
        hidden: int = 128,
        feature_width: int = 256,
        encoder_widths: Sequence[int] = (64, 64, 96, 128),
        corr_widths: Sequence[int] = (256, 192),
        flow_widths: Sequence[int] = (128, 64),
        motion_width: int = 128,
        head_width: int = 256,
        mask_width: int = 256,
        corr_levels: int = 4,
        corr_radius: int = 4,
        gma: bool = False,
        all_grad: bool = True,
        normalize_features: bool = False,
        weight_norm: bool = True,
        padding: Padding = "both",
        unrolled: int | None = None,
        recompute: bool = False,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        from torchvision.models.optical_flow import raft  # as in the cell

        super().__init__()
        counts = {
            "hidden": hidden,
            "feature_width": feature_width,
            "head_width": head_width,
            "mask_width": mask_width,
            "corr_levels": corr_levels,
            "corr_radius": corr_radius,
        }
        for name, value in counts.items():
            if not is_count(value, 1):
                raise ValueError(f"DEQFlow({name}=...) takes an integer >= 1; given: {value!r}")
        if not is_count(motion_width, 3):
            raise ValueError(
                f"DEQFlow(motion_width=...) takes an integer >= 3, two channels of which are the flow itself; "
                f"given: {motion_width!r}"
            )
        lists = {
            "encoder_widths": (encoder_widths, 4),
            "corr_widths": (corr_widths, 2),
            "flow_widths": (flow_widths, 2),
        }
        for name, (widths, length) in lists.items():
            if len(widths) != length or not all(is_count(width, 1) for width in widths):
                raise ValueError(f"DEQFlow({name}=...) takes {length} integers >= 1; given: {widths!r}")
        if encoder_widths[0] != encoder_widths[1]:
            raise ValueError(
                "DEQFlow(encoder_widths=...) takes one width for the first convolution and the first pair of blocks, "
                f"whose shortcut is the identity; given: {encoder_widths!r}"
            )
        if padding not in get_args(Padding):
            raise ValueError(f"DEQFlow(padding=...) takes one of {', '.join(get_args(Padding))}; given: {padding!r}")
        if not all_grad and isinstance(gradient, ImplicitGradient | NeumannGradient):
            raise ValueError(
                "DEQFlow(all_grad=False) leaves a part of the derivative of the cell out, which the equations of "
                f"{gradient!r} need whole; take all_grad=True, PhantomGradient(...) or UnrolledGradient()"
            )
        self.padding = padding
        self.normalize_features = normalize_features
        self.corr_levels = corr_levels
        self.multiple = STRIDE
        self.least_size = STRIDE << corr_levels
        encoder = partial(raft.FeatureEncoder, block=raft.ResidualBlock)
        self.feature_encoder = encoder(layers=(*encoder_widths, feature_width), norm_layer=nn.InstanceNorm2d)
        self.context_encoder = encoder(layers=(*encoder_widths, hidden), norm_layer=nn.BatchNorm2d)
        self.attention = ContextAttention(hidden) if gma else None
        cell = FlowCell(
            hidden=hidden,
            corr_widths=corr_widths,
            flow_widths=flow_widths,
            motion_width=motion_width,
            head_width=head_width,
            corr_levels=corr_levels,
            corr_radius=corr_radius,
            gma=gma,
            all_grad=all_grad,
            weight_norm=weight_norm,
        )
        self.deq = DEQ(
            cell,
            solver=FixedPointIteration(tol=1e-3, norm="absolute", max_steps=60) if solver is None else solver,
            gradient=PhantomGradient(steps=1, advance=True) if gradient is None else gradient,
            unrolled=unrolled,
            recompute=recompute,
        )
        self.mask_predictor = raft.MaskPredictor(in_channels=hidden, hidden_size=mask_width)

    @overload
    def forward(self, image1: Tensor, image2: Tensor, trajectory: None = None) -> Tensor: ...
    @overload
    def forward(self, image1: Tensor, image2: Tensor, trajectory: Trajectory | Sequence[int]) -> list[Tensor]: ...
    def forward(
        self, image1: Tensor, image2: Tensor, trajectory: Trajectory | Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        """The flow from ``image1`` to ``image2``; with ``trajectory`` also before, in a list: its states, z* last.

        Raises:
            InputError: the images are not as described; see the class.
        """
        self.check_images(image1, image2)
        F1, F2 = self.features(torch.cat([image1, image2])).tensor_split(2)
        states = self.solved(F1, F2, self.context(image1), trajectory=trajectory)
        flows = [self.upsampled(state, image1.shape[2:]) for state in states]
        return flows[-1] if trajectory is None else flows

    def estimate(self, image1: Tensor, image2: Tensor, start: FlowState | None = None) -> tuple[Tensor, FlowState]:
        """The flow, and the equilibrium that it was read off: a ``start`` for what is alike.

        Raises:
            InputError: the images, or the start, are not as described; see the class.
        """
        self.check_images(image1, image2)
        F1, F2 = self.features(torch.cat([image1, image2])).tensor_split(2)
        (state,) = self.solved(F1, F2, self.context(image1), start)
        return self.upsampled(state, image1.shape[2:]), state

    def stream(self, warm_start: bool = True, steps: int | None = None) -> FlowStream:
        """Takes the frames of a video one by one: see :class:`FlowStream`."""
        return FlowStream(self, warm_start, steps)

    def video(self, frames: Tensor, warm_start: bool = True, steps: int | None = None) -> Tensor:
        """The flow from each frame to the next: ``(B, T, 3, H, W)`` -> ``(B, T - 1, 2, H, W)``, T >= 2.

        ``warm_start`` and ``steps`` are those of :class:`FlowStream`.

        Raises:
            InputError: there are fewer than two frames, or they are not as described; see the class.
        """
        if not isinstance(frames, Tensor) or frames.dim() != 5 or frames.shape[1] < 2:
            given = f"shape {tuple(frames.shape)}" if isinstance(frames, Tensor) else type(frames).__name__
            raise InputError(
                f"video() takes frames (B, T, 3, H, W) with T >= 2; given: {given}. Of one video (T, 3, H, W), give "
                "frames.unsqueeze(0); of a list of (B, 3, H, W), torch.stack(frames, dim=1)"
            )
        stream = self.stream(warm_start, steps)
        flows = [stream(frame) for frame in frames.unbind(dim=1)]
        return torch.stack([flow for flow in flows if flow is not None], dim=1)

    # --- the parts, for streams and for those who want to look inside

    def features(self, image: Tensor) -> Tensor:
        """What is correlated: ``(B, 3, H, W)`` -> ``(B, D, h, w)`` of the padded image."""
        features: Tensor = self.feature_encoder(self._prepared(image))
        return F.instance_norm(features) if self.normalize_features else features

    def context(self, image: Tensor) -> Tensor:
        """What the cell is told of the first image: ``(B, 3, H, W)`` -> ``(B, C, h, w)`` of the padded image."""
        context: Tensor = self.context_encoder(self._prepared(image)).relu()
        return context

    def injection(self, F1: Tensor, F2: Tensor, context: Tensor) -> tuple[Any, ...]:
        """The inputs of the cell."""
        pyramid = correlation_pyramid(F1, F2, self.corr_levels)
        return (context, pyramid) if self.attention is None else (context, pyramid, self.attention(context))

    def solved(
        self,
        F1: Tensor,
        F2: Tensor,
        context: Tensor,
        start: FlowState | None = None,
        trajectory: Trajectory | Sequence[int] | None = None,
    ) -> list[FlowState]:
        """The equilibrium of two feature maps and a context, from ``start`` or from rest; before it, a trajectory.

        Raises:
            InputError: the start has other shapes than the state.
        """
        inputs = self.injection(F1, F2, context)
        if start is not None:
            rest = self.deq.cell.initial_state(*inputs)  # type: ignore[operator]
            wanted, given = [tuple(x.shape) for x in rest], [tuple(getattr(x, "shape", ())) for x in start]
            if given != wanted:
                raise InputError(
                    f"a start is a FlowState of images of the same size: h {wanted[0]} and flow {wanted[1]}; given: "
                    f"{' and '.join(map(str, given))}. Give start=None where another video begins"
                )
            start = FlowState(*(x.to(z0.dtype) for x, z0 in zip(start, rest, strict=True)))
        z0 = None if start is None else tuple(start)
        z, _, *before = self.deq(*inputs, z0=z0, trajectory=trajectory)
        return [FlowState(*state) for state in (*(before[0] if before else ()), z)]

    def upsampled(self, state: FlowState, size: Sequence[int] | None = None) -> Tensor:
        """The flow in pixels, each a convex combination of nine places' motions.

        Shape:
            ``(B, 2, H, W)`` for images of this size (H, W), or of the padded ones, ``(B, 2, 8 h, 8 w)``.
        """
        from torchvision.models.optical_flow import raft  # as in the cell

        flow: Tensor = raft.upsample_flow(state.flow, self.mask_predictor(state.h))
        if size is None:
            return flow
        left, _, top, _ = self._pads(size)
        H, W = size
        return flow[:, :, top : top + H, left : left + W]

    @torch.no_grad()
    def next_start(self, state: FlowState) -> FlowState:
        """Where the solve of the next pair of a video starts: the flow :func:`~zoo.video.moved_on`, and h = 0.

        Where a solve failed, at rest. The flow is moved pixel by pixel, and then averaged: at places of 8 pixels it
        would lose the edges of what moves.
        """
        flow = F.avg_pool2d(moved_on(self.upsampled(state)), STRIDE) / STRIDE
        finite = flow.isfinite().flatten(1).all(dim=1).view(-1, 1, 1, 1)
        return FlowState(torch.zeros_like(state.h), flow.to(state.flow.dtype).where(finite, 0))

    def check_images(self, image1: Tensor, image2: Tensor) -> None:
        """Raise InputError unless these are two images, as the class takes them."""
        name = type(self).__name__
        for image in (image1, image2):
            if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[1] != 3:
                given = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
                raise InputError(
                    f"{name} takes images (B, 3, H, W); given: {given}. Of one image (3, H, W), give "
                    "image.unsqueeze(0); of grey ones (B, 1, H, W), image.expand(-1, 3, -1, -1)"
                )
            if not (image.is_floating_point() or image.dtype == torch.uint8):
                raise InputError(f"{name} takes floating images in [0, 1], or uint8 ones; given: {image.dtype}")
            if 0 in image.shape[2:]:
                raise InputError(f"{name} takes images of at least one pixel; given: shape {tuple(image.shape)}")
            # What is infinite is no number, like NaN, and not on another scale: the solve's report tells of both.
            if image.is_floating_point() and image.numel() and 2 < float(image.amax()) < math.inf:
                raise InputError(
                    f"{name} takes floating images in [0, 1]; given: values up to {float(image.amax()):.4g}. "
                    "Use image / 255, or uint8"
                )
        if image1.shape != image2.shape or image1.dtype != image2.dtype:
            raise InputError(
                f"{name} takes two images of the same shape and dtype; given: {tuple(image1.shape)} of {image1.dtype} "
                f"and {tuple(image2.shape)} of {image2.dtype}"
            )

    def _prepared(self, image: Tensor) -> Tensor:
        """2 I - 1, padded, in the dtype of the weights."""
        scale = 255 if image.dtype == torch.uint8 else 1
        image = image.to(next(self.parameters()).dtype) / scale
        return F.pad(2 * image - 1, self._pads(image.shape[2:]), mode="replicate")

    def _pads(self, size: Sequence[int]) -> tuple[int, int, int, int]:
        """Pixels to add left, right, above and below."""
        more_h, more_w = (max(self.least_size, side + -side % self.multiple) - side for side in size)
        above = more_h // 2 if self.padding == "both" else 0
        return more_w // 2, more_w - more_w // 2, above, more_h - above


SIZES: dict[str, dict[str, Any]] = {
    "deq_flow": {},
    "deq_flow_nano": {  # for images of about a hundred pixels
        "hidden": 32, "feature_width": 48, "encoder_widths": (16, 16, 24, 32), "corr_widths": (48, 32),
        "flow_widths": (16, 16), "motion_width": 32, "head_width": 32, "mask_width": 32, "corr_levels": 2,
        "corr_radius": 3, "normalize_features": True,
    },
    "deq_flow_tiny": {
        "hidden": 32, "feature_width": 64, "corr_widths": (64, 48), "flow_widths": (32, 16), "motion_width": 32,
        "head_width": 64,
    },
    "deq_flow_base": {},
    "deq_flow_large": {
        "hidden": 192, "corr_widths": (384, 288), "flow_widths": (192, 96), "motion_width": 192, "head_width": 384
    },
    "deq_flow_huge": {
        "hidden": 256, "corr_widths": (512, 384), "flow_widths": (256, 128), "motion_width": 256, "head_width": 512
    },
    "deq_flow_gigantic": {
        "hidden": 384, "corr_widths": (640, 480), "flow_widths": (320, 160), "motion_width": 320, "head_width": 640
    },
}  # fmt: skip
"""The published sizes are those of version 2; version 1 has a ``head_width`` of 256 throughout."""
for _name, _preset in SIZES.items():
    register_model(_name, DEQFlow, **_preset)

"""Multiscale deep equilibrium models: all resolutions of an image reach their equilibrium together.

Bai, Koltun and Kolter, "Multiscale Deep Equilibrium Models" (NeurIPS 2020); with Jacobian regularisation: Bai, Koltun
and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization" (ICML 2021). In MIT-licensed code of the same
authors: locuslab/mdeq and locuslab/deq, whose checkpoints ``zoo.load_original`` reads.

Letters: B batch, n branches, C_i channels of branch i, H_i x W_i = H_0/2^i x W_0/2^i its size, G groups of GroupNorm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .errors import InputError
from .implicit import DEQ, Anderson, Gradient, ImplicitGradient, Solver, VariationalDropout, normalize_weights
from .implicit.solvers.base import is_count
from .registry import register_model

State = tuple[Tensor, ...]
"""z = (z_0, ..., z_{n-1}), with z_i ``(B, C_i, H_i, W_i)``."""

PARTS = ("branches", "fuse", "post")
"""The three stages of the cell, as ``weight_norm`` names them."""


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size, divided by the stride."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)


class GroupNorm(nn.GroupNorm):
    """GN of torch, and also for a batch of one whose groups are one value each, which torch refuses.

    Such a group is its own mean, and becomes 0 before the affine part: as in every larger batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Branch(nn.Module):
    """One resolution by itself: h = GN(relu(GN(t) + z)), where t = dropout(conv(relu(GN(conv z)))) + x.

    Args:
        channels: C.
        expansion: E; the inner width is E C.
        groups: G.
        dropout: the probability with which a channel of the second convolution is dropped, for the whole solve.

    Shape:
        z, x and the output are ``(B, C, H, W)``.
    """

    def __init__(self, channels: int, expansion: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = conv(channels, expansion * channels, 3)
        self.norm1 = GroupNorm(groups, expansion * channels)
        self.conv2 = conv(expansion * channels, channels, 3)
        self.dropout = VariationalDropout(dropout, shared_dims=(2, 3))
        self.norm2 = GroupNorm(groups, channels)
        self.norm3 = GroupNorm(groups, channels)

    def forward(self, z: Tensor, x: Tensor | None) -> Tensor:
        t = self.dropout(self.conv2(self.norm1(self.conv1(z)).relu()))
        if x is not None:
            t = t + x
        h: Tensor = self.norm3((self.norm2(t) + z).relu())
        return h


def fusion(channels: Sequence[int], i: int, j: int, groups: int) -> nn.Sequential:
    """phi_ij, from branch j to branch i: strided convolutions to a lower resolution, upsampling to a higher one."""
    if j > i:
        up = nn.Upsample(scale_factor=2 ** (j - i), mode="nearest")
        return nn.Sequential(conv(channels[j], channels[i], 1), GroupNorm(groups, channels[i]), up)
    layers: list[nn.Module] = []
    for step in range(i - j):
        width = channels[i] if step == i - j - 1 else channels[j]
        layers += [conv(channels[j], width, 3, stride=2), GroupNorm(groups, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # nothing for j = i; no ReLU at the end


class MDEQCell(nn.Module):
    """f(z, x) = (f_0, ..., f_{n-1}): each branch by itself, then all into all.

    h_i = branch_i(z_i, x if i = 0), y_i = sum_j phi_ij(h_j) with phi_ii = id, and f_i = GN(conv(relu(y_i))), that GN
    with G/2 groups.

    Args:
        channels: C_0, ..., C_{n-1}.
        expansion: E of every branch.
        groups: G.
        post_affine: whether the last GN of each branch has a weight and a bias.
        dropout: see :class:`Branch`.
        weight_norm: the stages whose convolutions are weight-normalised, of ``"branches"``, ``"fuse"``, ``"post"``.

    Shape:
        z and the output are tuples of ``(B, C_i, H / 2^i, W / 2^i)``, x is ``(B, C_0, H, W)``, where 2^(n-1) divides
        H and W.
    """

    def __init__(
        self,
        channels: Sequence[int],
        expansion: int = 5,
        groups: int = 8,
        post_affine: bool = False,
        dropout: float = 0.0,
        weight_norm: Sequence[str] = ("branches", "post"),
    ) -> None:
        super().__init__()
        n = len(channels)
        self.channels = tuple(channels)
        self.branches = nn.ModuleList(Branch(C, expansion, groups, dropout) for C in channels)
        self.fuse = nn.ModuleList(nn.ModuleList(fusion(channels, i, j, groups) for j in range(n)) for i in range(n))
        self.post = nn.ModuleList(
            nn.Sequential(nn.ReLU(), conv(C, C, 1), GroupNorm(groups // 2, C, affine=post_affine)) for C in channels
        )
        for part in weight_norm:
            if part != "fuse" or n > 1:  # a single branch has nothing to fuse
                normalize_weights(self.get_submodule(part), "weight")

    def forward(self, z: State, x: Tensor) -> State:
        h = [branch(z_i, None if i else x) for i, (branch, z_i) in enumerate(zip(self.branches, z, strict=True))]
        y = []
        for row in self.fuse:
            assert isinstance(row, nn.ModuleList)  # noqa: S101 - for the type checker
            y.append(sum(phi(h_j) for phi, h_j in zip(row, h, strict=True)))
        return tuple(post(y_i) for post, y_i in zip(self.post, y, strict=True))

    def initial_state(self, x: Tensor) -> State:
        """z0 = 0, in the dtype of the weights also where autocast made x narrower."""
        B, _, H, W = x.shape
        dtype = next(self.parameters()).dtype
        return tuple(x.new_zeros(B, C, H >> i, W >> i, dtype=dtype) for i, C in enumerate(self.channels))


class Stem(nn.Sequential):
    """x, the injection: two 3x3 convolutions and one 1x1, each followed by BatchNorm and ReLU.

    The first ones have stride 2 as ``stride`` asks. A model of at most two branches whose stem keeps the size has no
    1x1 convolution.

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, C_0, H / stride, W / stride)``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, branches: int) -> None:
        first, second = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
        layers = [
            *(conv(in_channels, channels, 3, first), nn.BatchNorm2d(channels), nn.ReLU()),
            *(conv(channels, channels, 3, second), nn.BatchNorm2d(channels), nn.ReLU()),
        ]
        if stride > 1 or branches > 2:
            layers += [conv(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()]
        super().__init__(*layers)


class ClassificationHead(nn.Module):
    """Each branch widened by a bottleneck, added into the next lower resolution; average pooling; a linear layer.

    Args:
        channels: C_0, ..., C_{n-1}.
        widths: of the bottlenecks, which give 4 times as many channels.
        final_width: channels before the pooling.
        num_classes: outputs.

    Shape:
        tuple of ``(B, C_i, H_i, W_i)`` -> ``(B, num_classes)``.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], final_width: int, num_classes: int) -> None:
        from torchvision.models.resnet import Bottleneck  # here: its import takes as long as torch's own

        super().__init__()
        out = [Bottleneck.expansion * width for width in widths]
        plain = partial(nn.BatchNorm2d, affine=False)
        self.widen = nn.ModuleList(
            Bottleneck(
                C,
                width,
                downsample=nn.Sequential(conv(C, D, 1), nn.BatchNorm2d(D)) if C != D else None,
                norm_layer=plain,
            )
            for C, width, D in zip(channels, widths, out, strict=True)
        )
        self.down = nn.ModuleList(
            nn.Sequential(conv(a, b, 3, stride=2, bias=True), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(out)
        )
        self.final = nn.Sequential(conv(out[-1], final_width, 1, bias=True), nn.BatchNorm2d(final_width), nn.ReLU())
        self.classifier = nn.Linear(final_width, num_classes)

    def forward(self, z: State) -> Tensor:
        y: Tensor = self.widen[0](z[0])
        for widen, down, z_i in zip(self.widen[1:], self.down, z[1:], strict=True):
            y = widen(z_i) + down(y)
        logits: Tensor = self.classifier(self.final(y).mean(dim=(2, 3)))
        return logits


class SegmentationHead(nn.Module):
    """All branches at the size of branch 0, side by side, through two 1x1 convolutions.

    Shape:
        tuple of ``(B, C_i, H_i, W_i)`` -> ``(B, num_classes, H_0, W_0)``.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        width = sum(channels)
        self.mix = nn.Sequential(conv(width, width, 1, bias=True), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = conv(width, num_classes, 1, bias=True)

    def forward(self, z: State) -> Tensor:
        size = z[0].shape[2:]
        lower = [F.interpolate(z_i, size, mode="bilinear", align_corners=True) for z_i in z[1:]]
        logits: Tensor = self.classifier(self.mix(torch.cat([z[0], *lower], dim=1)))
        return logits


class _MDEQ(nn.Module):
    """What both tasks share: normalise, pad, stem, equilibrium.

    Attributes:
        multiple: images are padded to multiples of this many pixels, the stem's stride times 2^(n-1).
    """

    classifier_name = "head.classifier"
    head: nn.Module

    def __init__(
        self,
        channels: Sequence[int],
        in_channels: int,
        stem_stride: int,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        deq: dict[str, Any],
        **cell: Any,
    ) -> None:
        super().__init__()
        _check(type(self).__name__, channels, in_channels, stem_stride, mean, std, **cell)
        self.in_channels = in_channels
        self.stem_stride = stem_stride
        self.multiple = stem_stride << (len(channels) - 1)
        self.mean, self.std = (
            (float(values),) if isinstance(values, int | float) else tuple(values) for values in (mean, std)
        )
        self.stem = Stem(in_channels, channels[0], stem_stride, len(channels))
        self.deq = DEQ(MDEQCell(channels, **cell), **deq)

    def initialize(self) -> None:
        """Convolutions that are not normalised: weights and biases ~ N(0, 0.01^2). All others keep torch's own start.

        That is what the originals' training starts from: their N(0, 0.01^2) for the normalised ones is overwritten
        before it is used.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not parametrize.is_parametrized(module):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, std=0.01)

    def equilibrium(self, image: Tensor) -> State:
        """z* of the image, padded at its right and lower edge by repeating the last pixels.

        Raises:
            InputError: the image is not floating, has another number of channels, or is smaller than ``multiple``.
        """
        name, multiple = type(self).__name__, self.multiple
        if not image.is_floating_point():
            raise InputError(f"{name} takes floating images in [0, 1]; given: {image.dtype}. Use image.float() / 255")
        if image.dim() != 4 or image.shape[1] != self.in_channels:
            raise InputError(
                f"this {name} takes images (B, {self.in_channels}, H, W), with {self.in_channels} channels "
                f"(in_channels); given: shape {tuple(image.shape)}"
            )
        H, W = image.shape[2:]
        if min(H, W) < multiple:
            raise InputError(
                f"this {name} takes images of at least {multiple} x {multiple} pixels, one pixel of its coarsest "
                f"branch; given: {H} x {W}. Enlarge the image, or make the model with fewer branches or a smaller "
                "stem_stride"
            )
        mean, std = (image.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        padded = F.pad((image - mean) / std, (0, -W % multiple, 0, -H % multiple), mode="replicate")
        z, _ = self.deq(self.stem(padded))
        return tuple(z)

    def coarse_logits(self, image: Tensor) -> Tensor:
        """The head's own output, before any upsampling and cropping."""
        logits: Tensor = self.head(self.equilibrium(image))
        return logits


class MDEQ(_MDEQ):
    """Image classification by a multiscale equilibrium.

    Args:
        channels: C_0, ..., C_{n-1}, from the highest resolution to the lowest, each a multiple of ``groups``.
        head_widths: of the head's bottlenecks, one a branch.
        final_width: channels before the pooling.
        num_classes: outputs.
        in_channels: channels of the image.
        stem_stride: 1, 2 or 4; how much smaller branch 0 is than the image.
        expansion, groups, post_affine, dropout, weight_norm: see :class:`MDEQCell`.
        mean, std: the model normalises its input itself, to (x - mean) / std; one number, or one a channel.
        unrolled: apply the cell this many times instead of solving: the weight-tied network that is the baseline.
        recompute: see :func:`~zoo.implicit.fixed_point`; saves memory in training.
        solver, gradient: see :class:`~zoo.implicit.DEQ`; Anderson to a relative residual of 1e-3 by default.

    Shape:
        images ``(B, in_channels, H, W)`` with values in [0, 1] -> logits ``(B, num_classes)``. Any size from
        ``multiple`` x ``multiple`` pixels on; others than multiples of it are padded.

    Raises:
        ValueError: an argument is not as described.

    Attributes:
        deq: the equilibrium layer; ``deq.report`` tells of the last solve.
        multiple: images are padded to multiples of this many pixels, the stem's stride times 2^(n-1).
    """

    def __init__(
        self,
        channels: Sequence[int] = (24, 24),
        head_widths: Sequence[int] = (8, 16),
        final_width: int = 200,
        num_classes: int = 10,
        in_channels: int = 3,
        stem_stride: int = 1,
        expansion: int = 5,
        groups: int = 8,
        post_affine: bool = False,
        dropout: float = 0.0,
        weight_norm: Sequence[str] = ("branches", "post"),
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        unrolled: int | None = None,
        recompute: bool = False,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        if len(head_widths) != len(channels) or not all(
            is_count(value, 1) for value in (*head_widths, final_width, num_classes)
        ):
            raise ValueError(
                "MDEQ takes integers >= 1 for head_widths, as many as channels, and for final_width and num_classes; "
                f"given: head_widths={head_widths!r}, channels={channels!r}, final_width={final_width!r}, "
                f"num_classes={num_classes!r}"
            )
        super().__init__(
            channels, in_channels, stem_stride, mean, std, _deq(solver, gradient, unrolled, recompute),
            expansion=expansion, groups=groups, post_affine=post_affine, dropout=dropout, weight_norm=weight_norm,
        )  # fmt: skip
        self.head = ClassificationHead(channels, head_widths, final_width, num_classes)
        self.initialize()

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> logits ``(B, num_classes)``; raises as :meth:`equilibrium` does."""
        return self.coarse_logits(image)


class MDEQSegmenter(_MDEQ):
    """Semantic segmentation by a multiscale equilibrium.

    The head's logits, at the resolution of branch 0, are upsampled bilinearly to the size of the image, as the
    published evaluation does (``align_corners=False``).

    Args:
        channels, num_classes, in_channels, stem_stride, expansion, groups, post_affine, dropout, weight_norm, mean,
            std, unrolled, recompute, solver, gradient: see :class:`MDEQ`.
        bn_momentum: of BatchNorm's running statistics; small for small batches of large images.

    Shape:
        images ``(B, in_channels, H, W)`` with values in [0, 1] -> logits ``(B, num_classes, H, W)``. Any size from
        ``multiple`` x ``multiple`` pixels on; others than multiples of it are padded, and the logits cropped.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256),
        num_classes: int = 19,
        in_channels: int = 3,
        stem_stride: int = 4,
        expansion: int = 5,
        groups: int = 8,
        post_affine: bool = True,
        dropout: float = 0.0,
        weight_norm: Sequence[str] = ("branches", "post"),
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        bn_momentum: float = 0.1,
        unrolled: int | None = None,
        recompute: bool = False,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        if not is_count(num_classes, 1):
            raise ValueError(f"MDEQSegmenter(num_classes=...) takes an integer >= 1; given: {num_classes!r}")
        if not 0 < bn_momentum <= 1:
            raise ValueError(f"MDEQSegmenter(bn_momentum=...) takes a number in (0, 1]; given: {bn_momentum!r}")
        super().__init__(
            channels, in_channels, stem_stride, mean, std, _deq(solver, gradient, unrolled, recompute),
            expansion=expansion, groups=groups, post_affine=post_affine, dropout=dropout, weight_norm=weight_norm,
        )  # fmt: skip
        self.head = SegmentationHead(channels, num_classes)
        self.initialize()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> logits ``(B, num_classes, H, W)``; raises as :meth:`equilibrium` does."""
        logits = self.coarse_logits(image)
        H, W = image.shape[-2:]
        size = [side * self.stem_stride for side in logits.shape[2:]]  # that of the padded image
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)[..., :H, :W]


def _deq(solver: Solver | None, gradient: Gradient | None, unrolled: int | None, recompute: bool) -> dict[str, Any]:
    default = Anderson(tol=1e-3, max_steps=30)
    return {
        "solver": default if solver is None else solver,
        "gradient": ImplicitGradient(default) if gradient is None else gradient,
        "unrolled": unrolled,
        "recompute": recompute,
    }


def _check(
    model: str,
    channels: Sequence[int],
    in_channels: int,
    stem_stride: int,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    expansion: int,
    groups: int,
    weight_norm: Sequence[str],
    **_: object,
) -> None:
    """Raise ValueError where the sizes of a model make no sense."""
    for name, value in (("in_channels", in_channels), ("expansion", expansion)):
        if not is_count(value, 1):
            raise ValueError(f"{model}({name}=...) takes an integer >= 1; given: {value!r}")
    if not (is_count(groups, 1) and groups % 2 == 0):
        raise ValueError(
            f"{model}(groups=...) takes an even number, since the last norm has half of it; given: {groups!r}"
        )
    if not channels or not all(is_count(C, 1) and C % groups == 0 for C in channels):
        raise ValueError(
            f"{model}(channels=...) takes one positive multiple of groups={groups} a branch; given: {channels!r}"
        )
    if stem_stride not in (1, 2, 4):
        raise ValueError(f"{model}(stem_stride=...) takes 1, 2 or 4; given: {stem_stride!r}")
    if isinstance(weight_norm, str) or not set(weight_norm) <= set(PARTS) or len(set(weight_norm)) < len(weight_norm):
        raise ValueError(f"{model}(weight_norm=...) takes a list of some of {', '.join(PARTS)}; given: {weight_norm!r}")
    for name, values in (("mean", mean), ("std", std)):
        count = 1 if isinstance(values, int | float) else len(values)
        if count not in (1, in_channels):
            raise ValueError(
                f"{model}({name}=...) takes one number, or one for each of {in_channels} channels; given: {values!r}"
            )
    if not all(value > 0 for value in ([std] if isinstance(std, int | float) else std)):
        raise ValueError(f"{model}(std=...) takes numbers > 0; given: {std!r}")


# ---------------------------------------------------------------------------------------------------- published sizes

CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "stem_stride": 1, "num_classes": 10}
IMAGENET_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "stem_stride": 4}
IMAGENET = {**IMAGENET_PIXELS, "num_classes": 1000, "final_width": 2048}
CITYSCAPES = {**IMAGENET_PIXELS, "num_classes": 19, "post_affine": True, "bn_momentum": 0.01}
SMALL, LARGE, XL = (32, 64, 128, 256), (80, 160, 320, 640), (88, 176, 352, 704)
"""Channels. The CIFAR model called large has those of the small one for ImageNet."""

_LARGE_CIFAR = {**CIFAR, "channels": SMALL, "head_widths": (14, 28, 56, 112), "final_width": 1680}
_LARGE_IMAGENET = {**IMAGENET, "channels": LARGE, "head_widths": (32, 64, 128, 256)}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "mdeq": {},
    "mdeq_nano": {  # for 8x8 digits
        "in_channels": 1, "mean": 0.305, "std": 0.376, "channels": (16, 32), "expansion": 3,
        "head_widths": (8, 16), "final_width": 64, "dropout": 0.1,
    },
    "mdeq_tiny": {**CIFAR, "channels": (24, 24), "head_widths": (8, 16), "final_width": 200, "dropout": 0.25},
    "mdeq_large": {**_LARGE_CIFAR, "dropout": 0.3},
    "mdeq_large_reg": {**_LARGE_CIFAR, "dropout": 0.22},
    "mdeq_small_imagenet": {**IMAGENET, "channels": SMALL, "head_widths": (24, 48, 96, 192), "post_affine": True},
    "mdeq_small_reg_imagenet": {**IMAGENET, "channels": SMALL, "head_widths": (28, 56, 112, 224), "dropout": 0.02},
    "mdeq_large_imagenet": {**_LARGE_IMAGENET, "post_affine": True},
    "mdeq_large_reg_imagenet": _LARGE_IMAGENET,
    "mdeq_xl_imagenet": {
        **IMAGENET, "channels": XL, "head_widths": (32, 64, 128, 256), "expansion": 6, "post_affine": True
    },
}  # fmt: skip
SEGMENTERS: dict[str, dict[str, Any]] = {
    "mdeq_segmenter": {},
    "mdeq_nano_scenes": {  # for scenes of digits
        "in_channels": 1, "mean": 0.13, "std": 0.256, "num_classes": 11, "channels": (16, 32, 32), "expansion": 2,
        "stem_stride": 1, "post_affine": False,
    },
    "mdeq_small_cityscapes": {**CITYSCAPES, "channels": SMALL, "dropout": 0.05},
    "mdeq_large_cityscapes": {**CITYSCAPES, "channels": LARGE, "dropout": 0.03},
    "mdeq_xl_cityscapes": {**CITYSCAPES, "channels": XL, "expansion": 6, "dropout": 0.04},
}  # fmt: skip
for _name, _preset in CLASSIFIERS.items():
    register_model(_name, MDEQ, **_preset)
for _name, _preset in SEGMENTERS.items():
    register_model(_name, MDEQSegmenter, **_preset)

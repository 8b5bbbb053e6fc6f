"""Batches that a model can be exported with, and its graph tried on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.flow import DEQFlow
from zoo.language import TextModel
from zoo.mdeq import MDEQ, MDEQSegmenter
from zoo.resnet import ResNet
from zoo.tanh import TanhDEQ

_SHIFT = 2  # pixels between the two images of a flow


def example_inputs(
    model: nn.Module, size: tuple[int, int] | None = None, length: int | None = None, batch: int = 2, seed: int = 0
) -> tuple[Tensor, ...]:
    """Random inputs of a model of the zoo: smooth images in [0, 1], two of them for flow; or tokens.

    Args:
        model: tells what it takes.
        size: (H, W) of images; of a :class:`~zoo.TanhDEQ` only where its input is to be an image.
        length: L, positions of a text.
        batch: B.
        seed: of the random numbers.

    Returns:
        ``(B, C, H, W)``, twice for flow, the second one moved by two pixels; int64 ``(B, L)``; or ``(B, in_features)``.

    Raises:
        InputError: what is needed was not given, or does not fit the model; or the model is none of the zoo's.
    """
    generator = torch.Generator().manual_seed(seed)
    name, like = type(model).__name__, next(model.parameters())
    if isinstance(model, TextModel):
        if length is None or length < 1:
            raise InputError(
                f"{name} reads tokens int64 (B, L): say how many positions L >= 1 the graph takes (length)"
            )
        return (torch.randint(model.vocab_size, (batch, length), generator=generator).to(like.device),)
    if length is not None:
        raise InputError(f"length is of a text, and {name} reads none; given: length={length}")
    if isinstance(model, TanhDEQ) and size is None:
        return (torch.rand(batch, model.injection.in_features, generator=generator).to(like),)
    if not isinstance(model, TanhDEQ | MDEQ | MDEQSegmenter | ResNet | DEQFlow):
        raise InputError(f"what a {name} takes is not known: give export(model, path, *inputs) an example")
    if size is None or min(size) < 1:
        raise InputError(f"{name} takes images: give the graph's height and width, >= 1: size=(H, W), or --size HxW")
    H, W = size
    if isinstance(model, TanhDEQ):
        channels = max(1, model.injection.in_features // (H * W))
    else:
        channels = 3 if isinstance(model, DEQFlow) else model.in_channels
    coarse = torch.rand(batch, channels, H // 4 + 1, W // 4 + 1, generator=generator)
    image = F.interpolate(coarse, (H, W), mode="bilinear", align_corners=True).to(like)
    return (image, image.roll((_SHIFT, _SHIFT), dims=(2, 3))) if isinstance(model, DEQFlow) else (image,)


def another(example: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Random inputs like an example, with one sample more.

    Rows are mixtures of the example's rows, with the same shares in all tensors; of integers, either of two rows.
    """
    generator = torch.Generator().manual_seed(seed)
    B = len(example[0])
    first, second = (torch.randint(B, (B + 1,), generator=generator) for _ in range(2))
    share = torch.rand(B + 1, generator=generator)
    mixed = []
    for x in example:
        here, there = x[first.to(x.device)], x[second.to(x.device)]
        if x.is_floating_point():
            weight = share.to(x).view(-1, *(1 for _ in x.shape[1:]))
            mixed.append(torch.lerp(here, there.flip(-1), weight))
        else:
            at = torch.randperm(math.prod(x.shape[1:]), generator=generator).to(x.device)
            mixed.append(here.flatten(1)[:, at].view_as(here))
    return tuple(mixed)

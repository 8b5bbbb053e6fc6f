"""Pairs and sequences of frames made from two real photographs, with their exact optical flow; nothing to download.

Layers cut out of photographs move over each other, as in the published training sets: A. Dosovitskiy et al., "FlowNet:
learning optical flow with convolutional networks", ICCV 2015, and N. Mayer et al., "A large dataset to train
convolutional networks for disparity, optical flow, and scene flow estimation", CVPR 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_sample_images
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad
from torch.utils.data import Dataset

from .base import Splits, whole_number
from .flow import FlowDataModule, FlowSample

Point = tuple[Tensor, Tensor]
"""x and y, of any shape."""
Scenes = tuple[Tensor, Tensor, Tensor]
"""``(frames uint8 (B, T, 3, H, W), flow float32 (B, T-1, 2, H, W), occluded bool (B, T-1, H, W))``."""

BANDS = {
    "china.jpg": ((0.25, 1.0), ((0.0, 0.6), (0.6, 0.73), (0.73, 1.0))),
    "flower.jpg": ((0.15, 0.9), ((0.1, 0.5), (0.5, 0.58), (0.58, 0.75))),
}
"""The rows of a photograph that are used, and the columns of its training, validation and test band, as fractions.

What is left out is sky and a dark background out of focus, on which no motion can be seen.
"""
SHRUNK = 0.6
"""The size of the photographs' copies that are used: no layer then shows more detail than the pixels of a frame can."""
CELL = 16
"""Side of the squares over which the detail of a photograph is measured, in pixels of the shrunk copy."""
ACCELERATION = 0.1
"""How much a motion may change from frame to frame, as a fraction of its bound."""

MIN_SCALE = 0.5
"""How many pixels of a shrunk photograph one step of a layer's own coordinates takes, at least; at most it is 1."""
MAX_STRETCH, MAX_DENT = 0.2, 0.2
"""The largest logarithm of an outline's elongation, and the largest amplitude of its shears, in radii."""
CONTRAST = 0.18
"""The standard deviation of grey values that layers are brought towards, by a factor from 0.5 to 2."""
OUT_OF_SIGHT = 1e5
"""Where patches are that a scene does not have, in pixels."""


class PhotographSplit(NamedTuple):
    """The photographs of each part, each ``(3, h, w)`` in [0, 1]."""

    train: list[Tensor]
    val: list[Tensor]
    test: list[Tensor]


def photographs_split() -> PhotographSplit:
    """The training, validation and test bands of scikit-learn's two photographs, ``china.jpg`` and ``flower.jpg``.

    Vertical lines divide each of them, see :data:`BANDS`: training is left, test is right, validation between them. No
    pixel is in two bands; they are shrunk after the cut.
    """
    photographs = load_sample_images()
    parts = PhotographSplit([], [], [])
    for name, pixels in zip(photographs.filenames, photographs.images, strict=True):
        image = torch.tensor(pixels).movedim(-1, 0).float() / 255
        _, h, w = image.shape
        (top, bottom), columns = BANDS[PurePath(name).name]
        for part, (left, right) in zip(parts, columns, strict=True):
            band = image[None, :, round(h * top) : round(h * bottom), round(w * left) : round(w * right)]
            part.append(interpolate(band, scale_factor=SHRUNK, mode="bicubic", antialias=True)[0].clamp(0, 1))
    return parts


def shear(parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Point:
    """The point at x' = x + a sin(k y + f), y' = y + b sin(l x' + g), with ``parameters`` a, k, f, b, l, g."""
    a, k, f, b, l, g = parameters  # noqa: E741
    x = torch.addcmul(x, a, (k * y).add_(f).sin_())
    return x, torch.addcmul(y, b, (l * x).add_(g).sin_())


def unshear(parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> Point:
    """The inverse of :func:`shear`."""
    a, k, f, b, l, g = parameters  # noqa: E741
    y = torch.addcmul(y, b, (l * x).add_(g).sin_(), value=-1)
    return torch.addcmul(x, a, (k * y).add_(f).sin_(), value=-1), y


class Shapes(NamedTuple):
    """Where layers are, each at some time, and their outlines.

    A point of a layer has coordinates q of its own, in pixels, which it keeps. In the frame it is at c + z R S^-1(q),
    with the layer's centre c, magnification z, rotation R and warp S (:func:`shear`) at that time.

    Args:
        place: ``(5, ...)``: the centre's x and y, the cosine and the sine of the rotation, and the magnification.
        warp: ``(6, ...)``, the parameters of S.
        outline: ``(8, ...)``: radius r, elongation e, and the parameters of a shear that takes q to p; within the
            outline is where (e p_x)^2 + (p_y / e)^2 < r^2.
    """

    place: Tensor
    warp: Tensor
    outline: Tensor

    def at(self, *index: Any) -> Shapes:
        """Some of the layers and times."""
        return Shapes(*(part[(slice(None), *index)] for part in self))

    def each(self, index: Tensor) -> Shapes:
        """The layer and time of each of these flat indices ``(N,)``."""
        return Shapes(*(part.flatten(1).index_select(1, index) for part in self))

    def own(self, x: Tensor, y: Tensor) -> Point:
        """The layer's own coordinates of a point of the frame."""
        cx, cy, cos, sin, zoom = self.place
        cos, sin, x, y = cos / zoom, sin / zoom, x - cx, y - cy
        return shear(self.warp.unbind(), cos * x + sin * y, cos * y - sin * x)

    def frame(self, x: Tensor, y: Tensor) -> Point:
        """Where a point of the layer is in the frame: the inverse of :meth:`own`."""
        cx, cy, cos, sin, zoom = self.place
        cos, sin = cos * zoom, sin * zoom
        x, y = unshear(self.warp.unbind(), x, y)
        return (cos * x).add_(cx).addcmul_(sin, y, value=-1), (sin * x).add_(cy).addcmul_(cos, y)

    def depth(self, x: Tensor, y: Tensor) -> Tensor:
        """How far within the outline a point of the layer is, nearly in pixels; negative outside of it."""
        radius, elongation, *dents = self.outline
        x, y = shear(dents, x, y)
        x, y = x * elongation, y / elongation
        return torch.sub(radius, (x * x).addcmul_(y, y).sqrt_())

    @property
    def reach(self) -> Tensor:
        """No point of a depth above -1 is farther from the centre than this, in the frame."""
        radius, elongation, *dents = self.outline
        bends = torch.hypot(dents[0], dents[3]) + torch.hypot(self.warp[0], self.warp[3])
        zoom = self.place[4]
        return torch.mul(zoom, (radius + 1) * elongation.maximum(1 / elongation) + bends)


class Looks(NamedTuple):
    """What layers show at their own coordinates q.

    Args:
        texture: ``(8, ...)``: four numbers for x and then for y: start s, step d, span m and offset o. The layer shows
            the atlas at o + m |v - round(v)|, v = s + d q: back and forth through one photograph.
        colour: ``(6, ...)``: gain, then offset, of red, green and blue.
    """

    texture: Tensor
    colour: Tensor

    def at(self, *index: Any) -> Looks:
        """Some of the layers and times."""
        return Looks(*(part[(slice(None), *index)] for part in self))

    def each(self, index: Tensor) -> Looks:
        """The layer and time of each of these flat indices ``(N,)``."""
        return Looks(*(part.flatten(1).index_select(1, index) for part in self))

    def show(self, atlas: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The colours of a point of the layer: ``(3, ...)`` in [0, 1], from an atlas ``(3, h, w)``."""
        along = []
        for (start, step, span, offset), q in ((self.texture[:4], x), (self.texture[4:], y)):
            v = (step * q).add_(start)
            along.append(v.sub_(v.round()).abs_().mul_(span).add_(offset))
        grid = torch.stack(along, dim=-1)
        shown = grid_sample(atlas[None], grid.view(1, 1, -1, 2), align_corners=True).view(3, *x.shape)
        return shown.mul_(self.colour[:3]).add_(self.colour[3:]).clamp_(0, 1)


class Atlas(NamedTuple):
    """Photographs in one image, one below the other, and squares of them to choose from.

    Args:
        image: ``(3, h, w)``.
        cells: ``(N, 7)``: x and y of a square's corner; the width and height of its photograph and the row where that
            begins; the mean and the standard deviation of the grey values in and around the square.
        shares: ``(N,)``, the chance that this square or one before it is chosen.
    """

    image: Tensor
    cells: Tensor
    shares: Tensor

    @classmethod
    def of(cls, photographs: Sequence[Tensor]) -> Atlas:
        """Photographs ``(3, h, w)`` are equally likely, their squares in proportion to their standard deviations."""
        width = max(photograph.shape[-1] for photograph in photographs)
        image = torch.cat([pad(photograph, (0, width - photograph.shape[-1])) for photograph in photographs], dim=1)
        around = partial(avg_pool2d, kernel_size=3 * CELL, stride=CELL, padding=CELL, count_include_pad=False)
        cells, shares, top = [], [], 0
        for photograph in photographs:
            _, h, w = photograph.shape
            grey = photograph.mean(0, keepdim=True)[:, : h // CELL * CELL, : w // CELL * CELL]
            mean = around(grey)
            deviation = (around(grey**2) - mean**2).clamp(min=1e-6).sqrt()
            y, x = (CELL * torch.ones_like(mean[0]).nonzero()).float().unbind(1)
            sizes = (torch.full_like(x, size) for size in (w, h, top))
            cells.append(torch.stack([x, y, *sizes, mean.flatten(), deviation.flatten()], dim=1))
            shares.append(deviation.flatten() / deviation.sum() / len(photographs))
            top += h
        return cls(image, torch.cat(cells), torch.cat(shares).cumsum(0))

    def look(self, cell: Tensor, u: Tensor, v: Tensor, scale: Tensor, mirror: Tensor) -> list[Tensor]:
        """What :class:`Looks` calls ``texture``, and the grey values' mean and standard deviation there.

        Args:
            cell: which square has the layer's origin, by their shares; in [0, 1].
            u: how far right in it; in [0, 1].
            v: how far down; in [0, 1].
            scale: pixels of the photograph for one of the layer.
            mirror: 1 or -1.
        """
        index = torch.searchsorted(self.shares, cell).clamp(max=len(self.shares) - 1)
        x, y, w, h, top, mean, deviation = self.cells[index].unbind(-1)
        _, height, width = self.image.shape
        texture = []
        for start, step, last, first, size in (
            (x + CELL * u, scale * mirror, w - 1, torch.zeros_like(top), width),
            (y + CELL * v, scale, h - 1, top, height),
        ):
            texture += [start / (2 * last), step / (2 * last)]
            texture += [4 * last / (size - 1), 2 * first / (size - 1) - 1]  # grid_sample's image is from -1 to 1
        return [*texture, mean, deviation]


@dataclass(frozen=True)
class FlowComposer:
    """Draws scenes: layers of photographs that move over each other, and their flow.

    A background and, over it, ``min_patches`` to ``max_patches`` patches with smooth outlines. Each layer shows a part
    of a photograph, turned, mirrored and magnified at random, in colours, brightness and contrast of its own. Parts
    with more detail are drawn more often; beyond its edges a photograph goes on as its mirror image. Each layer moves
    by itself: it shifts, turns and grows about its centre, and bends, see :class:`Shapes`. Each of these has a rate,
    uniform in plus or minus its bound, and a constant acceleration, at most a tenth of the bound from frame to frame.
    Halfway through the scene the centre of a patch is anywhere in the frame, give or take. Which of two layers is
    nearer never changes.

    A pixel shows what its nearest layer shows at the pixel's centre, bilinearly and in steps of 1/255; the edges of
    patches are about a pixel soft. Its flow is that of this layer: from the formulas above, and so exact up to float32.
    It is occluded if its point is, in the next frame, within the outline of a nearer layer, or not between the centres
    of the frame's outermost pixels.

    Args:
        photographs: each ``(3, h, w)`` in [0, 1]; each is as likely as another.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        frames: frames a scene.
        min_patches: fewest patches.
        max_patches: most patches.
        max_shift: largest shift from frame to frame along each axis, in pixels.
        max_rotation: largest rotation from frame to frame either way, in degrees.
        max_zoom: largest growth from frame to frame, as a fraction; 0.05 is 5 %, and as likely down.
        max_warp: largest bend from frame to frame along each axis, in pixels.
        min_radius: smallest radius of a patch, as a fraction of the shorter side of a frame.
        max_radius: largest radius.
    """

    photographs: Sequence[Tensor]
    height: int = 96
    width: int = 128
    frames: int = 2
    min_patches: int = 1
    max_patches: int = 3
    max_shift: float = 8.0
    max_rotation: float = 3.0
    max_zoom: float = 0.04
    max_warp: float = 1.0
    min_radius: float = 0.12
    max_radius: float = 0.24

    def __post_init__(self) -> None:
        whole_number("height", self.height, at_least=16)
        whole_number("width", self.width, at_least=16)
        whole_number("frames", self.frames, at_least=2)
        whole_number("min_patches", self.min_patches, at_least=0)
        whole_number("max_patches", self.max_patches, at_least=self.min_patches)
        for name in ("max_shift", "max_rotation", "max_zoom", "max_warp"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is at least 0 and below inf; given: {getattr(self, name)!r}")
        if not 0 < self.min_radius <= self.max_radius < math.inf:
            raise ValueError(
                "min_radius is above 0 and max_radius at least min_radius; "
                f"given: {self.min_radius!r} and {self.max_radius!r}"
            )

    def __call__(self, count: int, generator: Generator | None = None) -> Scenes:
        """Frames ``(count, T, 3, H, W)``, their flow ``(count, T-1, 2, H, W)`` and what is occluded.

        Args:
            count: how many scenes.
            generator: where the random numbers come from; by default torch's global one.
        """
        B, T, H, W = count, self.frames, self.height, self.width
        shapes, looks = self._draw(B, generator)
        atlas = self._atlas.image
        x, y = torch.arange(float(W)), torch.arange(float(H)).view(H, 1)

        # The background: its colours, and where its points are in the next frame. Time comes first, so that in a flat
        # index the pixels that have a next frame are before the others.
        behind = shapes.at(0, ..., None, None)
        q = behind.own(x, y)
        image = looks.at(0, ..., None, None).show(atlas, *q).flatten(1)
        goal = torch.stack(behind.at(slice(1, None)).frame(q[0][:-1], q[1][:-1])).flatten(1)
        nearest = torch.zeros(1, T * B * H * W)

        # The patches, each where it may be; a nearer one after those behind it.
        cx, cy = shapes.place[:2, 1:, ..., None, None]
        near = (x - cx) ** 2 + (y - cy) ** 2 < shapes.reach[1:, ..., None, None] ** 2
        for k, each in enumerate(near, start=1):
            pixel = each.flatten().nonzero().squeeze(1)
            layer = k * T * B + pixel // (H * W)
            shape = shapes.each(layer)
            q = shape.own((pixel % W).float(), (pixel % (H * W) // W).float())
            depth = shape.depth(*q)
            _put(image, pixel, looks.each(layer).show(atlas, *q), (depth + 0.5).clamp(0, 1))
            inside = (depth > 0).float()
            _put(nearest, pixel, torch.full_like(depth, k)[None], inside)
            n = int(each[:-1].sum())
            new = shapes.each(layer[:n] + B).frame(q[0][:n], q[1][:n])
            _put(goal, pixel[:n], torch.stack(new), inside[:n])

        # A point is hidden if a nearer layer is over it. One may be only where one is at a pixel nearby.
        nearest = nearest.view(T, B, H, W)
        x_goal, y_goal = goal.unflatten(1, (T - 1, B, H, W))
        occluded = (x_goal < 0) | (x_goal > W - 1) | (y_goal < 0) | (y_goal > H - 1)
        pixel = (y_goal.round().clamp_(0, H - 1) * W).add_(x_goal.round().clamp_(0, W - 1)).long().flatten(2)
        suspect = _around(nearest[1:]).flatten(2).gather(2, pixel).view_as(occluded) > nearest[:-1]
        pixel = suspect.flatten().nonzero().squeeze(1)
        own, point = nearest.flatten()[pixel], goal[:, pixel]
        for k in range(1, self.max_patches + 1):
            shape = shapes.each((k * T + 1) * B + pixel // (H * W))
            occluded.view(-1)[pixel] |= (own < k) & (shape.depth(*shape.own(*point)) > 0)

        flow = torch.stack([x_goal - x, y_goal - y])
        frames = image.mul_(255).round_().to(torch.uint8).view(3, T, B, H, W)
        return (
            frames.permute(2, 1, 0, 3, 4).contiguous(),
            flow.permute(2, 1, 0, 3, 4).contiguous(),
            occluded.transpose(0, 1).contiguous(),
        )

    @cached_property
    def _atlas(self) -> Atlas:
        return Atlas.of(self.photographs)

    def _draw(self, B: int, generator: Generator | None) -> tuple[Shapes, Looks]:
        """The layers of B scenes: entries ``(n, 1 + max_patches, T, B)``, the background first."""
        L, T, side = 1 + self.max_patches, self.frames, min(self.height, self.width)
        time = (torch.arange(float(T)) - (T - 1) / 2).view(T, 1)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(L, 1, B, generator=generator)

        def path(bound: float) -> Tensor:
            """How far a motion has come at each time, from halfway through the scene: ``(L, T, B)``."""
            return bound * (uniform(-1, 1) * time + ACCELERATION * uniform(-1, 1) * time**2 / 2)

        def waves(x: Tensor, y: Tensor, length: float | Tensor) -> tuple[Tensor, ...]:
            """The parameters of a shear with these amplitudes, and waves of that length to twice as long."""
            k, l = (2 * math.pi / (length * uniform(1, 2)) for _ in "xy")  # noqa: E741
            return x, k, uniform(0, 2 * math.pi), y, l, uniform(0, 2 * math.pi)

        # Centres and motions. Patches that a scene does not have are far out of its sight.
        order = torch.arange(L).view(L, 1, 1)
        number = (self.min_patches + (1 + self.max_patches - self.min_patches) * uniform(0, 1)[0]).floor()
        cx, cy = ((n - 1) * torch.where(order == 0, 0.5, uniform(0, 1)) for n in (self.width, self.height))
        cx = cx + torch.where(order > number, OUT_OF_SIGHT, 0)
        angle = uniform(-math.pi, math.pi) + path(math.radians(self.max_rotation))
        zoom = path(math.log1p(self.max_zoom)).exp()
        place = (cx + path(self.max_shift), cy + path(self.max_shift), angle.cos(), angle.sin(), zoom)
        warp = waves(path(self.max_warp), path(self.max_warp), 0.7 * side)

        # Outlines.
        radius = side * uniform(self.min_radius, self.max_radius)
        x, y = (MAX_DENT * radius * uniform(-1, 1) for _ in "xy")
        outline = (radius, (MAX_STRETCH * uniform(-1, 1)).exp(), *waves(x, y, 2 * radius))

        # What they show, with a brightness and a contrast that let its detail be seen.
        scale, mirror = (math.log(MIN_SCALE) * uniform(0, 1)).exp(), uniform(-1, 1).sign()
        *texture, mean, deviation = self._atlas.look(uniform(0, 1), uniform(0, 1), uniform(0, 1), scale, mirror)
        contrast = uniform(0.8, 1.25) * (CONTRAST / deviation).clamp(0.5, 2)
        gains = [contrast * uniform(0.85, 1.15) for _ in "rgb"]
        brightness = uniform(0.35, 0.65)
        colour = (*gains, *(brightness - gain * mean for gain in gains))

        def stacked(entries: Sequence[Tensor]) -> Tensor:
            return torch.stack([entry.expand(L, T, B) for entry in entries])

        return Shapes(*map(stacked, (place, warp, outline))), Looks(*map(stacked, (texture, colour)))


def _put(canvas: Tensor, at: Tensor, new: Tensor, alpha: Tensor) -> None:
    """Mix new values ``(C, n)`` into the places ``at`` of a canvas ``(C, N)``: all new where alpha is 1."""
    canvas.scatter_(1, at.expand_as(new), canvas.index_select(1, at).lerp_(new, alpha))


def _around(values: Tensor) -> Tensor:
    """The largest value in the 3x3 neighbourhood of each pixel, in ``(..., H, W)``, which are at least 0."""
    values = pad(values, (1, 1, 1, 1))
    values = values[..., :-2, :].maximum(values[..., 1:-1, :]).maximum(values[..., 2:, :])
    return values[..., :-2].maximum(values[..., 1:-1]).maximum(values[..., 2:])


class FlowDataset(Dataset[FlowSample]):
    """Scenes that stay as they are; samples as :class:`SyntheticFlowDataModule` says, without the batch.

    Args:
        scenes: what :class:`FlowComposer` gives.
    """

    def __init__(self, scenes: Scenes) -> None:
        self.frames, self.flow, self.occluded = scenes

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> FlowSample:
        frames, flow, occluded = self.frames[index].float() / 255, self.flow[index], self.occluded[index]
        valid = torch.ones_like(occluded)
        return (frames, flow, valid, occluded) if len(frames) > 2 else (*frames, *flow, *valid, *occluded)


class NewFlow(Dataset[FlowSample]):
    """As many samples as asked for, as those of :class:`FlowDataset`, but drawn anew each time.

    The random numbers are seeded from torch's global generator and from the index, so that they follow
    ``seed_everything``, and differ between epochs, between worker processes and between the processes of a distributed
    run, which sample different indices.
    """

    def __init__(self, composer: FlowComposer, size: int) -> None:
        self.composer = composer
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> FlowSample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[FlowSample]:
        """A whole batch at once, which is what a DataLoader asks for."""
        seed = int(torch.randint(2**62, ())) + indices[0]
        scenes = FlowDataset(self.composer(len(indices), Generator().manual_seed(seed)))
        return [scenes[n] for n in range(len(scenes))]


class SyntheticFlowDataModule(FlowDataModule[Dataset[FlowSample]]):
    """Layers cut out of scikit-learn's two real photographs, in motion, with exact flow; nothing to download.

    How scenes come about stands at :class:`FlowComposer`. Batches are ``(image1, image2, flow, valid, occluded)``, or
    for more than two frames sequences, see :class:`FlowDataModule`; all pixels are valid. The three parts show
    different bands of the photographs, :func:`photographs_split`: no pixel of a training photograph occurs in a
    validation or test scene, nor one of validation in test. Training scenes are drawn anew in every epoch; validation
    and test scenes never change for the same arguments, whatever the seed. By default the flow of the test scenes is
    6.1 pixels long on average and 13.2 at most, and 12 % of their pixels are occluded.

    Args:
        batch_size: scenes a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        frames: frames a scene: 2 for pairs, more for sequences.
        min_patches: fewest patches that move over the background.
        max_patches: most patches.
        max_shift: largest shift of a layer from frame to frame along each axis, in pixels.
        max_rotation: largest rotation from frame to frame either way, in degrees.
        max_zoom: largest growth from frame to frame, as a fraction; 0.05 is 5 %, and as much down.
        max_warp: largest bend from frame to frame along each axis, in pixels.
        train_size: scenes an epoch.
        val_size: validation scenes.
        test_size: test scenes.
    """

    def __init__(
        self,
        batch_size: int = 8,
        num_workers: int = 0,
        height: int = 96,
        width: int = 128,
        frames: int = 2,
        min_patches: int = 1,
        max_patches: int = 3,
        max_shift: float = 8.0,
        max_rotation: float = 3.0,
        max_zoom: float = 0.04,
        max_warp: float = 1.0,
        train_size: int = 1024,
        val_size: int = 64,
        test_size: int = 128,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.sizes = tuple(
            whole_number(name, value, at_least=1)
            for name, value in (("train_size", train_size), ("val_size", val_size), ("test_size", test_size))
        )
        self.composers = tuple(
            FlowComposer(
                photographs,
                height=height,
                width=width,
                frames=frames,
                min_patches=min_patches,
                max_patches=max_patches,
                max_shift=max_shift,
                max_rotation=max_rotation,
                max_zoom=max_zoom,
                max_warp=max_warp,
            )
            for photographs in photographs_split()
        )

    def load(self) -> Splits[Dataset[FlowSample]]:
        train, val, test = self.composers
        train_size, val_size, test_size = self.sizes
        return Splits(
            NewFlow(train, train_size),
            FlowDataset(_fixed(val, val_size, seed=1)),
            FlowDataset(_fixed(test, test_size, seed=2)),
        )


def _fixed(composer: FlowComposer, count: int, seed: int) -> Scenes:
    """Scenes that follow from the seed, drawn a few at a time to save memory; of more scenes the first are the same."""
    generator, step = Generator().manual_seed(seed), 16
    drawn = [composer(step, generator) for _ in range(0, count, step)]
    frames, flow, occluded = (torch.cat(parts)[:count] for parts in zip(*drawn, strict=True))
    return frames, flow, occluded

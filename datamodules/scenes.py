"""Scenes of scikit-learn's digits, labelled pixel by pixel: real handwriting for segmentation, nothing to download."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Generator, Tensor
from torch.nn.functional import conv2d, grid_sample
from torch.utils.data import Dataset

from .base import Sample, Splits, whole_number
from .digits import digits_split
from .segmentation import SegmentationDataModule

BACKGROUND, IGNORED = 0, 255
FAINT, INK = 64, 128
"""A pixel is background below the first of these values, ink from the second on, and ignored in between."""


@dataclass(frozen=True)
class SceneComposer:
    """Draws scenes: each digit turned and magnified by its own random amounts, then put where there is room.

    In this order, for each scene: how many digits, uniform from ``min_digits`` to ``max_digits``; which ones, uniform,
    with repetition; for each an angle and a magnification, uniform in their bounds. The digit is sampled bilinearly
    and rounded to whole numbers from 0 to 255. One after another the digits go to a place that is uniform among those
    where no pixel with ink, however faint, meets another digit's or leaves the scene. If there is none, it is uniform
    among those where the fewest do, and the digit placed later covers the earlier one.

    A pixel's label follows from its value: below 64 background (0); from 128 on the class of its digit plus 1;
    between, on the faint edge of a stroke, 255: ignored.

    All arithmetic is exact: the maps are rounded to multiples of 2**-10, so that float64 holds every product and sum.
    A seeded generator therefore gives the same scenes on every machine.

    Args:
        digits: ``(N, 8, 8)``, whole numbers from 0 to 16.
        classes: ``(N,)``, from 0 to 9.
        scene_size: height and width of a scene, in pixels.
        min_digits: fewest digits in a scene.
        max_digits: most digits in a scene.
        min_scale: smallest magnification.
        max_scale: largest magnification; a digit then fills ``8 * max_scale`` pixels.
        max_rotation: largest rotation either way, in degrees.
    """

    digits: Tensor
    classes: Tensor
    scene_size: int
    min_digits: int
    max_digits: int
    min_scale: float
    max_scale: float
    max_rotation: float

    def __post_init__(self) -> None:
        whole_number("min_digits", self.min_digits, at_least=1)
        whole_number("max_digits", self.max_digits, at_least=self.min_digits)
        if not 1 <= self.min_scale <= self.max_scale < math.inf:
            raise ValueError(
                "min_scale is at least 1 and max_scale at least min_scale; "
                f"given: {self.min_scale!r} and {self.max_scale!r}"
            )
        if not 0 <= self.max_rotation < math.inf:
            raise ValueError(f"max_rotation is at least 0 and below inf; given: {self.max_rotation!r}")
        if whole_number("scene_size", self.scene_size, at_least=1) < self.patch_size:
            raise ValueError(
                f"a scene of scene_size={self.scene_size} has no room for a digit of max_scale={self.max_scale}: "
                f"it takes {self.patch_size} pixels. Choose a larger scene_size or a smaller max_scale"
            )

    @property
    def patch_size(self) -> int:
        """Height and width of the square that holds any digit, with a margin for the rotation."""
        return math.ceil(8 * self.max_scale) + 2

    def __call__(self, count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images ``(count, 1, S, S)`` and labels ``(count, S, S)``, both uint8.

        Args:
            count: how many scenes.
            generator: where the random numbers come from; by default torch's global one.
        """
        B, K, P = count, self.max_digits, self.patch_size
        number = torch.randint(self.min_digits, K + 1, (B, 1), generator=generator)
        which = torch.randint(len(self.digits), (B, K), generator=generator)
        patches = self._patches(which.view(B * K), generator).view(B, K, P, P)
        patches = patches * (torch.arange(K) < number).view(B, K, 1, 1)  # a digit without ink is not there

        # A margin on each side, taken from the start, keeps ink inside and lets the patches' empty borders out.
        m = P // 2
        size = self.scene_size + 2 * m
        image = torch.zeros(B, size, size, dtype=torch.uint8)
        label = torch.zeros_like(image)
        taken = torch.ones(B, size, size)
        taken[:, m:-m, m:-m] = 0
        for k in range(K):
            values = patches[:, k].flatten(1)
            marks = torch.where(values < FAINT, BACKGROUND, IGNORED)
            marks = torch.where(values < INK, marks, self.classes[which[:, k], None] + 1).to(torch.uint8)
            pixels = self._place(taken, patches[:, k], generator)
            for canvas, new in ((image, values), (label, marks), (taken, torch.ones(B, P * P))):
                flat = canvas.view(B, size * size)
                flat.scatter_(1, pixels, torch.where(values > 0, new, flat.gather(1, pixels)))
        return image[:, None, m:-m, m:-m].contiguous(), label[:, m:-m, m:-m].contiguous()

    def _patches(self, which: Tensor, generator: Generator | None) -> Tensor:
        """The digits of these indices ``(n,)``, turned and magnified: uint8 ``(n, P, P)``.

        The value at p, measured from the patch's centre, is the digit's at A p, measured from its own.
        """
        n, P = len(which), self.patch_size
        u, v = torch.rand(2, n, dtype=torch.float64, generator=generator)
        angle = math.radians(self.max_rotation) * (2 * u - 1)
        scale = self.min_scale + (self.max_scale - self.min_scale) * v
        cos, sin = ((1024 * t / scale).round() / 1024 for t in (angle.cos(), angle.sin()))
        cos, sin = cos.view(n, 1, 1), sin.view(n, 1, 1)
        at = torch.arange(P, dtype=torch.float64) - (P - 1) / 2
        x, y = at.view(1, P), at.view(P, 1)
        grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1) / 4  # grid_sample's unit is half an image
        values = grid_sample(self.digits[which].double().unsqueeze(1), grid, align_corners=False)
        return (values.squeeze(1) * 255 / 16).round().to(torch.uint8)

    def _place(self, taken: Tensor, patch: Tensor, generator: Generator | None) -> Tensor:
        """Where the pixels of each patch go, as flat indices into the canvas: ``(B, P * P)``."""
        B, P, size = len(patch), self.patch_size, taken.shape[-1]
        overlap = conv2d(taken.unsqueeze(0), (patch > 0).float().unsqueeze(1), groups=B)[0].flatten(1)
        drawn = torch.rand(overlap.shape, generator=generator)
        places = size - P + 1
        best = torch.where(overlap == overlap.amin(1, keepdim=True), drawn, -1.0).argmax(1)
        corner = best // places * size + best % places
        at = torch.arange(P)
        return corner.view(B, 1) + (size * at.view(P, 1) + at).view(1, P * P)


class SceneDataset(Dataset[Sample]):
    """Samples ``(image float32 (1, S, S) in [0, 1], label int64 (S, S))``: scenes that stay as they are."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index].float() / 255, self.labels[index].long()


class NewScenes(Dataset[Sample]):
    """As many samples as asked for, as those of :class:`SceneDataset`, but drawn anew each time.

    The random numbers are seeded from torch's global generator and from the index, so that they follow
    ``seed_everything``, and differ between epochs, between worker processes and between the processes of a distributed
    run, which sample different indices.
    """

    def __init__(self, composer: SceneComposer, size: int) -> None:
        self.composer = composer
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """A whole batch at once, which is what a DataLoader asks for."""
        seed = int(torch.randint(2**62, ())) + indices[0]
        images, labels = self.composer(len(indices), Generator().manual_seed(seed))
        return list(zip(images.float() / 255, labels.long(), strict=True))


class DigitScenesDataModule(SegmentationDataModule[Dataset[Sample]]):
    """Scenes of a few of scikit-learn's 1,797 real digits, labelled pixel by pixel; nothing to download.

    Images are ``(1, S, S)``, S the scene size. The classes are the background and the ten digits; the label of a digit
    is itself plus 1. How scenes come about stands at :class:`SceneComposer`. A digit keeps the part that
    :func:`digits_split` gives it: no digit of a training scene occurs in a validation or test scene, nor one of a
    validation scene in a test scene. Training scenes are drawn anew in every epoch; validation and test scenes never
    change for the same arguments, whatever the seed and the machine.

    Args:
        batch_size: scenes a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        scene_size: height and width of a scene, in pixels.
        min_digits: fewest digits in a scene.
        max_digits: most digits in a scene.
        min_scale: smallest magnification of a digit of 8x8 pixels.
        max_scale: largest magnification.
        max_rotation: largest rotation either way, in degrees.
        train_size: scenes an epoch.
        val_size: validation scenes.
        test_size: test scenes.
    """

    class_names = ("background", *"0123456789")

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        scene_size: int = 32,
        min_digits: int = 3,
        max_digits: int = 5,
        min_scale: float = 1.0,
        max_scale: float = 1.5,
        max_rotation: float = 10.0,
        train_size: int = 1024,
        val_size: int = 128,
        test_size: int = 256,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.sizes = tuple(
            whole_number(name, value, at_least=1)
            for name, value in (("train_size", train_size), ("val_size", val_size), ("test_size", test_size))
        )
        digits = load_digits()
        images, classes = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
        self.composers = tuple(
            SceneComposer(
                digits=images[part],
                classes=classes[part],
                scene_size=scene_size,
                min_digits=min_digits,
                max_digits=max_digits,
                min_scale=min_scale,
                max_scale=max_scale,
                max_rotation=max_rotation,
            )
            for part in digits_split()
        )
        self.image_shape = (1, scene_size, scene_size)

    def load(self) -> Splits[Dataset[Sample]]:
        train, val, test = self.composers
        train_size, val_size, test_size = self.sizes
        return Splits(
            NewScenes(train, train_size),
            SceneDataset(*val(val_size, Generator().manual_seed(1))),
            SceneDataset(*test(test_size, Generator().manual_seed(2))),
        )

"""What the published optical flow sets share: torchvision's layouts, files read or refused by name, parts in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import VisionDataset
from torchvision.transforms.v2 import functional as F

from .base import Splits
from .files import read_rgb
from .flow import FlowDataModule, FlowSample
from .flow_augmentation import Pair
from .idx import DataError, corrupt

UNKNOWN = 1000.0
"""Pixels: a flow this long in x or in y stands for one that is not known, where a set has no mask that says so."""


class FlowFiles(Dataset[FlowSample]):
    """Samples ``(image1, image2, flow, valid)``, read from disk one by one.

    The flow is not known, and 0, where the set's own mask says so, and where u or v is 1000 pixels or more.

    Args:
        source: torchvision's dataset, which finds the files and reads the flow.
        augmentation: applied to each sample.

    Raises:
        DataError: files that do not belong together were found, because some are missing; the message names them.
    """

    def __init__(self, source: VisionDataset, augmentation: Callable[..., Pair] | None = None) -> None:
        # torchvision's own __getitem__ does not say which file it could not read.
        self.images: list[list[str]] = source._image_list  # noqa: SLF001
        self.flows: list[str] = source._flow_list  # noqa: SLF001
        self.read_flow: Callable[[str], Any] = source._read_flow  # noqa: SLF001
        self.augmentation = augmentation
        _refuse_strangers(str(source.root), self.images, self.flows)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Pair:
        image1, image2 = (F.pil_to_tensor(read_rgb(path)).float() / 255 for path in self.images[index])
        flow, valid = self._flow(self.flows[index])
        for path, found, expected in (
            (self.images[index][1], tuple(image2.shape), tuple(image1.shape)),
            (self.flows[index], tuple(flow.shape), (2, *image1.shape[1:])),
        ):
            if found != expected:
                raise corrupt(Path(path), f"its size is {found}; expected: {expected}, as {self.images[index][0]}")
        pair = (image1, image2, flow, valid)
        return pair if self.augmentation is None else self.augmentation(*pair)

    def _flow(self, path: str) -> tuple[Tensor, Tensor]:
        """Flow ``(2, H, W)`` and where it is known ``(H, W)``."""
        try:
            if path.endswith(".png"):
                flow, mask = read_flow_png(path)
            else:
                flow, mask = torch.from_numpy(self.read_flow(path)), torch.tensor(True)  # noqa: FBT003
        except Exception as error:  # torchvision raises nothing more special for some damaged files
            raise corrupt(Path(path), f"it does not open as optical flow: {error}") from error
        valid = (flow.abs() < UNKNOWN).all(dim=0) & mask
        return flow.where(valid, 0.0).contiguous(), valid


def read_flow_png(path: str) -> tuple[Tensor, Tensor]:
    """Flow ``(2, H, W)`` and where it is known ``(H, W)``, from a PNG file of 16 bits, as KITTI and HD1K have it.

    The channels are 2**15 + 64 u, 2**15 + 64 v and whether the flow is known.

    Raises:
        OSError: the file is not an image, or is damaged.
        ValueError: it is another kind of image.
    """
    halves = []
    for order in ("RGB;16B", "RGB;16L"):  # Pillow keeps 8 of 16 bits: the upper ones, or those it takes for them
        with Image.open(path) as image:
            if [tile.args for tile in image.tile] != ["RGB;16B"]:
                raise ValueError(f"it is an image of the kind {image.mode}; expected: three channels of 16 bits")
            image.tile = [image.tile[0]._replace(args=order)]
            halves.append(F.pil_to_tensor(image).int())
    u, v, known = 256 * halves[0] + halves[1]
    return (torch.stack([u, v]).float() - 2**15) / 64, known > 0


@dataclass(frozen=True)
class Published:
    """A published set: how it is laid out and where it comes from.

    Args:
        name: of the set.
        reader: torchvision's class of it.
        layout: its files, below the root.
        page: where it is found.
    """

    name: str
    reader: Callable[..., VisionDataset]
    layout: str
    page: str

    def read(self, root: str, *part: str, augmentation: Callable[..., Pair] | None = None) -> FlowFiles:
        """Find the files.

        Args:
            root: the folder in which the set's own folder lies.
            *part: which of the files, in the words and the order of torchvision's class.
            augmentation: applied to each sample.

        Raises:
            FileNotFoundError: folders or files are missing; the message says what is expected and where it is from.
            DataError: files do not belong together.
        """
        folder = Path(root).absolute()
        try:
            source = self.reader(str(folder), *part)
        except (
            OSError,
            IndexError,
            ValueError,
        ) as error:  # the latter two for a list of files that is too short, or damaged
            raise self._not_found(folder, str(error)) from error
        if len(source) == 0:
            raise self._not_found(folder, f"there are no files of the part {', '.join(part)}")
        return FlowFiles(source, augmentation)

    def _not_found(self, folder: Path, what: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.name} was not found in {folder}, or not all of it: {what}. "
            f"Expected: {self.layout}, all in {folder}. Get it from {self.page}; nothing is downloaded here. "
            "To look elsewhere, give --data.root, the folder in which the set's own folder lies"
        )


class PublishedFlowDataModule(FlowDataModule[Dataset[FlowSample]]):
    """A published set: training pairs are augmented and cropped, those of evaluation are given whole, one a batch.

    Args:
        root: the folder in which the set's own folder lies.
        batch_size: pairs a batch of training, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    def __init__(self, root: str, batch_size: int, num_workers: int) -> None:
        super().__init__(batch_size, num_workers, eval_batch_size=1)
        self.root = root


def held_out(train: FlowFiles, whole: FlowFiles, fraction: float) -> Splits[Dataset[FlowSample]]:
    """The last of the pairs for validation and test, the others for training; for 0 all of them for both.

    Args:
        train: the pairs as they are given in training.
        whole: the same pairs as they are given in evaluation.
        fraction: of the pairs, from 0 to below 1; at least one pair if it is not 0.

    Raises:
        ValueError: another fraction, or one that leaves nothing to train on.
    """
    if fraction == 0:
        return Splits(train, whole, whole)
    kept = len(whole) - max(1, round(fraction * len(whole)))
    if not 0 < fraction < 1 or kept < 1:
        raise DataError(
            f"held_out is the fraction of the {len(whole)} pairs that are not trained on, from 0 to below 1, "
            f"and leaves at least one; given: {fraction!r}"
        )
    evaluated = Subset(whole, range(kept, len(whole)))
    return Splits(Subset(train, range(kept)), evaluated, evaluated)


def _refuse_strangers(root: str, images: list[list[str]], flows: list[str]) -> None:
    """Images of a pair share all numbers in their paths but the last; flow and image 1 those of 4 digits or more."""
    if len(images) != len(flows):
        raise DataError(
            f"{len(images)} pairs of images and {len(flows)} files of flow were found in {root}: "
            f"files are missing, of flow or of images. Unpack the set again"
        )
    for (image1, image2), flow in zip(images, flows, strict=True):
        of_1, of_2, of_flow = (re.findall(r"\d+", path.removeprefix(root)) for path in (image1, image2, flow))
        scenes = [[number for number in numbers if len(number) >= 4] for numbers in (of_1, of_flow)]
        if of_1[:-1] != of_2[:-1] or scenes[0] != scenes[1]:
            raise DataError(
                f"{image1}, {image2} and {flow} do not belong together: a file before them is missing. "
                "Unpack the set again"
            )

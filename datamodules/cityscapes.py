"""Cityscapes: 2,975 training and 500 validation street scenes of 1024x2048, labelled in 19 classes.

M. Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .base import Sample, Splits, whole_number
from .files import read_image, read_rgb
from .idx import corrupt
from .segmentation import SegmentationDataModule

Joint = Callable[[Any, Any], tuple[Any, Any]]
"""Transforms an image ``(3, H, W)`` and its labels ``(H, W)``, uint8, alike."""

EVALUATED = sorted((c for c in datasets.Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c.train_id)
TRAIN_IDS = torch.full((256,), 255, dtype=torch.uint8)
"""The label of a class among the 19, by its number in the files; 255 for the classes that do not count."""
TRAIN_IDS[[c.id for c in EVALUATED]] = torch.arange(len(EVALUATED), dtype=torch.uint8)


class ScaleCropFlip:
    """The published augmentation: scale, crop and mirror an image and its labels alike.

    The scale is one of .5, .6, ... 2.1, each equally likely. Images are resized bilinearly, without smoothing, and
    labels to the nearest. A window is then cut out at a random place; where the scaled image is smaller it lies at a
    random place in the window, on black, whose label is the ignored one. Every second pair is mirrored left to right.
    The random numbers come from torch's global generator.

    Args:
        height: of the window, in pixels.
        width: of the window, in pixels.
        ignore_index: the label of what is not in the image.
    """

    def __init__(self, height: int, width: int, ignore_index: int = 255) -> None:
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: ignore_index}
        crop = v2.RandomCrop((height, width), pad_if_needed=True, fill=fill)
        self.crop_flip = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __call__(self, image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """``(3, H, W)`` and ``(H, W)`` -> ``(3, height, width)`` and ``(height, width)``."""
        tenths = int(torch.randint(5, 22, ()))
        size = [side * tenths // 10 for side in labels.shape]
        scaled = (F.resize(each, size, antialias=False) for each in (image, labels))
        image, labels = self.crop_flip(*scaled)
        return image, labels


class CityscapesDataset(Dataset[Sample]):
    """Samples ``(image float32 (3, H, W) in [0, 1], label int64 (H, W))``, read from disk one by one.

    Args:
        images: the image files.
        labels: the file of labels for each of them.
        transform: applied to an image and its labels.
    """

    def __init__(self, images: list[str], labels: list[str], transform: Joint | None = None) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = tv_tensors.Image(read_rgb(self.images[index]))
        numbers = F.pil_to_tensor(read_image(self.labels[index]))
        if numbers.dtype != torch.uint8 or numbers.shape != (1, *image.shape[1:]):
            raise corrupt(
                Path(self.labels[index]),
                f"it holds labels {tuple(numbers.shape)} of {numbers.dtype}; "
                f"expected: {(1, *image.shape[1:])} of torch.uint8, as its image",
            )
        labels = tv_tensors.Mask(TRAIN_IDS[numbers[0].int()])
        if self.transform is not None:
            image, labels = self.transform(image, labels)
        values = F.to_dtype(image, torch.float32, scale=True)
        return values.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor).long()


class CityscapesDataModule(SegmentationDataModule[Dataset[Sample]]):
    """Cityscapes with its fine labels: 2,975 training and 500 validation images in 19 classes.

    The files are laid out as they are published: ``root/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png`` and
    ``root/gtFine/{train,val}/<city>/*_gtFine_labelIds.png``. torchvision unpacks the two published archives if they
    lie in ``root``. Downloading needs an account, at https://www.cityscapes-dataset.com.

    Training images are scaled, cut to ``crop_height`` x ``crop_width`` and mirrored at random, see
    :class:`ScaleCropFlip`; the others are given whole, ``(3, 1024, 2048)``. Classes outside the 19 have the label 255.
    The labels of the test images are not public: the test images here are the validation images.

    Args:
        root: folder with the subfolders ``leftImg8bit`` and ``gtFine``.
        crop_height: height of the training images, in pixels; 768 in the largest published model's recipe.
        crop_width: width of the training images, in pixels.
        batch_size: images a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    class_names = tuple(c.name for c in EVALUATED)
    class_weights = (
        *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
        *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
    )
    """The weight of each class in the loss of the published recipes."""

    def __init__(
        self,
        root: str = "data/cityscapes",
        crop_height: int = 512,
        crop_width: int = 1024,
        batch_size: int = 3,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root = root
        self.crop_height = whole_number("crop_height", crop_height, at_least=1)
        self.crop_width = whole_number("crop_width", crop_width, at_least=1)

    def load(self) -> Splits[Dataset[Sample]]:
        """Find the files.

        Raises:
            FileNotFoundError: folders, images or labels are missing; the message says which, and shows the layout.
        """
        augmentation = ScaleCropFlip(self.crop_height, self.crop_width, self.ignore_index)
        val = CityscapesDataset(*self._files("val"))
        return Splits(CityscapesDataset(*self._files("train"), augmentation), val, val)

    def _files(self, part: str) -> tuple[list[str], list[str]]:
        """The files of images and of labels, in the order of their names."""
        folder = Path(self.root).absolute()
        try:
            source = datasets.Cityscapes(str(folder), part, mode="fine", target_type="semantic")
        except RuntimeError as error:
            raise self._not_found(f"there is no {folder}/leftImg8bit/{part} or no {folder}/gtFine/{part}") from error
        if not source.images:
            raise self._not_found(f"there are no images in {source.images_dir}")
        missing = [path for (path,) in source.targets if not os.path.exists(path)]
        if missing:
            raise self._not_found(
                f"{len(missing)} of {len(source.images)} label files are missing: {min(missing)}, ..."
            )
        pairs = sorted(zip(source.images, source.targets, strict=True))  # os.listdir has no order
        return [image for image, _ in pairs], [labels for _, (labels,) in pairs]

    def _not_found(self, what: str) -> FileNotFoundError:
        folder = Path(self.root).absolute()
        return FileNotFoundError(
            f"Cityscapes was not found: {what}. Expected: {folder}/leftImg8bit/{{train,val}}/<city>/*_leftImg8bit.png "
            f"and {folder}/gtFine/{{train,val}}/<city>/*_gtFine_labelIds.png, or the archives "
            "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip beside them, from "
            "https://www.cityscapes-dataset.com (it asks for an account). "
            "To look elsewhere, give --data.root (in a script: CityscapesDataModule(root=...))"
        )

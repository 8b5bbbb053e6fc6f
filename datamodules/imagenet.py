"""ImageNet, and any other set of images sorted into one folder a class.

O. Russakovsky et al., "ImageNet large scale visual recognition challenge", IJCV 115 (2015): 1,281,167 training and
50,000 validation images in 1,000 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes
from torchvision.transforms import v2

from .base import Sample, Splits, whole_number
from .files import read_rgb
from .idx import DataError
from .image import ImageDataModule


class ImageNetDataModule(ImageDataModule[Dataset[Sample]]):
    """ImageNet: colour images of any size, read from disk one by one, in as many classes as there are folders.

    The images are at ``root/train/<class>/*.JPEG`` and ``root/val/<class>/*.JPEG``, in the same classes; other image
    formats are read too. Images are ``(3, image_size, image_size)``. In training a part of 8 to 100 % of the area and
    of proportions from 3:4 to 4:3 is cut out at random and resized, and every second image is mirrored; otherwise
    the shorter side is resized to ``resize`` pixels and the centre is cut out.

    The labels of the test images were never published: the test images here are the validation images, as in every
    published result.

    Args:
        root: folder with the subfolders ``train`` and ``val``.
        image_size: height and width of the images given, in pixels.
        resize: length of the shorter side before the centre is cut out, in pixels.
        batch_size: images a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        image_size: int = 224,
        resize: int = 256,
        batch_size: int = 32,
        num_workers: int = 4,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.root = root
        self.image_size = whole_number("image_size", image_size, at_least=1)
        self.resize = whole_number("resize", resize, at_least=image_size)
        self.image_shape = (3, image_size, image_size)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the folders in ``root/train``, sorted.

        Raises:
            FileNotFoundError: there is no such folder, or none in it; the message shows how images are laid out.
        """
        return self._classes("train")

    def prepare_data(self) -> None:
        """Look at the folders.

        Raises:
            FileNotFoundError: ``train`` or ``val`` is missing or has no folders; the message shows the layout.
            DataError: the two are not in the same classes.
        """
        train, val = set(self._classes("train")), set(self._classes("val"))
        if train != val:
            only = [
                f"only {part} has {len(names)}: {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
                for part, names in (("train", train - val), ("val", val - train))
                if names
            ]
            raise DataError(
                f"the folders train and val of {self._folder} differ in their classes; {'; '.join(only)}. "
                "Both need one folder for each class, of the same name"
            )

    def load(self) -> Splits[Dataset[Sample]]:
        self.prepare_data()
        as_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        train = v2.Compose([v2.RandomResizedCrop(self.image_size), v2.RandomHorizontalFlip(), *as_tensor])
        val = v2.Compose([v2.Resize(self.resize), v2.CenterCrop(self.image_size), *as_tensor])
        evaluated = self._images("val", val)
        return Splits(self._images("train", train), evaluated, evaluated)

    @property
    def _folder(self) -> Path:
        return Path(self.root).absolute()

    def _classes(self, part: str) -> tuple[str, ...]:
        try:
            return tuple(find_classes(self._folder / part)[0])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"no images were found: there is no folder of a class in {self._folder / part}. {self._layout()}"
            ) from error

    def _images(self, part: str, transform: Callable[[Any], Any]) -> Dataset[Sample]:
        try:
            dataset: Dataset[Sample] = ImageFolder(str(self._folder / part), transform, loader=read_rgb)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"classes without images in {self._folder / part}: {error}. {self._layout()}"
            ) from error
        return dataset

    def _layout(self) -> str:
        return (
            f"Expected: {self._folder}/train/<class>/*.JPEG and {self._folder}/val/<class>/*.JPEG, "
            f"in one folder for each class, with one of the endings {', '.join(IMG_EXTENSIONS)}. "
            "ImageNet's validation images are published in a single folder and have to be sorted into classes. "
            "To look elsewhere, give --data.root (in a script: ImageNetDataModule(root=...))"
        )

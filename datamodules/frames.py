"""Frames of your own: optical flow from each image of a folder to the next."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from .base import whole_number
from .files import read_rgb
from .idx import DataError

Pair = tuple[Tensor, Tensor]


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A key to sort names by, in which numbers count as such: ``frame_2`` is before ``frame_10``."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], name


class FramePairs(Dataset[Pair]):
    """Samples ``(image1, image2)``, float32 ``(3, H, W)`` in [0, 1]: each of these files and the next one.

    Args:
        files: N images; there are N - 1 pairs.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files) - 1

    def __getitem__(self, index: int) -> Pair:
        first, second = (
            pil_to_tensor(read_rgb(str(file))).to(torch.float32) / 255 for file in self.files[index : index + 2]
        )
        return first, second


class FramesDataModule(LightningDataModule):
    """Images of your own, in their order, for prediction: batches ``(image1, image2)`` of two consecutive frames.

    Images are float32 ``(1, 3, H, W)`` in [0, 1], grey images and those with transparency too. There is no flow to
    compare with, and so nothing to train on or to test with.

    In a folder, the files whose name ends like an image's (png, jpg, jpeg, bmp, ppm, pgm, tif, tiff, webp) are the
    frames, in natural order: ``frame_2.png`` is before ``frame_10.png``. Hidden files do not count.

    Args:
        root: folder of frames.
        images: paths of the frames, in the order wanted, in place of a folder; two of them are one pair.
        pattern: which files of the folder to take, such as ``left_*.png``.
        num_workers: processes that read images; 0 reads them in the main process.

    Attributes:
        in_order: each pair begins where the one before it ended, so that a model may go on from there.
    """

    in_order = True

    def __init__(
        self, root: str = "", images: list[str] | None = None, pattern: str = "*", num_workers: int = 0
    ) -> None:
        super().__init__()
        if bool(root) == (images is not None):
            raise ValueError(
                "FramesDataModule takes a folder, root (--data.root), or a list of images (--data.images), and not "
                f"both; given: root={root!r} and images={images!r}"
            )
        self.save_hyperparameters()
        self.root = root
        self.images = images
        self.pattern = pattern
        self.num_workers = whole_number("num_workers", num_workers, at_least=0)

    @cached_property
    def files(self) -> list[Path]:
        """The frames, in order.

        Raises:
            FileNotFoundError: the folder or an image is not there.
            DataError: there are fewer than two images, one of them does not open or has grey values of more than 8
                bits, or two neighbours differ in size.
        """
        files = self._in_folder() if self.images is None else [Path(image) for image in self.images]
        if len(files) < 2:
            found = ", ".join(str(file) for file in files) or "none"
            raise DataError(f"flow takes two images or more; found: {found}{self._what_is_there()}")
        sizes = [_size(file) for file in files]
        for n in range(len(files) - 1):
            if sizes[n] != sizes[n + 1]:
                (w, h), (w_next, h_next) = sizes[n : n + 2]
                raise DataError(
                    f"two frames in a row have different sizes: {files[n]} is {w}x{h}, {files[n + 1]} is "
                    f"{w_next}x{h_next}. Give frames of one size; pattern or images choose among files"
                )
        return files

    @property
    def names(self) -> list[str]:
        """A name for each pair: that of its first frame, without the ending. Where two are alike all are numbered."""
        stems = [file.stem for file in self.files[:-1]]
        return stems if len({*stems}) == len(stems) else [f"{n}_{stem}" for n, stem in enumerate(stems)]

    def setup(self, stage: str | None = None) -> None:
        """Find the frames, so that what is wrong with them is found before the first pair.

        Raises:
            DataError: the stage is not ``"predict"``; see :attr:`files` too.
        """
        if stage not in {None, "predict"}:
            self._refuse()
        _ = self.files

    def predict_dataloader(self) -> DataLoader[Pair]:
        return DataLoader(
            FramePairs(self.files),
            batch_size=1,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> NoReturn:
        self._refuse()

    def val_dataloader(self) -> NoReturn:
        self._refuse()

    def test_dataloader(self) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DataError(
            "FramesDataModule has no ground truth to train on or to test with: it is for predict. "
            "Use a set with flow, such as SyntheticFlowDataModule or SintelDataModule"
        )

    def _in_folder(self) -> list[Path]:
        folder = Path(self.root)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder.absolute()} to take frames from; it is root")
        files = [file for file in folder.glob(self.pattern) if file.suffix.lower() in IMG_EXTENSIONS]
        return sorted((file for file in files if file.name[0] != "."), key=lambda file: natural_order(str(file)))

    def _what_is_there(self) -> str:
        """The first few files of the folder, for a message."""
        if self.images is not None:
            return ""
        names = sorted(file.name for file in Path(self.root).iterdir())
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
        return f". In {Path(self.root).absolute()}, of which the pattern is {self.pattern!r}, there is: {some}"


def _size(file: Path) -> tuple[int, int]:
    """Width and height of an image, read off its first bytes.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is not an image, or has grey values of more than 8 bits.
    """
    try:
        with Image.open(file) as image:
            size, mode = image.size, image.mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no image {file.absolute()}") from error
    except (OSError, SyntaxError) as error:  # Pillow raises the latter for some damaged PNG files
        raise DataError(f"{file} does not open as an image: {error}") from error
    if mode[0] in "IF":  # which Pillow cuts off at 255
        raise DataError(f"{file} has grey values of more than 8 bits (Pillow calls it {mode!r}). Save it with 8 bits")
    return size

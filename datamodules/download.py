"""What the sets of small images that torchvision can download share: finding the files, fetching them, and advice."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from .idx import DataError
from .image import ImageDataModule, ImageDataset


class DownloadedImages(ImageDataModule[ImageDataset]):
    """A set that torchvision knows how to download; a subclass says which files it needs.

    Args:
        root: folder of datasets.
        download: fetch the files if they are not there.
        batch_size: images a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
    """

    source: Any
    """The dataset of torchvision that knows where the files come from; its name is that of the set."""

    def __init__(self, root: str = "data", download: bool = False, batch_size: int = 64, num_workers: int = 2) -> None:
        super().__init__(batch_size, num_workers)
        self.root = root
        self.download = download

    @property
    def _name(self) -> str:
        """What the set is called."""
        name: str = self.source.__name__
        return name

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the files are."""

    @abstractmethod
    def _missing(self) -> list[str]:
        """The names of the files that are needed and not there."""

    @abstractmethod
    def _by_hand(self) -> str:
        """How to get the missing files without this program."""

    def prepare_data(self) -> None:
        """Find the files, or fetch them if ``download`` is set.

        Raises:
            FileNotFoundError: files are missing; the message says which, and how to get them.
            DataError: the download failed; the message says why, and how to get the files by hand.
        """
        if self.download and self._missing():
            try:
                self.source(self.root, download=True)
            except (RuntimeError, OSError) as error:
                raise DataError(f"{self._name} could not be downloaded: {error}\n{self._by_hand()}") from error
        self._require_files()

    def _require_files(self) -> None:
        """Raise FileNotFoundError, with advice, if a file is missing."""
        if missing := self._missing():
            raise FileNotFoundError(
                f"{self._name} was not found: there is no {', '.join(missing)} in {self.folder}. "
                f"To fetch it, add --data.download true (in a script: {type(self).__name__}(download=True)).\n"
                f"{self._by_hand()}"
            )

"""Image files, read whole or refused by name."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from .idx import corrupt


def read_image(path: str, mode: str | None = None) -> Image.Image:
    """The image in this file.

    Args:
        path: the file.
        mode: Pillow's name for the kind of pixels wanted, such as ``"RGB"``; by default those of the file.

    Raises:
        DataError: the file is not an image, or is damaged; the message names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode) if mode else image.copy()
    except (OSError, SyntaxError, ValueError) as error:  # of some damaged PNG and PPM files
        raise corrupt(Path(path), f"it does not open as an image: {error}") from error


def read_rgb(path: str) -> Image.Image:
    """:func:`read_image`, in RGB."""
    return read_image(path, "RGB")

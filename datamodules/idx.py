"""The IDX format, in which MNIST and its relatives are published.

The bytes 0, 0, 8 (whole numbers from 0 to 255) and the number of dimensions; each dimension as a big-endian 32-bit
integer; then the entries, last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class DataError(ValueError):
    """A data set on disk is damaged, or could not be fetched; the message names the file and the remedy."""


def read_idx(path: Path, item_shape: tuple[int, ...]) -> Tensor:
    """The entries of an IDX file of bytes, gzipped if its name ends in ``.gz``: uint8 ``(N, *item_shape)``.

    Args:
        path: the file.
        item_shape: the shape of one item: ``(28, 28)`` for the images, ``()`` for the labels.

    Raises:
        DataError: the file is not that; the message names the file and says what is wrong with it.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise corrupt(path, f"it does not unpack: {error}") from error
    ndim = 1 + len(item_shape)
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes((0, 0, 8, ndim)):
        raise corrupt(path, f"it does not begin like an IDX file of bytes in {ndim} dimensions")
    N, *shape = (int(size) for size in np.frombuffer(content, ">u4", ndim, offset=4))
    if tuple(shape) != item_shape:
        raise corrupt(path, f"its items are of shape {tuple(shape)}; expected: {item_shape}")
    if len(content) != start + N * math.prod(item_shape):
        raise corrupt(path, f"it announces {N} items of shape {item_shape} but holds {len(content) - start} bytes")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(N, *item_shape)


def corrupt(path: Path, what: str) -> DataError:
    """The error to raise for a broken file."""
    return DataError(f"{path} is corrupt: {what}. Delete it and fetch it again")

"""What the tests of the data share: loaders with and without worker processes, and one pass through a loader."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

# A machine with one core, or one that gives this process one, is warned of two workers; two is what the test is about.
# From Python 3.12 a fork of a process with threads is warned of; torch's workers have always been such forks.
two_workers = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
workers = pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=two_workers)])


def everything(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All images and labels of one pass, in its order."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)

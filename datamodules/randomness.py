"""Random numbers that follow from what they are for, and not from what was drawn before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """A seed, from 0 to below 2**63: always the same for the same key, and another one for another key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


@contextmanager
def random_numbers_of(seed: int) -> Iterator[None]:
    """Within this context torch on the CPU, ``random`` and numpy draw from this seed; after it, from where they were.

    Generators of other devices are left alone: a worker process must not touch them.
    """
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - what a user's dataset may draw from
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002

"""What the tests of the data share: no worker process outlives its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader


@pytest.fixture(autouse=True)
def no_worker_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the workers of each loader. Left to the garbage collector, they are waited for, up to 5 s each."""
    started = []
    get_iterator = DataLoader._get_iterator

    def recorded(loader):
        started.append(get_iterator(loader))
        return started[-1]

    monkeypatch.setattr(DataLoader, "_get_iterator", recorded)
    yield
    for iterator in started:
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

"""A short run of the benchmark of loading, and the page that it writes."""

from __future__ import annotations

from benchmarks import loading
from benchmarks.loading import FILE, FILE_AND_TORCHVISION, ZOO, Plan


def test_a_weight_beside_its_file() -> None:
    said: list[str] = []
    data = loading.run(Plan(names=("tanh_deq.digits",), rounds=1), said.append)
    assert len(said) == 1
    (name, item) = next(iter(data["loading"].items()))
    assert name == "tanh_deq.digits"
    assert set(item["seconds"]) == {ZOO, FILE}, "torchvision is not imported"
    assert item["ratio"] == {FILE: item["seconds"][ZOO] / item["seconds"][FILE]}
    assert 0.5 < item["ratio"][FILE] < 2
    assert "| `tanh_deq.digits` |" in loading.markdown(data)


def test_the_page() -> None:
    machine = {"date": "2026-11-23", "cpu": "none", "threads": 1, "python": "3.11", "torch": "2.15", "torchdeq": None}
    seconds, ratio = {ZOO: 3.0, FILE: 2.0, FILE_AND_TORCHVISION: 4.0}, {FILE: 1.5, FILE_AND_TORCHVISION: 0.75}
    page = loading.markdown(
        {"machine": machine, "loading": {"a.b": {"bytes": 2048, "seconds": seconds, "ratio": ratio}}}
    )
    assert "| `a.b` | 2 | 3.00 | 2.00 | 1.50 | 0.75 |" in page

"""A short run of the benchmark of scaling, in processes of their own, and the page that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from tests.command_line import ROOT


def test_a_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "--quick", "--only", "tanh_deq", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=300)
    data = json.loads((tmp_path / "scaling.json").read_text())
    assert (tmp_path / "scaling.md").read_text() in done.stdout
    found = data["scaling"]["tanh_deq"]
    assert {kind: [item["batch"] for item in found[kind].values()] for kind in found} == {
        "weak": [8, 8],
        "strong": [16, 8],
    }
    for kind in found.values():
        assert list(kind) == ["1", "2"]
        assert kind["1"]["efficiency"] == 1
        assert all(item["seconds"] > 0 and item["samples"] > 0 and item["evaluations"] > 0 for item in kind.values())
        assert kind["2"]["communication"] < 1


def item(batch: int, seconds: float, without: float = 1.0) -> dict[str, float]:
    return {"batch": batch, "seconds": seconds, "without": without, "evaluations": 12}


def test_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two turns, of which the ratios are taken one by one."""
    of_runs = {
        (1, 8): [item(8, 1.0), item(8, 2.0)],
        (1, 16): [item(16, 2.0), item(16, 4.0)],
        (2, 8): [item(8, 2.0, 0.75), item(8, 4.0, 0.75)],
    }
    monkeypatch.setattr(scaling, "_torchrun", lambda plan, count, work: [of_runs[count, n].pop(0) for _, n in work])
    of_runs[2, 8] = [run for run in of_runs[2, 8] for _ in (1, 2)]
    plan = scaling.Plan(names=("tanh_deq",), column=1, rounds=1, turns=2)
    found = scaling.scaling(plan, lambda text: None)["tanh_deq"]
    weak, strong = found["weak"]["2"], found["strong"]["2"]
    assert (weak["efficiency"], strong["efficiency"]) == (0.5, 0.5)
    assert (weak["communication"], found["weak"]["1"]["communication"]) == (0.25, 0.0)
    assert (weak["samples"], weak["evaluations"]) == (16 / 3, (6 + 3) / 2)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="there are that many")
def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(SystemExit, match="takes one GPU a process, and there are"):
        scaling.main(["--quick", "--device", "cuda", "--processes", "1", "8"])

"""What solves cost beside f, and how often the host would wait: a short measurement, and the page of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import solver_costs, solvers
from benchmarks.solver_costs import Plan, waits


def test_waits_are_counted_in_the_backward_pass_too() -> None:
    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
            return g * 2 * float(g.sum().item() > -1)

    x = torch.ones(3, requires_grad=True)
    with waits("cpu") as count:
        y = Look.apply(x)
        assert bool((y > 1).all())
        assert y.tolist() == [2, 2, 2]
        assert count() == 2
        y.sum().backward()
        assert count() == 3
    y.tolist()
    assert count() == 3


def test_a_model_on_a_cpu() -> None:
    item = solver_costs.costs(Plan("cpu", column=1, names=("tanh_deq",), rounds=1))["tanh_deq"]["anderson"]
    looks = item["evaluations"] // 2 + 1  # each second evaluation, and the first one
    assert looks <= item["waits forward"] <= 2 * looks
    assert 0 < item["waits backward"] <= item["products"] + 2
    assert item["ratio"] > 1


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_costs, "Plan", lambda device, column: Plan(device, column, ("tanh_deq",), 1))
    solvers.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    page = (tmp_path / "solver_costs_cpu.md").read_text()
    assert "| `tanh_deq` | broyden |" in page
    assert json.loads((tmp_path / "solver_costs_cpu.json").read_text())["device"] == "cpu"

"""A tiny run of the whole benchmark, and TorchDEQ behind the same interface. Skipped where TorchDEQ is missing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its docstrings hold escapes that Python warns of
    pytest.importorskip("torchdeq")

from benchmarks import contestants as c
from benchmarks import solvers
from benchmarks.counts import backward_count, forward_count
from benchmarks.end_to_end import Setting, exact_gradient, relative_error
from benchmarks.measurements import MEASUREMENTS, QUICK, Plan
from benchmarks.problems import SOLVED, Problem, TanhCell

TINY = Plan(
    solved=("tanh",),
    tolerances=(1e-3,),
    adjoint_tolerances=(1e-3,),
    scales=(1.0, 100.0),
    traced=("tanh",),
    overhead=(("tanh 100", torch.float64),),
    overhead_steps=5,
    gradients=("tanh",),
    errors=(1e-2,),
    peers=(c.T_ANDERSON,),
    memory_steps=(4, 8),
    mixed_tolerances=(1e-2,),
    compact_shape=(16, 20),
    rounds=1,
    seconds=0.0,
)


def easy() -> Problem:
    g = torch.Generator().manual_seed(0)
    W = 0.2 * torch.randn(6, 6, dtype=torch.float64, generator=g)
    x, R = torch.randn(2, 3, 6, dtype=torch.float64, generator=g)
    return Problem("easy", TanhCell(W), torch.zeros_like(x), (x,), lambda z: (R * z).sum(), max_steps=60)


@pytest.mark.parametrize("solver", [*c.ZOO_FORWARD, *c.TORCHDEQ], ids=lambda s: s.name)
def test_every_contestant_solves(solver: c.Contestant) -> None:
    assert forward_count(solver, easy(), 1e-6).reached


@pytest.mark.parametrize("adjoint", [*c.ZOO_ADJOINT, *c.TORCHDEQ], ids=lambda s: s.name)
def test_every_contestant_differentiates(adjoint: c.Contestant) -> None:
    problem = easy()
    exact = exact_gradient(problem, problem.solution())
    forward = c.ANDERSON if isinstance(adjoint, c.Zoo) else c.T_ITERATION
    assert Setting(forward, adjoint, 1e-8, 1e-8).measured(problem, exact, max_steps=60).error < 1e-6


def test_steps_are_bounded_forward_and_backward() -> None:
    problem = easy()
    for forward, adjoint in ((c.ITERATION, c.ITERATION), (c.T_BLIND, c.T_ITERATION)):
        few, many = (
            Setting(forward, adjoint, 0.0, 0.0, evaluations=evaluations, products=products).run(problem)
            for evaluations, products in ((40, 1), (40, 40))
        )
        assert relative_error(few, many) > 1e-2


def test_the_options_of_torchdeq_take_effect() -> None:
    """The counts of torchdeq 0.1.0 on this problem: the absolute ridge of its Anderson is what makes it slow."""
    problem = SOLVED["tanh"]()
    iteration, anderson, small_ridge, broyden = (forward_count(s, problem, 1e-5).number for s in c.TORCHDEQ)
    assert (iteration, broyden) == (pytest.approx(189, abs=3), pytest.approx(46, abs=3))
    assert anderson > 2 * small_ridge
    z = problem.solution()
    absolute = [c.TorchDEQ(s.name, s.solver, s.options, "abs") for s in c.TORCHDEQ]
    _, anderson, small_ridge, _ = (backward_count(c.T_ITERATION, s, problem, z, 1e-5).number for s in absolute)
    assert anderson > 2 * small_ridge


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(solvers, "QUICK", TINY)
    solvers.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert text in capsys.readouterr().out
    data = json.loads((tmp_path / "solvers.json").read_text())
    assert list(data)[2:] == list(MEASUREMENTS)
    assert data["machine"]["threads"] == 1
    assert (tmp_path / "solvers.png").read_bytes().startswith(b"\x89PNG")

    counts = data["forward"]["counts"]["tanh"]
    assert counts["zoo anderson"][0] == pytest.approx(
        {"number": 34, "residual": 1e-3, "tol": 1e-3, "reached": True}, abs=6
    )
    assert f"| torchdeq broyden | {counts['torchdeq broyden'][0]['number']} |" in text
    overhead = data["overhead"]["tanh 100, float64"]
    assert overhead["evaluations"]["zoo anderson"] == 6
    assert all(ratio > 0.3 for ratio in overhead["ratios"].values())
    (passes,) = data["gradient"].values()
    assert passes["zoo anderson / anderson"]["ratio"] == 1
    assert all(item["error"] <= 1e-2 for item in passes.values())
    states = data["memory"]["states"]
    assert states["zoo iteration"][0] == states["zoo iteration"][1], "memory does not grow with the steps"
    assert states["torchdeq broyden"][0] + 8 <= states["torchdeq broyden"][1]
    (rows,) = data["mixed"].values()
    assert rows["zoo anderson"]["per_sample"] < rows["zoo anderson"]["whole_batch"]
    (times,) = data["compaction"].values()
    assert times["zoo anderson, compact"]["ratio"] == 1


def test_a_part_of_it_is_printed_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(solvers.RESULTS.iterdir()) if solvers.RESULTS.is_dir() else []
    monkeypatch.setattr(solvers, "QUICK", TINY)
    solvers.main(["--quick", "--only", "problems"])
    printed = capsys.readouterr().out
    assert "| tanh | 16 x 100 | 0.774 to 0.950 |" in printed
    assert "## Forward" not in printed
    assert (sorted(solvers.RESULTS.iterdir()) if solvers.RESULTS.is_dir() else []) == before


def test_a_typo_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        solvers.main(["--only", "foward"])
    assert "forward" in capsys.readouterr().err


def test_the_plans_name_problems_that_exist() -> None:
    for plan in (Plan(), QUICK):
        assert {*plan.solved, *plan.traced, *plan.gradients} <= set(SOLVED)

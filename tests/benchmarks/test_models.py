"""The benchmark of a training step, on a small MDEQ: both libraries solve the same. Skipped without TorchDEQ."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its docstrings hold escapes that Python warns of
    pytest.importorskip("torchdeq")

from benchmarks import contestants as c
from benchmarks import models
from benchmarks import training_steps as t
from benchmarks.end_to_end import relative_error
from benchmarks.train_mdeq import SMALL, TrainingStep, digits, trained
from benchmarks.training_steps import Setting

ZOO = Setting(c.BROYDEN, c.BROYDEN, 1e-5, 1e-5)
TORCHDEQ = Setting(c.T_BROYDEN, c.T_BROYDEN, 1e-5, 1e-5)


@pytest.fixture(scope="module")
def step() -> TrainingStep:
    torch.set_num_threads(1)
    return trained(SMALL).step


def test_training_gives_it_an_equilibrium(step: TrainingStep) -> None:
    assert float(step.spectral_radii().max()) < 0.9


def test_training_is_the_same_each_time(step: TrainingStep) -> None:
    short = replace(SMALL, steps=2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = trained(short)
    second = trained(short)
    assert (first.loss, first.penalty) == (second.loss, second.penalty)
    torch.testing.assert_close(first.step.model.state_dict(), second.step.model.state_dict(), rtol=0, atol=0)


def test_the_batch_is_held_out() -> None:
    images, labels = digits(8)
    assert images.shape == (1797, 3, 8, 8)
    assert labels.bincount(minlength=10).min() > 100
    assert 0 <= float(images.min()) < float(images.max()) <= 1


@pytest.mark.parametrize("setting", [ZOO, TORCHDEQ], ids=lambda s: s.name)
def test_both_solve_the_same_equation(setting: Setting, step: TrainingStep) -> None:
    z_star, _ = step.reference
    for found, exact in zip(setting.equilibrium(step), z_star, strict=True):
        assert float((found - exact).norm() / exact.norm()) < 1e-4


def test_the_reference_is_an_equilibrium(step: TrainingStep) -> None:
    z_star, _ = step.reference
    double = step.double()
    with torch.no_grad():
        fz = double.cell(z_star, double.injection())
    assert max(float((a - b).norm() / a.norm()) for a, b in zip(fz, z_star, strict=True)) < 1e-8


@pytest.mark.parametrize(("forward", "adjoint"), t.PAIRS, ids=lambda s: s.name)
def test_gradients_agree(forward: c.Contestant, adjoint: c.Contestant, step: TrainingStep) -> None:
    """But for TorchDEQ's Anderson as an adjoint, whose absolute ridge is in the way."""
    found = Setting(forward, adjoint, 1e-5, 1e-5).measured(step)
    assert found.error < (0.05 if adjoint is c.T_ANDERSON else 5e-3)
    again = relative_error([g.double() for g in found.run(step)], step.reference[1])
    assert again == pytest.approx(found.error, rel=0.1), "no more steps are needed than were counted"


def test_weights_are_computed_once_a_step(step: TrainingStep) -> None:
    copied = replace(step, model=copy.deepcopy(step.model))
    layers = [m for m in copied.cell.modules() if parametrize.is_parametrized(m)]
    assert len(layers) == 9
    calls = []
    for m in layers:
        m.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    for setting in (ZOO, TORCHDEQ):
        calls.clear()
        setting.run(copied)
        assert len(calls) == len(layers)


def test_counts(step: TrainingStep) -> None:
    zoo, theirs = ZOO.measured(step), TORCHDEQ.measured(step)
    assert 5 < zoo.evaluations <= theirs.evaluations < 40
    assert 5 < zoo.products < theirs.products + 3 < 40


def test_a_pair_of_two_libraries_is_refused(step: TrainingStep) -> None:
    with pytest.raises(TypeError, match="a pair is of one library; given: zoo broyden, torchdeq broyden"):
        Setting(c.BROYDEN, c.T_BROYDEN, 1e-3, 1e-3).run(step)


def test_the_loosest_tolerance_is_found() -> None:
    assert t.loosest(lambda tol: 10 * tol, 10 * 0.5**9) == 0.5**9
    assert t.loosest(lambda _: 0.0, 0.1) == t.TOLERANCES[0]
    assert t.loosest(lambda tol: 10 * tol, 10 * t.TOLERANCES[-1]) == t.TOLERANCES[-1]
    assert t.loosest(lambda _: math.nan, 0.1) is None


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "models.md").read_text()
    assert text in capsys.readouterr().out
    data = json.loads((tmp_path / "models.json").read_text())
    assert list(data)[1:] == list(models.MEASUREMENTS)
    found = data["steps"]
    assert found["default"] == found["fastest"] == "zoo broyden / broyden"
    assert {"zoo broyden / broyden", "torchdeq broyden / broyden"} <= set(found["pairs"])
    assert found["pairs"]["zoo broyden / broyden"]["ratio"] == 1
    for item in found["pairs"].values():
        assert item["error"] <= found["level"]
        assert all(math.isfinite(value) and value > 0 for value in item.values())
    assert all(seconds > 0 for seconds in data["costs"].values())
    assert 0 < data["memory"]["share"]["implicit"] < 1 / 3
    assert data["memory"]["share"]["implicit, recompute"] <= data["memory"]["share"]["implicit"]
    assert 0.3 < data["model"]["radius"][0] <= data["model"]["radius"][1] < 0.9


def test_a_part_of_it_is_printed_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(models.RESULTS.iterdir())
    monkeypatch.setattr(models, "QUICK", replace(models.QUICK, recipe=replace(SMALL, steps=1)))
    models.main(["--quick", "--only", "memory"])
    printed = capsys.readouterr().out
    assert "## Peak memory of a step" in printed
    assert "## One step" not in printed
    assert sorted(models.RESULTS.iterdir()) == before

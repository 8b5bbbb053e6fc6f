"""The benchmark of the DEQ transformer, on a small one: both cells and both libraries do the same.

Skipped where TorchDEQ is missing.
"""

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
    pytest.importorskip("torchdeq", reason="the benchmark compares with it: pip install -r requirements-benchmarks.txt")

from benchmarks import contestants as c
from benchmarks import transformer
from benchmarks.end_to_end import relative_error
from benchmarks.spelled_out import SpelledOutCell, SpelledOutStep
from benchmarks.train_transformer import SMALL, LanguageStep, Loaded, loaded
from benchmarks.training_steps import Setting, compared, comparison
from zoo.implicit import FixedPointIteration
from zoo.transformer import BLOCKS, DEQTransformer, Memory

ZOO = Setting(c.ANDERSON, c.ANDERSON, 1e-5, 1e-5)
TORCHDEQ = Setting(c.T_BROYDEN, c.T_BROYDEN, 1e-5, 1e-5)


@pytest.fixture(scope="module")
def found() -> Loaded:
    torch.set_num_threads(1)
    return loaded(SMALL)


@pytest.fixture(scope="module")
def step(found: Loaded) -> LanguageStep:
    return found.step


@pytest.fixture(scope="module")
def spelled_out(step: LanguageStep) -> SpelledOutStep:
    return SpelledOutStep(step.model, step.tokens, step.target, step.memory)


def test_it_is_real_text_after_a_memory(found: Loaded, step: LanguageStep) -> None:
    assert step.tokens.shape == step.target.shape == (4, 16)
    assert step.memory.z.shape == (4, 16, 32)
    assert step.tokens[:, 1:].equal(step.target[:, :-1])
    p = found.text.bincount(minlength=256) / len(found.text)
    with torch.no_grad():
        assert step.loss(step.solution) < torch.special.entr(p).sum(), "better than the frequencies of bytes"


def test_training_is_the_same_each_time() -> None:
    short = replace(SMALL, steps=2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = loaded(short)
    torch.testing.assert_close(first.step.model.state_dict(), loaded(short).step.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("setting", [ZOO, TORCHDEQ], ids=lambda s: s.name)
@pytest.mark.parametrize("which", ["step", "spelled_out"])
def test_both_solve_the_same_equation(setting: Setting, which: str, request: pytest.FixtureRequest) -> None:
    step = request.getfixturevalue(which)
    z_star, gradient = request.getfixturevalue("step").reference
    assert float((setting.equilibrium(step) - z_star).norm() / z_star.norm()) < 1e-4
    assert relative_error([g.double() for g in setting.run(step)], gradient) < 5e-3


def test_the_step_is_that_of_the_model(step: LanguageStep) -> None:
    """As the model's own forward pass computes it, whatever the benchmark takes apart."""
    model = copy.deepcopy(step.model)
    model.deq.solver = replace(model.deq.solver, tol=1e-6, max_steps=60)
    model.deq.gradient = replace(model.deq.gradient, solver=replace(model.deq.solver, compact=False))
    loss = model.nll(model(step.tokens, step.memory)[0], step.target).mean()
    gradient = torch.autograd.grad(loss, tuple(model.parameters()))
    assert relative_error([g.double() for g in gradient], step.reference.gradient) < 1e-3


@pytest.mark.parametrize("norm", BLOCKS)
@pytest.mark.parametrize("layers", [1, 2])
def test_both_cells_are_the_same_function(norm: str, layers: int) -> None:
    torch.manual_seed(0)
    model = DEQTransformer(20, 8, 2, d_inner=12, layers=layers, norm=norm, attention_span=9, unrolled=12).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    with torch.no_grad():
        u, u_before, z, z_before = (torch.randn(3, n, d).double() for n, d in ((5, 24), (7, 24), (5, 8), (7, 8)))
    z.requires_grad_()
    ours = model.cell(z, u, model.cell.past(Memory(z_before, u_before), 5))
    theirs = SpelledOutCell(model.cell)(z, u, z_before, u_before)
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)
    weights = (z, *model.cell.parameters())
    for a, b in zip(*(torch.autograd.grad(fz.square().sum(), weights) for fz in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)


def test_weights_are_computed_once_a_step(step: LanguageStep, spelled_out: SpelledOutStep) -> None:
    calls: list[int] = []
    for each, setting in ((step, ZOO), (step, TORCHDEQ), (spelled_out, TORCHDEQ)):
        copied = replace(each, model=copy.deepcopy(each.model))
        layers = [m for m in copied.cell.modules() if parametrize.is_parametrized(m)]
        assert len(layers) == 5
        before = len(calls)
        for m in layers:
            m.parametrizations.weight.register_forward_hook(lambda *_: calls.append(1))
        setting.run(copied)
        assert len(calls) - before == len(layers)


def test_a_level_that_no_one_reaches_is_an_error(step: LanguageStep) -> None:
    with pytest.raises(RuntimeError, match="no pair of the zoo's solvers reaches an error of 1e-12"):
        compared(step, 1e-12, [(c.ANDERSON, c.ANDERSON)], rounds=1)


def test_who_does_not_get_there_is_named(step: LanguageStep) -> None:
    slow = c.Zoo("zoo slow", FixedPointIteration(damping=1e-3))
    found = compared(step, 3e-2, [(c.ANDERSON, c.ANDERSON), (slow, c.ANDERSON)], rounds=1)
    assert list(found["pairs"]) == ["zoo anderson / anderson"]
    assert found["not_reached"] == ["zoo slow / anderson"]
    assert "whatever the tolerances: zoo slow / anderson. " in comparison(found, "all")


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformer.main(["--quick", "--out", str(tmp_path)])
    text = (tmp_path / "transformer.md").read_text()
    assert text in capsys.readouterr().out
    data = json.loads((tmp_path / "transformer.json").read_text())
    assert list(data)[1:] == list(transformer.MEASUREMENTS)
    pairs = data["steps"]["pairs"]
    assert list(pairs) == [
        "zoo anderson / anderson",
        "torchdeq broyden / broyden",
        "torchdeq broyden / broyden, cell as its zoo writes it",
    ]
    assert pairs["zoo anderson / anderson"]["ratio"] == 1
    for item in pairs.values():
        assert item["error"] <= data["steps"]["level"]
        assert all(math.isfinite(value) and value > 0 for value in item.values())
    assert all(seconds > 0 for cell in data["costs"].values() for seconds in cell.values())
    (ways,) = data["attention"].values()
    assert all(0 < item["difference"] < 1e-5 and item["seconds"] > 0 for item in ways.values())
    written = data["generation"]["ways"]
    assert all(item["same"] == data["generation"]["prompts"] for item in written.values())
    assert written["warm"]["evaluations"] < written["cold"]["evaluations"] / 2
    ratios = data["memory"]["ratio"]
    assert 1 < ratios["unrolled 12 times"] < ratios["unrolled 24 times"] < 24
    assert ratios["implicit, recompute"] <= 1
    assert 0 < data["model"]["radius"][0] <= data["model"]["radius"][1] < 0.9

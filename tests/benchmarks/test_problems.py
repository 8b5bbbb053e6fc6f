"""The benchmark's problems are what their names and docstrings say."""

from __future__ import annotations

import pytest
import torch

from benchmarks import problems as p
from benchmarks.counts import relative_residuals


@pytest.mark.parametrize("recipe", [p.TANH, p.SYMMETRIC, p.GINIBRE, p.OUTLIERS], ids=lambda r: r.name)
def test_the_gain_gives_the_worst_sample_its_radius(recipe: p.TanhRecipe) -> None:
    radii = p.spectral_radii(recipe.problem())
    assert float(radii.max()) == pytest.approx(recipe.radius, abs=1e-3)
    assert float(radii.min()) > recipe.radius - 0.2


def test_the_gain_is_found_by_the_function_that_found_it() -> None:
    assert p.calibrated_gain(p.TANH) == pytest.approx(p.TANH.gain, abs=1e-4)


@pytest.mark.parametrize("name", ["linear", "orthogonal"])
def test_linear_problems_have_one_radius(name: str) -> None:
    torch.testing.assert_close(p.spectral_radii(p.SOLVED[name]()), torch.full((16,), 0.95, dtype=torch.float64))


def test_orthogonal_is_orthogonal() -> None:
    Q = p.orthogonal(20, p.generator(0))
    torch.testing.assert_close(Q @ Q.mT, torch.eye(20, dtype=torch.float64))


def test_outliers() -> None:
    eigenvalues = torch.linalg.eigvalsh(p.outliers(200, p.generator(0)))
    assert float(eigenvalues.abs().sort().values[189]) < 0.4
    torch.testing.assert_close(eigenvalues[-10:], torch.linspace(0.5, 1, 10, dtype=torch.float64))


def test_arnoldi_finds_the_dense_radius() -> None:
    problem = p.TANH.problem()
    hidden = problem.scaled(1.0)
    assert hidden.jacobians(problem.z0) is None
    torch.testing.assert_close(p.spectral_radii(hidden), p.spectral_radii(problem), rtol=0.02, atol=0)
    torch.testing.assert_close(p.spectral_radii(hidden, vectors=100), p.spectral_radii(problem), rtol=1e-8, atol=0)


def test_the_trained_model_is_contractive_and_classifies() -> None:
    problem = p.conv()
    assert problem.z0[0].numel() == 4608
    radii = p.spectral_radii(problem, vectors=30)
    assert float(radii.min()) == pytest.approx(0.707, abs=0.01)
    assert float(radii.max()) == pytest.approx(0.877, abs=0.01)
    model, _, labels = p.conv_model()
    assert int((model.classify(problem.solution()).argmax(dim=1) == labels).sum()) >= 14
    assert sum(parameter.numel() for parameter in model.parameters()) < 25_000


def test_the_mixed_batch_spreads() -> None:
    radii = p.spectral_radii(p.mixed()).sort().values
    assert float(radii[0]) == pytest.approx(0.2, abs=0.01)
    assert float(radii[-1]) == pytest.approx(0.98, abs=0.01)
    assert float(radii.diff().max()) < 0.1


def test_few_are_hard() -> None:
    radii = p.spectral_radii(p.few_hard(batch=50, size=60))
    assert int((radii > 0.8).sum()) == 3
    assert int((radii < 0.6).sum()) == 47


@pytest.mark.parametrize("s", [1e-3, 1e3])
def test_other_units(s: float) -> None:
    problem = p.TANH.problem()
    scaled = problem.scaled(s)
    torch.testing.assert_close(scaled.solution(), s * problem.solution(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", p.SOLVED)
def test_problems_are_the_same_each_time(name: str) -> None:
    a, b = p.SOLVED[name](), p.SOLVED[name]()
    z = a.solution()
    assert float(relative_residuals(b, z).max()) < 1e-12
    assert a.loss(z).equal(b.loss(z))
    assert z.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["tanh 100", "conv 32x32"])
def test_overhead_problems_keep_their_dtype(name: str, dtype: torch.dtype) -> None:
    problem = p.OVERHEAD[name](dtype)
    with torch.no_grad():
        assert problem.f(problem.z0, *problem.inputs).dtype == dtype


def test_a_map_that_does_not_converge_says_so() -> None:
    cell = p.LinearCell(-torch.eye(2, dtype=torch.float64))
    x = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="does not converge on flip"):
        p.Problem("flip", cell, torch.zeros_like(x), (x,), torch.sum).solution()

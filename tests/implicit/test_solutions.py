"""The solution itself: closed forms, the tutorial's facts, and what an independent implementation computed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.problems import METHODS, PROBLEMS, SOLVERS, flat, generator, tight
from zoo.implicit import Anderson, FixedPointIteration, ImplicitGradient, Newton, Solver, fixed_point
from zoo.tanh import TanhCell

PARITY = Path(os.environ.get("DEQ_ZOO_PARITY", Path(__file__).parents[3] / "shared" / "parity"))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_finds_the_solution(solver: str, problem: str) -> None:
    p = PROBLEMS[problem]()
    z, report = fixed_point(p.cell, p.z0, *p.inputs, solver=tight(SOLVERS[solver]))
    assert bool(report.converged.all())
    torch.testing.assert_close(flat(z).detach(), p.solution(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_linear_solution_is_that_of_a_dense_solve(solver: str) -> None:
    p = PROBLEMS["linear"]()
    z, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=tight(SOLVERS[solver]))
    A, x = p.cell.A.detach(), p.inputs[0].detach()
    expected = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - A, x.mT).mT
    torch.testing.assert_close(z.detach(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_a_dense_solve(method: str, problem: str) -> None:
    """Implicit ones to 1e-10; iterations that are recorded (phantom, unrolled) approach them to 1e-8."""
    p = PROBLEMS[problem]()
    solver, gradient = METHODS[method]
    R = p.weights()
    z, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=solver, gradient=gradient)
    found = torch.autograd.grad((R * flat(z)).sum(), p.leaves)
    atol = 1e-10 if isinstance(gradient, ImplicitGradient) else 1e-8
    for ours, dense in zip(found, p.dense_gradients(R), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=atol)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_default_tolerance_gives_three_digits(solver: str) -> None:
    p = PROBLEMS["tanh"]()
    R = p.weights()
    z, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=SOLVERS[solver], gradient=ImplicitGradient(SOLVERS[solver]))
    assert (z - p.solution()).norm() < 1e-3 * p.solution().norm()
    found = torch.autograd.grad((R * z).sum(), p.leaves)
    for ours, dense in zip(found, p.dense_gradients(R), strict=True):
        assert (ours - dense).norm() < 1e-3 * dense.norm()


# ------------------------------------------------------------------------------- the tutorial's numbers (chapter 1)


def tutorial(seed: int) -> tuple[nn.Linear, Tensor]:
    """N = 50, a batch of 10, torch's default initialisation of the linear map."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(50, 50, bias=False), torch.randn(10, 50)


def solve_tutorial(seed: int, solver: Solver, start: Callable[[Tensor], Tensor]) -> tuple[Tensor, int, Tensor]:
    """z*, steps of the slowest sample, and z* in float64."""
    linear, x = tutorial(seed)
    cell = TanhCell(50)
    cell.linear = linear
    with torch.no_grad():
        z, report = fixed_point(cell, start(x), x, solver=solver)
        W, x, exact = linear.weight.double(), x.double(), torch.zeros_like(x, dtype=torch.float64)
        for _ in range(300):
            exact = torch.tanh(exact @ W.mT + x)
    assert bool(report.converged.all())
    return z, int(report.steps.max()), exact


@pytest.mark.parametrize("seed", range(5))
def test_tutorial_plain_iteration_takes_about_fifteen_evaluations(seed: int) -> None:
    _, steps, _ = solve_tutorial(seed, FixedPointIteration(tol=1e-4, norm="absolute"), torch.zeros_like)
    assert 12 <= steps + 1 <= 18


@pytest.mark.parametrize("seed", range(5))
def test_tutorial_newton_takes_three_or_four_steps(seed: int) -> None:
    """For an error below 1e-5 the tolerance must be below it: each sample stops as soon as it may."""
    _, steps, _ = solve_tutorial(seed, Newton(tol=1e-4, norm="absolute"), torch.zeros_like)
    assert steps in {3, 4}
    z, steps, exact = solve_tutorial(seed, Newton(tol=5e-6, norm="absolute"), torch.zeros_like)
    assert steps in {3, 4}
    assert (z - exact).norm(dim=1).max() < 1e-5


# ----------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("solver", [Anderson(), Newton(), FixedPointIteration()], ids=lambda s: type(s).__name__)
def test_parity_with_the_recorded_tanh_layer(solver: Solver) -> None:
    folder = PARITY / "tanh_layer_and_solvers"
    if not folder.is_dir():
        pytest.skip(f"no parity data in {folder}; set DEQ_ZOO_PARITY")
    assert json.loads((folder / "meta.json").read_text())["definition"] == (
        "z = tanh(z W^T + x U^T + b), start z = 0; float64"
    )
    data = load_file(folder / "tensors.safetensors")
    leaves = {name: data[name].double().requires_grad_() for name in ("W", "U", "b", "x")}

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ leaves["W"].mT + x @ leaves["U"].mT + leaves["b"])

    solver = tight(solver, tol=1e-12)
    z0 = torch.zeros_like(data["z_star"])
    z, _ = fixed_point(f, z0, leaves["x"], solver=solver, gradient=ImplicitGradient(solver))
    torch.testing.assert_close(z.detach(), data["z_star"], rtol=0, atol=1e-9)
    found = torch.autograd.grad((data["R"].double() * z).sum(), list(leaves.values()))
    for name, ours in zip(leaves, found, strict=True):
        assert (ours - data[f"grad.{name}"]).norm() < 1e-5 * data[f"grad.{name}"].norm()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_of_another_seed_gives_the_same_solution(solver: str) -> None:
    p = PROBLEMS["tanh"]()
    start = torch.randn(p.z0.shape, dtype=torch.float64, generator=generator(11))
    z, _ = fixed_point(p.cell, start, *p.inputs, solver=tight(SOLVERS[solver]))
    torch.testing.assert_close(z.detach(), p.solution(), rtol=0, atol=1e-11)

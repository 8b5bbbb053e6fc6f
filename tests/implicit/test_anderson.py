"""Anderson acceleration: invariances, its memory, and the degenerate cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import generator, residual, slow_symmetric, tanh_problem
from zoo.implicit import Anderson, FixedPointIteration, ImplicitGradient, SolverStatus, UnrolledGradient, fixed_point

VARIANTS = [
    Anderson(),
    Anderson(mix_every=1),
    Anderson(mix_every=5),
    Anderson(memory=4),
    Anderson(memory=1, mix_every=1),
    Anderson(damping=0.5),
    Anderson(memory=6, mix_every=3, damping=0.8, ridge=1e-4),
]
every_variant = pytest.mark.parametrize("solver", VARIANTS, ids=str)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def slow(dtype: torch.dtype = torch.float64, largest: float = 0.98) -> tuple[Any, Tensor, Tensor]:
    """f(z, x) = A z + x, A symmetric with eigenvalues up to ``largest``."""
    A = slow_symmetric(30, largest).to(dtype)
    x = torch.randn(4, 30, dtype=torch.float64, generator=generator(1)).to(dtype)
    return lambda z, x: z @ A + x, torch.zeros_like(x), x


def evaluations(f: Any, z0: Tensor, x: Tensor, solver: Any) -> int:
    z, report = fixed_point(f, z0, x, solver=replace(solver, max_steps=2000))
    assert bool((residual(f, z, x, norm=solver.norm) <= 1.01 * solver.tol).all())
    return report.evaluations


@every_variant
def test_every_variant_solves_a_slow_map(solver: Anderson) -> None:
    f, z0, x = slow(largest=0.9)
    assert evaluations(f, z0, x, replace(solver, tol=1e-8)) > 5


@both_dtypes
@pytest.mark.parametrize("solver", [Anderson(), Anderson(mix_every=1), Anderson(mix_every=5)], ids=str)
def test_fewer_evaluations_than_plain_iteration(solver: Anderson, dtype: torch.dtype) -> None:
    problem = slow(dtype)
    plain = evaluations(*problem, FixedPointIteration(tol=1e-4))
    assert evaluations(*problem, replace(solver, tol=1e-4)) < plain / 3


@both_dtypes
@every_variant
@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1e2, 1e3])
def test_the_scale_of_the_state_does_not_matter(solver: Anderson, scale: float, dtype: torch.dtype) -> None:
    """z -> scale f(z / scale) has its solution at scale z*, and takes as many evaluations."""
    p = tanh_problem()
    cell, x = p.cell.to(dtype), p.inputs[0].detach().to(dtype)
    solver = replace(solver, tol=1e-5)

    def solve(scale: float) -> tuple[Tensor, int]:
        with torch.no_grad():
            z, report = fixed_point(lambda z, x: scale * cell(z / scale, x), cell.initial_state(x), x, solver=solver)
        return z / scale, report.evaluations

    (z, count), (scaled_z, scaled_count) = solve(1.0), solve(scale)
    assert abs(count - scaled_count) <= 2
    torch.testing.assert_close(scaled_z, z, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("memory", "mix_every"), [(4, 2), (4, 1), (5, 5), (2, 2), (10, 2)])
@both_dtypes
def test_the_memory_wraps(memory: int, mix_every: int, dtype: torch.dtype) -> None:
    f, z0, x = slow(dtype)
    solver = Anderson(tol=1e-4, memory=memory, mix_every=mix_every)
    assert evaluations(f, z0, x, solver) > 2 * memory


def test_the_memory_is_used() -> None:
    problem = slow()
    counts = [evaluations(*problem, Anderson(tol=1e-8, memory=m, mix_every=1)) for m in (2, 5, 20)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] / 2


def test_a_linear_map_is_solved_in_as_many_mixes_as_it_has_dimensions() -> None:
    """Anderson with full memory is GMRES in disguise (Walker and Ni, 2011)."""
    A = slow_symmetric(4, 0.9)
    x = torch.randn(2, 4, dtype=torch.float64, generator=generator(1))
    solver = Anderson(tol=1e-6, memory=6, mix_every=1, ridge=1e-15)
    _, report = fixed_point(lambda z, x: z @ A + x, torch.zeros_like(x), x, solver=solver)
    assert report.evaluations <= 4 + 2


def test_a_memory_of_one_is_plain_iteration() -> None:
    problem = slow(largest=0.8)
    anderson = Anderson(tol=1e-8, memory=1, mix_every=1, damping=0.9)
    assert evaluations(*problem, anderson) == evaluations(
        *problem, FixedPointIteration(tol=1e-8, damping=0.9, check_every=1)
    )


def test_the_first_mix_by_hand() -> None:
    """Two evaluations: a minimises ||a r0 + (1 - a) r1||, so a = r1.(r1 - r0) / ||r1 - r0||^2; and beta damps."""
    A = slow_symmetric(5, 0.9)
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator(2))
    for damping in (1.0, 0.6):
        solver = Anderson(tol=0, max_steps=2, memory=2, mix_every=1, ridge=1e-15, damping=damping)
        iterates: list[Tensor] = []

        def f(z: Tensor, x: Tensor, iterates: list[Tensor] = iterates) -> Tensor:
            iterates.append(z)
            return z @ A + x

        with torch.no_grad():
            fixed_point(f, torch.zeros_like(x), x, solver=solver, on_failure="ignore")
        z0, z1, z2 = iterates
        r0, r1 = z0 @ A + x - z0, z1 @ A + x - z1
        a = ((r1 * (r1 - r0)).sum(1) / (r1 - r0).square().sum(1)).unsqueeze(1)
        torch.testing.assert_close(z1, z0 + damping * r0, rtol=0, atol=1e-12)
        torch.testing.assert_close(z2, a * (z0 + damping * r0) + (1 - a) * (z1 + damping * r1), rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------------------- degenerate cases


@every_variant
@both_dtypes
@pytest.mark.parametrize("start", ["zero", "solution", "elsewhere"])
@pytest.mark.parametrize(("solution", "norm"), [(0.0, "absolute"), (2.0, "absolute"), (2.0, "relative")])
def test_no_tolerance_at_all_gives_no_nan(
    solver: Anderson, dtype: torch.dtype, start: str, solution: float, norm: Any
) -> None:
    """Steps go on at the limit of the arithmetic, where all residuals are rounding, or zero."""
    value = {"zero": 0.0, "solution": solution, "elsewhere": 7.0}[start]
    z0 = torch.full((3, 4), value, dtype=dtype)
    z, report = fixed_point(
        lambda z: 0.5 * z + solution / 2,
        z0,
        solver=replace(solver, tol=0, max_steps=80, norm=norm),
        on_failure="ignore",
        trace=True,
    )
    assert z.isfinite().all()
    assert report.residual.isfinite().all()
    assert report.trace is not None
    assert not report.trace.isinf().any()
    assert (z - solution).abs().max() <= 1e-4
    assert (report.status <= 1).all()


@pytest.mark.parametrize("solver", [*VARIANTS, Anderson(ridge=1e-30), Anderson(ridge=1e-30, mix_every=1)], ids=str)
@both_dtypes
def test_identical_residuals_in_the_memory(solver: Anderson, dtype: torch.dtype) -> None:
    """f(z) = z + 1 has no solution, and every residual is the same: the Gram matrix is singular, the ridge apart."""
    z, report = fixed_point(lambda z: z + 1, torch.zeros(2, 3, dtype=dtype), solver=solver, on_failure="ignore")
    assert z.isfinite().all()
    assert report.residual.isfinite().all()
    assert report.status.tolist() == [SolverStatus.MAX_STEPS] * 2


@every_variant
@pytest.mark.parametrize("max_steps", [0, 1, 2, 3])
def test_fewer_steps_than_a_mix_needs(solver: Anderson, max_steps: int) -> None:
    f, z0, x = slow(largest=0.5)
    z, report = fixed_point(f, z0, x, solver=replace(solver, max_steps=max_steps), on_failure="ignore")
    torch.testing.assert_close(report.residual, residual(f, z, x, norm="relative"))
    if max_steps:
        assert (report.residual < 1).all(), "better than the start, whose residual is 1"


def test_the_memory_of_one_solve_does_not_reach_the_next() -> None:
    f, z0, x = slow()
    solver = Anderson(max_steps=500)
    first, _ = fixed_point(f, z0, x, solver=solver)
    fixed_point(f, z0 + 1, 5 * x, solver=solver)
    second, _ = fixed_point(f, z0, x, solver=solver)
    assert torch.equal(first, second)


@pytest.mark.parametrize("gradient", [ImplicitGradient(Anderson(max_steps=500)), UnrolledGradient()], ids=str)
def test_float32_gradients_are_good_to_the_tolerance(gradient: Any) -> None:
    f, z0, x = slow(torch.float32, largest=0.9)
    x.requires_grad_()
    z, _ = fixed_point(f, z0, x, solver=Anderson(tol=1e-5, max_steps=500), gradient=gradient)
    (found,) = torch.autograd.grad(z.sum(), x)
    A = slow_symmetric(30, 0.9)
    expected = torch.linalg.solve(torch.eye(30, dtype=torch.float64) - A, torch.ones(30, dtype=torch.float64))
    assert (found.double() - expected).norm(dim=1).max() < 2e-3 * expected.norm()

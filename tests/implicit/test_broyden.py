"""Broyden's method and type-I Anderson, against the dense matrices that they never form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.problems import TANH, Problem, gaussian, linear, orthogonal
from tests.problems import contraction, generator, residual, slow_symmetric, tanh_problem
from zoo.implicit import Anderson, Broyden, FixedPointIteration, Solver, SolverStatus, UnrolledGradient, fixed_point

SLOW: dict[str, Callable[[], Problem]] = {
    "linear": lambda: linear(gaussian, "linear"),
    "orthogonal": lambda: linear(orthogonal, "orthogonal"),
    "tanh": TANH.problem,
}
SECANT: dict[str, Solver] = {"broyden": Broyden(), "anderson type I": Anderson(kind=1)}
thorough = settings(deadline=None, derandomize=True, database=None)
every_secant_method = pytest.mark.parametrize("solver", SECANT.values(), ids=SECANT)

Pair = tuple[Tensor, Tensor]  # s, y
Matrix = Callable[[Sequence[Pair]], Tensor]


def broyden_matrix(pairs: Sequence[Pair]) -> Tensor:
    """B = -I, then B <- B + (y - B s) s^T / s^T s for each pair."""
    B = -torch.eye(pairs[0][0].numel(), dtype=torch.float64)
    for s, y in pairs:
        B = B + torch.outer(y - B @ s, s) / (s @ s)
    return B


def type_one_matrix(pairs: Sequence[Pair]) -> Tensor:
    """The matrix nearest to -I (Frobenius) with B s = y for all pairs: -I + (Y + S) S^+, by least squares."""
    S, Y = (torch.stack(columns, dim=1) for columns in zip(*pairs, strict=True))
    return torch.matmul(Y + S, torch.linalg.pinv(S)) - torch.eye(S.shape[0], dtype=torch.float64)


def dense(
    f: Callable[[Tensor], Tensor], z: Tensor, matrix: Matrix, memory: int, steps: int, mix_every: int = 1
) -> list[Tensor]:
    """The iterates ``(N,)`` of z <- z - B^-1 r for one sample, with B of the last ``memory`` pairs."""
    pairs: list[Pair] = []
    iterates = [z]
    r = f(z) - z
    for k in range(steps):
        plain = not pairs or (k + 1) % mix_every
        new = z + r if plain else z - torch.linalg.solve(matrix(pairs), r)
        new_r = f(new) - new
        pairs = [*pairs, (new - z, new_r - r)][-memory:]
        z, r = new, new_r
        iterates.append(z)
    return iterates


def curved(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
    return torch.tanh(gain * (z @ contraction(8, 1.0).mT)) + x


def curved_batch(gains: Sequence[float] = (0.9, 1.4, 0.3)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(len(gains), 8, dtype=torch.float64, generator=generator(1))
    return torch.zeros_like(x), x, torch.tensor(gains, dtype=torch.float64).unsqueeze(1)


def iterates_of(solver: Solver, steps: int) -> list[Tensor]:
    seen: list[Tensor] = []

    def f(z: Tensor, *inputs: Tensor) -> Tensor:
        seen.append(z.clone())
        return curved(z, *inputs)

    with torch.no_grad():
        fixed_point(f, *curved_batch(), solver=replace(solver, tol=0, max_steps=steps), on_failure="ignore")
    return seen


def dense_iterates(matrix: Matrix, memory: int, steps: int, mix_every: int = 1) -> list[Tensor]:
    rows = [
        dense(partial(curved, x=x, gain=gain), z0, matrix, memory, steps, mix_every)
        for z0, x, gain in zip(*curved_batch(), strict=True)
    ]
    return [torch.stack(samples) for samples in zip(*rows, strict=True)]


# ------------------------------------------------------------------------------------------------ the dense references


@pytest.mark.parametrize("memory", [30, 1, 2, 5])
def test_broyden_is_that_of_the_dense_matrix(memory: int) -> None:
    """Iterate by iterate; where the memory slides, of the matrix made from -I and the last pairs only."""
    steps = 9
    found = iterates_of(Broyden(memory=memory), steps)
    assert len(found) == steps + 1
    for z, expected in zip(found, dense_iterates(broyden_matrix, memory, steps), strict=True):
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("memory", "mix_every"), [(10, 1), (4, 1), (6, 2)])
def test_type_one_anderson_is_that_of_the_dense_matrix(memory: int, mix_every: int) -> None:
    """``memory`` evaluations make one pair fewer."""
    steps = 7
    found = iterates_of(Anderson(kind=1, memory=memory, mix_every=mix_every, ridge=1e-14), steps)
    expected = dense_iterates(type_one_matrix, memory - 1, steps, mix_every)
    for z, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(z, reference, rtol=0, atol=1e-7)


def test_one_type_one_step_by_hand() -> None:
    """One pair: gamma = s.r1 / s.y, and z2 = z1 + beta r1 - gamma (s + beta y)."""
    z0, x, gain = curved_batch()
    for beta in (1.0, 0.6):
        z1 = z0 + beta * (curved(z0, x, gain) - z0)
        r0, r1 = curved(z0, x, gain) - z0, curved(z1, x, gain) - z1
        s, y = z1 - z0, r1 - r0
        gamma = ((s * r1).sum(1) / (s * y).sum(1)).unsqueeze(1)
        found = iterates_of(Anderson(kind=1, memory=2, mix_every=1, ridge=1e-15, damping=beta), 2)
        torch.testing.assert_close(found[2], z1 + beta * r1 - gamma * (s + beta * y), rtol=0, atol=1e-11)


@thorough
@given(size=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_a_linear_map_takes_broyden_twice_as_many_steps_as_it_has_dimensions(size: int, seed: int) -> None:
    """Gay, "Some convergence properties of Broyden's method" (SIAM J. Numer. Anal. 16, 1979)."""
    A = contraction(size, 0.7, seed)
    x = torch.randn(2, size, dtype=torch.float64, generator=generator(seed + 1))
    z, report = fixed_point(
        lambda z, x: z @ A.mT + x, torch.zeros_like(x), x, solver=Broyden(tol=1e-9, max_steps=2 * size)
    )
    expected = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - A, x.mT).mT
    assert report.converged.all()
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------------- slow problems


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("problem", SLOW)
def test_a_memory_that_wraps_converges(problem: str, dtype: torch.dtype) -> None:
    p = SLOW[problem]()
    f, z0, inputs = p.f.to(dtype), p.z0.to(dtype), [x.to(dtype) for x in p.inputs]
    tol = 1e-8 if dtype is torch.float64 else 1e-5
    with torch.no_grad():
        z, report = fixed_point(f, z0, *inputs, solver=Broyden(tol=tol, memory=10, max_steps=600), trace=True)
    assert report.converged.all()
    assert report.evaluations > 30, "the memory wrapped several times"
    assert report.trace is not None
    assert report.trace.isfinite().all()
    assert (residual(f, z, *inputs, norm="relative") <= 1.01 * tol).all()


@every_secant_method
@pytest.mark.parametrize("scale", [1e-3, 1e-1, 1e2, 1e3])
def test_the_scale_of_the_state_does_not_matter(solver: Solver, scale: float) -> None:
    p = TANH.problem()
    solver = replace(solver, tol=1e-6, max_steps=300)
    with torch.no_grad():
        z, report = fixed_point(p.f, p.z0, *p.inputs, solver=solver)
        scaled, scaled_report = fixed_point(p.scaled(scale).f, p.z0, *p.inputs, solver=solver)
    assert abs(report.evaluations - scaled_report.evaluations) <= 2
    torch.testing.assert_close(scaled / scale, z, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------- maps that expand


def expanding(name: str) -> tuple[Callable[..., Tensor], Tensor]:
    """A map with slopes far above 1 at its solution, and its input."""
    x = torch.randn(4, 10, dtype=torch.float64, generator=generator(3))
    if name == "negative":
        A = slow_symmetric(10, 1.0) - 4 * torch.eye(10, dtype=torch.float64)  # eigenvalues from -5 to -3
        return (lambda z, x: z @ A.mT + x), x
    if name == "both signs":
        Q, _ = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=generator(4)))
        A = Q @ torch.diag(torch.tensor([-3.0, -2, -1, -0.5, 0, 0.3, 0.6, 2, 2.5, 4], dtype=torch.float64)) @ Q.mT
        return (lambda z, x: z @ A.mT + x), x
    W = -2.5 * torch.eye(10, dtype=torch.float64) + contraction(10, 1.0, seed=5)
    return (lambda z, x: torch.tanh(z @ W.mT) + 0.3 * x), x


@every_secant_method
@pytest.mark.parametrize("name", ["negative", "both signs", "curved"])
def test_a_map_that_expands_is_solved(solver: Solver, name: str) -> None:
    f, x = expanding(name)
    z0 = torch.zeros_like(x)
    with torch.no_grad():
        _, plain = fixed_point(f, z0, x, solver=FixedPointIteration(max_steps=200), on_failure="ignore")
        z, report = fixed_point(f, z0, x, solver=replace(solver, tol=1e-8, max_steps=200))
    assert not plain.converged.any()
    assert report.converged.all()
    assert (residual(f, z, x, norm="relative") <= 1.01e-8).all()


# --------------------------------------------------------------------------------------------------- unrolled gradients


@pytest.mark.parametrize("memory", [30, 3])
def test_unrolled_gradients_are_those_of_the_dense_method(memory: int) -> None:
    """At any step, converged or not."""
    steps = 7
    R = torch.randn(3, 8, dtype=torch.float64, generator=generator(2))
    z0, x, gain = (part.requires_grad_() for part in curved_batch())
    solver = Broyden(tol=0, memory=memory, max_steps=steps)
    z, report = fixed_point(curved, z0, x, gain, solver=solver, gradient=UnrolledGradient(), on_failure="ignore")
    assert report.evaluations == steps + 1
    found = torch.autograd.grad((R * z).sum(), (z0, x, gain))
    last = dense_of(z0, x, gain, memory, [steps] * 3)
    expected = torch.autograd.grad((R * last).sum(), (z0, x, gain))
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-8)


def dense_of(z0: Tensor, x: Tensor, gain: Tensor, memory: int, steps: Sequence[int]) -> Tensor:
    return torch.stack(
        [
            dense(partial(curved, x=x[b], gain=gain[b]), z0[b], broyden_matrix, memory, count)[-1]
            for b, count in enumerate(steps)
        ]
    )


@pytest.mark.parametrize("solver", [Broyden(memory=4), Anderson(kind=1, memory=4)], ids=["broyden", "anderson type I"])
def test_unrolled_gradients_where_samples_stop_at_different_times(solver: Solver) -> None:
    """The first starts at its solution, the last goes on alone, long after the memory has wrapped."""
    solver = replace(solver, tol=1e-11, max_steps=300)
    z0, x, gain = curved_batch((0.0, 0.2, 0.6, 1.2))
    z0[0] = x[0]
    x.requires_grad_()
    z, report = fixed_point(curved, z0, x, gain, solver=solver, gradient=UnrolledGradient())
    assert report.steps[0] == 0
    assert report.steps.unique().numel() >= 3
    assert report.steps[3] > 10
    (found,) = torch.autograd.grad(z.sum(), x)
    assert found.isfinite().all()
    A = gain.unsqueeze(2) * (1 - (z - x).square()).unsqueeze(2) * contraction(8, 1.0)  # the slope of tanh
    eye = torch.eye(8, dtype=torch.float64)
    expected = torch.linalg.solve(eye - A.mT, torch.ones_like(x)).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------- degenerate cases


@every_secant_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_tolerance_at_all_stays_finite(solver: Solver, dtype: torch.dtype) -> None:
    """Long after convergence all differences are rounding; samples that sit at the solution have none at all."""
    p = tanh_problem()
    cell, x = p.cell.to(dtype), p.inputs[0].detach().to(dtype)
    with torch.no_grad():
        z, report = fixed_point(
            cell,
            cell.initial_state(x),
            x,
            solver=replace(solver, tol=0, max_steps=200),
            trace=True,
            on_failure="ignore",
        )
    assert z.isfinite().all()
    assert report.trace is not None
    assert not report.trace.isinf().any()
    assert (report.residual < 100 * torch.finfo(dtype).eps).all()
    assert (report.status <= SolverStatus.MAX_STEPS).all()


@every_secant_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_map_without_solution_stays_finite(solver: Solver, dtype: torch.dtype) -> None:
    """f(z) = z + 1: all residuals are the same, so y = 0 and K is singular or next to it."""
    z, report = fixed_point(lambda z: z + 1, torch.zeros(2, 3, dtype=dtype), solver=solver, on_failure="ignore")
    assert z.isfinite().all()
    assert report.residual.isfinite().all()


@pytest.mark.parametrize("max_steps", [0, 1, 2])
@every_secant_method
def test_a_budget_below_the_memory(solver: Solver, max_steps: int) -> None:
    p = tanh_problem()
    _, report = fixed_point(p.cell, p.z0, *p.inputs, solver=replace(solver, max_steps=max_steps), on_failure="ignore")
    assert report.evaluations == max_steps + 1
    assert report.residual.isfinite().all()

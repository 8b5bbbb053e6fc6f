"""Samples do not see each other: not through the stopping rule, not through a hard batch mate, not through NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import METHODS, SOLVERS, Method, generator, residual, slow_symmetric, tanh_problem, tight
from zoo.implicit import (
    DEQ,
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    SolverStatus,
    UnrolledGradient,
    fixed_point,
)

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)

SIZE = 6


def gained(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
    """tanh(gain W z + x), W with eigenvalues up to 1: each sample is as hard as its own gain says."""
    return torch.tanh(gain * (z @ slow_symmetric(SIZE, 1.0).to(z.dtype)) + x)


def batch_of(gains: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """z0, x and gain; the first sample is the same whatever the others are."""
    first = torch.randn(1, SIZE, dtype=torch.float64, generator=generator(0))
    others = 0.01 * torch.randn(len(gains), SIZE, dtype=torch.float64, generator=generator(len(gains)))
    x = torch.cat([first, others]).to(dtype)
    gain = torch.tensor([[0.6], *([g] for g in gains)], dtype=dtype)
    return torch.zeros_like(x), x, gain


MATES = {
    "easy": [0.1, 0.0, 0.3],
    "slow": [0.97, 0.99, 0.999],
    "without a reachable solution": [-3.0, 50.0, -100.0],
    "not finite": [float("nan"), float("inf"), 1e38],
}


@every_solver
@pytest.mark.parametrize("mates", MATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_result_does_not_depend_on_batch_mates(solver: Any, mates: str, dtype: torch.dtype) -> None:
    results = []
    for gains in ([0.2, 0.5, 0.4], MATES[mates]):
        z, report = fixed_point(gained, *batch_of(gains, dtype), solver=solver, on_failure="ignore")
        results.append((z[0], report.residual[0], report.steps[0], report.status[0]))
        assert z.isfinite().all()
        assert not report.residual.isnan().any()
    for reference, other in zip(*results, strict=True):
        torch.testing.assert_close(reference, other, rtol=0, atol=1e-6)
    assert results[0][3] == SolverStatus.CONVERGED


@every_solver
def test_a_sample_alone_gives_what_it_gives_in_a_batch(solver: Any) -> None:
    batch = batch_of([0.97, -3.0, 0.1], torch.float64)
    together, report = fixed_point(gained, *batch, solver=solver, on_failure="ignore")
    for b in range(4):
        z, alone = fixed_point(gained, *(part[b : b + 1] for part in batch), solver=solver, on_failure="ignore")
        if alone.converged.all():
            torch.testing.assert_close(z[0], together[b], rtol=0, atol=1e-9)
            assert alone.steps[0] == report.steps[b]


@every_solver
def test_gradients_do_not_depend_on_batch_mates(solver: Any) -> None:
    found = []
    for gains in ([0.2, 0.5, 0.4], [0.999, -3.0, 50.0]):
        z0, x, gain = batch_of(gains, torch.float64)
        x.requires_grad_()
        z, _ = fixed_point(gained, z0, x, gain, solver=solver, gradient=ImplicitGradient(solver), on_failure="ignore")
        (gradient,) = torch.autograd.grad(z.square().sum(), x)
        found.append(gradient[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------- NaN and infinity


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_input_stays_in_its_own_sample(method: Method, bad: float) -> None:
    """Values and gradients of the others are those of a clean batch, and the report says which sample it was."""
    p = tanh_problem()
    W = p.cell.W.detach()

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.mT) + x

    clean = torch.randn(3, 4, dtype=torch.float64, generator=generator(1))
    dirty = clean.clone()
    dirty[1, 2] = bad
    results = []
    for x in (clean, dirty):
        x.requires_grad_()
        z, report = fixed_point(
            f, torch.zeros_like(x), x, solver=method.solver, gradient=method.gradient, on_failure="ignore"
        )
        weights = torch.tensor([[1.0], [0.0], [2.0]], dtype=z.dtype)
        (gradient,) = torch.autograd.grad((weights * z).square().sum(), x, allow_unused=True)
        results.append((z.detach(), gradient))
    (clean_z, clean_gradient), (dirty_z, dirty_gradient) = results
    others = [0, 2]
    torch.testing.assert_close(dirty_z[others], clean_z[others], rtol=0, atol=1e-12)
    torch.testing.assert_close(dirty_gradient[others], clean_gradient[others], rtol=0, atol=1e-9)
    assert clean_gradient[others].abs().max() > 0
    assert report.status.tolist() == [SolverStatus.CONVERGED, SolverStatus.NON_FINITE, SolverStatus.CONVERGED]
    assert report.residual[1].isinf()
    assert dirty_z.isfinite().all(), "the start is finite, and nothing finite came after it"


class Faulty:
    """A map that is wrong about one sample, at one call."""

    def __init__(self, f: Any, call: int, value: float) -> None:
        self.f, self.call, self.value = f, call, value
        self.calls = 0

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        fz = self.f(z, *inputs)
        if self.calls == self.call:
            first = torch.arange(z.shape[0]).unsqueeze(1) == 0
            fz = torch.where(first, self.value, fz)
        self.calls += 1
        return fz

    def jacobian(self, z: Tensor, *inputs: Tensor) -> Tensor:
        return self.f.jacobian(z, *inputs)


@every_solver
@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_evaluation_keeps_the_best_finite_state(solver: Any, call: int, value: float) -> None:
    p = tanh_problem()
    solver = tight(solver, tol=1e-10)
    with torch.no_grad():
        clean, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=solver)
        z, report = fixed_point(
            Faulty(p.cell, call, value), p.z0, *p.inputs, solver=solver, on_failure="ignore", trace=True
        )
    torch.testing.assert_close(z[1:], clean[1:], rtol=0, atol=1e-12)
    assert report.converged[1:].all()
    assert report.status[0] == SolverStatus.NON_FINITE
    assert z.isfinite().all()
    assert not report.residual.isnan().any()
    if call == 0:
        assert report.residual[0].isinf()
        torch.testing.assert_close(z[0], p.z0[0], rtol=0, atol=0)
    else:
        torch.testing.assert_close(
            report.residual[:1], residual(p.cell, z, *p.inputs, norm="relative")[:1], rtol=1e-9, atol=0
        )
        seen = report.trace[:, 0]
        assert report.residual[0] == seen[seen.isfinite()].min()


@every_solver
def test_a_start_that_is_not_finite(solver: Any) -> None:
    z0 = torch.zeros(2, 3)
    z0[0, 0] = torch.nan
    z, report = fixed_point(lambda z: 0.5 * z + 1, z0, solver=solver, on_failure="ignore")
    assert report.status.tolist() == [SolverStatus.NON_FINITE, SolverStatus.CONVERGED]
    assert report.residual[0].isinf()
    assert z[1].isfinite().all()


@pytest.mark.parametrize("norm", ["relative", "absolute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_solver
def test_a_map_that_vanishes_is_finite(solver: Any, dtype: torch.dtype, norm: str) -> None:
    """The residual relative to ||f(z)|| = 0 is large, and no sign of a value that is not finite."""
    solver = type(solver)(norm=norm)
    z, report = fixed_point(lambda z: 0 * z, torch.full((2, 3), 1e3, dtype=dtype), solver=solver, trace=True)
    assert report.status.tolist() == [SolverStatus.CONVERGED] * 2
    assert not z.any()
    assert report.trace[0].isfinite().all()


@pytest.mark.parametrize("solver", [Anderson(tol=1e-6), FixedPointIteration(tol=1e-6)], ids=lambda s: type(s).__name__)
def test_unrolled_gradients_of_a_sample_that_starts_at_its_solution(solver: Any) -> None:
    """Its result is frozen while the others go on; steps that are thrown away must not leave NaN in the gradient.

    No step of it counts, so it has the gradient of one step, which is right here: its f does not depend on z.
    """
    x = torch.randn(2, 3, generator=generator(0)).requires_grad_()
    z0 = torch.zeros(2, 3)
    gain = torch.tensor([[0.0], [0.5]])
    with torch.no_grad():
        z0[0] = x[0]
    z, report = fixed_point(lambda z, x, gain: gain * z + x, z0, x, gain, solver=solver, gradient=UnrolledGradient())
    assert report.steps[0] == 0
    (gradient,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[1.0] * 3, [2.0] * 3]), rtol=0, atol=1e-4)


def test_a_module_reports_the_sample_too() -> None:
    p = tanh_problem()
    x = p.inputs[0].detach().clone()
    x[2] = torch.nan
    deq = DEQ(p.cell, on_failure="ignore")
    deq(x)[0].sum().backward()
    assert deq.report is not None
    assert deq.adjoint_report is not None
    assert deq.report.status.tolist() == [0, 0, SolverStatus.NON_FINITE]
    assert deq.adjoint_report.status.tolist() == [0, 0, SolverStatus.NON_FINITE]

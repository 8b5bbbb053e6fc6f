"""The report says what is true of the state that was returned, and failure is never silent."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import PROBLEMS, SOLVERS, Counting, InjectedTanhCell, generator, residual, tanh_problem, tight
from zoo.implicit import (
    DEQ,
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointIteration,
    ImplicitGradient,
    Newton,
    PhantomGradient,
    Solver,
    SolverReport,
    SolverStatus,
    fixed_point,
)

every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
both_norms = pytest.mark.parametrize("norm", ["relative", "absolute"])


# -------------------------------------------------------------------------------------------------------- the residual


@every_solver
@both_norms
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("max_steps", [0, 1, 2, 5, 500])
def test_the_residual_is_that_of_the_state_returned(solver: Any, norm: str, problem: str, max_steps: int) -> None:
    p = PROBLEMS[problem]()
    solver = replace(solver, norm=norm, max_steps=max_steps, tol=1e-8)
    z, report = fixed_point(p.cell, p.z0, *p.inputs, solver=solver, on_failure="ignore")
    true = residual(p.cell, z, *p.inputs, norm=norm)
    torch.testing.assert_close(report.residual, true, rtol=1e-6, atol=1e-15)
    assert report.converged.tolist() == (true <= 1e-8).tolist()
    assert bool(report.converged.all()) or max_steps < 500
    assert not report.converged.any() or max_steps > 0
    assert report.status.tolist() == [0 if c else 1 for c in report.converged.tolist()]


@every_solver
@both_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_residual_of_a_narrow_state_is_that_of_the_rounded_state(
    solver: Any, norm: str, dtype: torch.dtype
) -> None:
    p = tanh_problem()
    cell, x = p.cell.to(dtype), p.inputs[0].detach().to(dtype)
    with torch.no_grad():
        z, report = fixed_point(
            cell, cell.initial_state(x), x, solver=replace(solver, norm=norm, tol=1e-2), on_failure="ignore"
        )

    def wide(z: Tensor, x: Tensor) -> Tensor:
        return cell(z.to(dtype), x).float()

    assert z.dtype == dtype
    assert report.residual.dtype == torch.float32
    torch.testing.assert_close(report.residual, residual(wide, z.float(), x, norm=norm), rtol=1e-5, atol=1e-9)


@every_solver
def test_a_divergent_solve_returns_its_best_state(solver: Any) -> None:
    """A steep tanh map oscillates: what is returned has the lowest residual of all that were looked at."""
    W = 4 * torch.randn(4, 4, dtype=torch.float64, generator=generator(3))
    cell = InjectedTanhCell(W, torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator(4))
    z, report = fixed_point(cell, torch.zeros_like(x), x, solver=tight(solver), on_failure="ignore", trace=True)
    torch.testing.assert_close(report.residual, residual(cell, z, x, norm="relative"), rtol=1e-6, atol=1e-15)
    assert report.trace is not None
    torch.testing.assert_close(report.residual, report.trace.nan_to_num(torch.inf).amin(dim=0), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------- counting


class CountingCell(Counting):
    """With a Jacobian of its own, so that Newton needs no evaluation of f for that."""

    def jacobian(self, z: Tensor, *inputs: Tensor) -> Tensor:
        return self.f.jacobian(z, *inputs)


@every_solver
@pytest.mark.parametrize("max_steps", [0, 1, 2, 7, 50])
def test_evaluations_are_the_calls_of_f(solver: Any, max_steps: int) -> None:
    p = tanh_problem()
    f = CountingCell(p.cell)
    with torch.no_grad():
        _, report = fixed_point(
            f, p.z0, *p.inputs, solver=replace(solver, max_steps=max_steps), on_failure="ignore", trace=True
        )
    assert report.evaluations == f.calls == report.trace.shape[0] <= max_steps + 1
    assert report.steps.max() == f.calls - 1
    if not report.converged.all():
        assert report.evaluations == max_steps + 1


@every_solver
def test_a_gradient_adds_its_own_evaluations(solver: Any) -> None:
    """One for the implicit gradient, ``steps`` for the phantom one; none in the backward pass."""
    for gradient, extra in ((ImplicitGradient(solver), 1), (PhantomGradient(3), 3)):
        p = tanh_problem()
        f = CountingCell(p.cell)
        z, report = fixed_point(f, p.z0, *p.inputs, solver=solver, gradient=gradient)
        z.sum().backward()
        assert f.calls == report.evaluations + extra


def test_a_jacobian_by_torch_func_adds_one_call_a_step() -> None:
    p = tanh_problem()
    f = Counting(p.cell)
    with torch.no_grad():
        _, report = fixed_point(f, p.z0, *p.inputs, solver=Newton())
    assert f.calls == report.evaluations + int(report.steps.max())


@every_solver
@both_norms
def test_a_start_at_the_solution_takes_one_evaluation(solver: Any, norm: str) -> None:
    p = tanh_problem()
    f = CountingCell(p.cell)
    start = p.solution()
    with torch.no_grad():
        z, report = fixed_point(f, start, *p.inputs, solver=replace(solver, norm=norm))
    assert f.calls == report.evaluations == 1
    assert report.steps.tolist() == [0, 0, 0]
    torch.testing.assert_close(z, start, rtol=0, atol=0)


@every_solver
def test_each_sample_has_its_own_steps(solver: Any) -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    gain = torch.tensor([[0.0], [0.3], [0.9]], dtype=torch.float64)
    _, report = fixed_point(lambda z, x, gain: torch.tanh(gain * z + x), torch.zeros_like(x), x, gain, solver=solver)
    steps = report.steps.tolist()
    assert 1 <= steps[0] < steps[2]
    assert steps == sorted(steps)
    assert report.evaluations == steps[2] + 1


@every_solver
def test_no_steps_at_all(solver: Any) -> None:
    p = tanh_problem()
    start = torch.randn(p.z0.shape, dtype=torch.float64, generator=generator(0))
    with torch.no_grad():
        z, report = fixed_point(
            p.cell, start, *p.inputs, solver=replace(solver, max_steps=0), on_failure="ignore", trace=True
        )
    torch.testing.assert_close(z, start, rtol=0, atol=0)
    assert report.evaluations == 1
    assert report.steps.tolist() == [0, 0, 0]
    assert report.status.tolist() == [SolverStatus.MAX_STEPS] * 3
    assert report.trace.shape == (1, 3)


# ----------------------------------------------------------------------------------------------------------- the trace


@both_norms
def test_the_trace_of_plain_iteration_is_that_of_its_iterates(norm: str) -> None:
    p = tanh_problem()
    solver = FixedPointIteration(tol=1e-6, norm=norm, check_every=1)
    with torch.no_grad():
        _, report = fixed_point(p.cell, p.z0, *p.inputs, solver=solver, trace=True)
        z = p.z0
        for k in range(report.evaluations):
            expected = residual(p.cell, z, *p.inputs, norm=norm)
            stopped = report.steps < k
            torch.testing.assert_close(report.trace[k][~stopped], expected[~stopped], rtol=1e-9, atol=0)
            torch.testing.assert_close(report.trace[k][stopped], report.residual[stopped], rtol=0, atol=0)
            z = p.cell(z, *p.inputs)
    assert report.trace.shape == (report.evaluations, 3)


@every_solver
def test_the_trace_has_nan_where_nobody_looked(solver: Any) -> None:
    p = tanh_problem()
    _, report = fixed_point(
        p.cell, p.z0, *p.inputs, solver=replace(solver, max_steps=7, tol=0), on_failure="ignore", trace=True
    )
    looked = [k in {0, 7} or solver.looks(k, None) for k in range(8)]
    assert report.trace.isfinite().all(dim=1).tolist() == looked
    assert report.trace.isnan().all(dim=1).tolist() == [not x for x in looked]


def test_there_is_no_trace_unless_asked_for() -> None:
    p = tanh_problem()
    deq = DEQ(p.cell)
    assert deq(*p.inputs)[1].trace is None
    assert deq(*p.inputs, trace=True)[1].trace is not None


# --------------------------------------------------------------------------------------------------- status and advice


def failing(status: SolverStatus) -> dict[str, Any]:
    """A solve of two samples that ends so."""
    x = torch.ones(2, 3)
    if status is SolverStatus.MAX_STEPS:
        return {"f": lambda z, x: 0.9 * z + x, "z0": 0 * x, "solver": FixedPointIteration(max_steps=3)}
    if status is SolverStatus.DIVERGED:
        return {"f": lambda z, x: 3 * z + x, "z0": 0 * x, "solver": FixedPointIteration(max_steps=3, norm="absolute")}
    return {"f": lambda z, x: z / 0 * x, "z0": 0 * x, "solver": FixedPointIteration()}


FAILURES = [SolverStatus.MAX_STEPS, SolverStatus.DIVERGED, SolverStatus.NON_FINITE]
every_failure = pytest.mark.parametrize("status", FAILURES, ids=lambda s: s.name)


def run(status: SolverStatus, **options: Any) -> tuple[Tensor, SolverReport]:
    case = failing(status)
    return fixed_point(case["f"], case["z0"], torch.ones(2, 3), solver=case["solver"], **options)


@every_failure
def test_ignored_failures_are_in_the_report(status: SolverStatus) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z, report = run(status, on_failure="ignore")
    assert report.status.tolist() == [status, status]
    assert report.count(status) == 2
    assert report.failures() == [status]
    assert not report.converged.any()
    assert z.isfinite().all()
    assert not report.residual.isnan().any()
    assert status.advice in report.summary()
    assert "0 of 2 samples converged" in report.summary()


@every_failure
def test_the_warning_names_the_solver_and_gives_the_advice(status: SolverStatus) -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        run(status)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "fixed-point solve with FixedPointIteration(tol=0.0001" in text
    assert f"{status.name}: {status.advice}" in text
    assert not any(other.advice in text for other in FAILURES if other is not status)


@every_failure
def test_the_error_carries_the_report(status: SolverStatus) -> None:
    with pytest.raises(ConvergenceError) as caught:
        run(status, on_failure="raise")
    assert caught.value.report.status.tolist() == [status, status]
    assert status.advice in str(caught.value)


def test_the_advice_is_advice() -> None:
    assert "raise max_steps" in SolverStatus.MAX_STEPS.advice
    assert "damping" in SolverStatus.DIVERGED.advice
    assert "NaN" in SolverStatus.NON_FINITE.advice
    assert len({status.advice for status in SolverStatus}) == len(SolverStatus)


def test_the_warning_is_the_same_for_every_batch() -> None:
    """So that Python's default filter shows it once in a training run."""
    texts = []
    for batch in (2, 3):
        x = torch.randn(batch, 3)
        with pytest.warns(ConvergenceWarning) as caught:
            fixed_point(lambda z, x: 0.9 * z + x, 0 * x, x, solver=FixedPointIteration(max_steps=3))
        texts.append(str(caught[0].message))
    assert texts[0] == texts[1]


def test_one_bad_sample_is_enough_to_fail() -> None:
    x = torch.ones(2, 3)
    gain = torch.tensor([[0.0], [0.99]])
    solver = FixedPointIteration(max_steps=3)
    with pytest.raises(ConvergenceError) as caught:
        fixed_point(lambda z, x, g: g * z + x, 0 * x, x, gain, solver=solver, on_failure="raise")
    assert caught.value.report.converged.tolist() == [True, False]
    assert "1 of 2 samples converged" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ adjoint


def slow_adjoint(on_failure: Any) -> tuple[DEQ, Tensor]:
    """The forward solve converges; two steps are too few for the adjoint."""
    p = tanh_problem()
    gradient = ImplicitGradient(FixedPointIteration(tol=1e-10, max_steps=2))
    deq = DEQ(p.cell, Newton(), gradient, on_failure=on_failure)
    return deq, deq(*p.inputs)[0].sum()


def test_an_adjoint_failure_that_is_ignored_is_reported() -> None:
    deq, loss = slow_adjoint("ignore")
    assert deq.adjoint_report is None
    loss.backward()
    assert deq.report is not None
    assert deq.adjoint_report is not None
    assert deq.report.converged.all()
    assert deq.adjoint_report.status.tolist() == [SolverStatus.MAX_STEPS] * 3
    assert deq.adjoint_report.evaluations == 3


def test_an_adjoint_failure_warns() -> None:
    deq, loss = slow_adjoint("warn")
    with pytest.warns(ConvergenceWarning, match=r"the adjoint solve with ImplicitGradient\(.*MAX_STEPS: max_steps was"):
        loss.backward()
    assert deq.adjoint_report is not None


def test_an_adjoint_failure_raises() -> None:
    deq, loss = slow_adjoint("raise")
    with pytest.raises(ConvergenceError, match=r"the adjoint solve.*0 of 3 samples converged") as caught:
        loss.backward()
    assert caught.value.report is deq.adjoint_report


@every_solver
def test_the_adjoint_report_is_that_of_the_last_backward_pass(solver: Any) -> None:
    p = tanh_problem()
    deq = DEQ(p.cell, solver, ImplicitGradient(solver))
    z, report = deq(*p.inputs)
    assert deq.report is report
    assert deq.adjoint_report is None
    z.sum().backward()
    assert deq.adjoint_report is not None
    assert bool(deq.adjoint_report.converged.all())
    assert (deq.adjoint_report.residual <= solver.tol).all()
    assert deq.report is report


def test_the_adjoint_residual_is_relative_to_the_incoming_gradient() -> None:
    """u = g is returned after no step: its residual is ||J^T g|| / ||g||, by the dense Jacobian."""
    p = tanh_problem()
    seen: list[SolverReport] = []
    gradient = ImplicitGradient(FixedPointIteration(max_steps=0))
    z, _ = fixed_point(
        p.cell,
        p.z0,
        *p.inputs,
        solver=tight(Newton()),
        gradient=gradient,
        on_adjoint=seen.append,
        on_failure="ignore",
    )
    g = p.weights()
    z.backward(g)
    with torch.no_grad():
        product = torch.einsum("bij,bi->bj", p.cell.jacobian(p.solution(), *p.inputs), g)
    torch.testing.assert_close(seen[0].residual, product.norm(dim=1) / g.norm(dim=1), rtol=1e-9, atol=0)


@every_solver
def test_a_sample_without_a_gradient_takes_no_adjoint_step(solver: Any) -> None:
    """Nothing is relative to ||g|| = 0."""
    p = tanh_problem()
    deq = DEQ(p.cell, solver, ImplicitGradient(solver))
    z, _ = deq(*p.inputs)
    (gradient,) = torch.autograd.grad(z[1:].sum(), p.inputs)
    assert deq.adjoint_report is not None
    assert deq.adjoint_report.steps[0] == 0
    assert (deq.adjoint_report.steps[1:] > 0).all()
    assert deq.adjoint_report.converged.all()
    assert not gradient[0].any()


def test_reports_hold_no_graph() -> None:
    p = tanh_problem()
    for solver in SOLVERS.values():
        deq = DEQ(p.cell, solver, ImplicitGradient(Anderson()))
        z, report = deq(*p.inputs, trace=True)
        z.sum().backward()
        for part in (report, deq.adjoint_report):
            assert part is not None
            tensors = [value for value in vars(part).values() if isinstance(value, Tensor)]
            assert len(tensors) >= 4
            assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("solver", [Anderson(kind=1), Anderson(), Broyden(), FixedPointIteration()])
def test_running_away_is_not_converging(solver: Solver) -> None:
    """f(z) = z + 1 has no fixed point, though its relative residual falls as z grows."""
    _, report = fixed_point(lambda z: z + 1, torch.zeros(2, 3, dtype=torch.float64), solver=solver, on_failure="ignore")
    assert not report.converged.any()

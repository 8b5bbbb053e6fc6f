"""The unrolled mode: the values and gradients of a plain loop, and a report that claims nothing more."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.problems import PROBLEMS, Problem, contraction, flat, generator, residual, tanh_problem
from zoo.implicit import (
    DEQ,
    Anderson,
    ImplicitGradient,
    PhantomGradient,
    SolverStatus,
    Trajectory,
    UnrolledGradient,
    VariationalDropout,
    fixed_point,
    one_draw,
)
from zoo.implicit.unroll import unroll
from zoo.tanh import TanhCell


def looped(problem: Problem, steps: int) -> Any:
    z = problem.z0
    for _ in range(steps):
        z = problem.cell(z, *problem.inputs)
    return z


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(PROBLEMS)), steps=st.integers(1, 6), batch=st.integers(0, 3), recompute=st.booleans()
)
def test_values_and_gradients_are_those_of_a_loop(name: str, steps: int, batch: int, recompute: bool) -> None:
    problem = PROBLEMS[name](batch)
    z, report = unroll(problem.cell, problem.z0, *problem.inputs, steps=steps, recompute=recompute)
    expected = looped(problem, steps)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-15)
    R = problem.weights()
    ours, theirs = (
        torch.autograd.grad((R * flat(state)).sum(), problem.leaves, materialize_grads=True, allow_unused=True)
        for state in (z, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert torch.equal(report.steps, torch.full((batch,), steps))
    assert (report.evaluations, report.row_evaluations) == (steps + 1, batch * (steps + 1))


def test_the_start_has_a_gradient_and_all_of_it_is_differentiated_twice() -> None:
    problem = tanh_problem()
    z0 = torch.randn(3, 4, dtype=torch.float64, generator=generator(5)).requires_grad_()

    def last(z0: Tensor, *leaves: Tensor) -> Tensor:
        return unroll(problem.cell, z0, *problem.inputs, steps=3)[0]

    assert torch.autograd.gradcheck(last, (z0, *problem.leaves))
    assert torch.autograd.gradgradcheck(last, (z0, *problem.leaves), fast_mode=True)


def test_gradients_follow_grad_mode() -> None:
    problem = tanh_problem()
    with torch.no_grad():
        assert not unroll(problem.cell, problem.z0, *problem.inputs, steps=2)[0].requires_grad
    with torch.inference_mode():
        z, report = unroll(problem.cell, problem.z0, *problem.inputs, steps=2)
    torch.testing.assert_close(z, looped(problem, 2).detach(), rtol=0, atol=1e-15)
    z, report = unroll(problem.cell.eval(), problem.z0, *problem.inputs, steps=2)
    assert z.requires_grad
    assert not any(x.requires_grad for x in (report.residual, report.steps, report.converged, report.status))


# -------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("norm", ["relative", "absolute"])
@pytest.mark.parametrize("steps", [1, 4, 60])
def test_the_residual_is_that_of_the_state_returned(norm: Any, steps: int) -> None:
    problem = tanh_problem()
    judge = Anderson(tol=1e-6, norm=norm)
    z, report = unroll(problem.cell, problem.z0, *problem.inputs, steps=steps, solver=judge, trace=True)
    expected = residual(problem.cell, z, *problem.inputs, norm=norm)
    torch.testing.assert_close(report.residual, expected, rtol=1e-9, atol=1e-16)
    assert report.trace is not None
    assert report.trace.shape == (steps + 1, 3)
    assert torch.equal(report.trace[-1], report.residual)
    first = residual(problem.cell, problem.z0, *problem.inputs, norm=norm)
    torch.testing.assert_close(report.trace[0], first, rtol=1e-9, atol=1e-16)
    assert report.converged.all() == (steps == 60)
    assert set(report.status.tolist()) == {SolverStatus.CONVERGED if steps == 60 else SolverStatus.MAX_STEPS}


def test_a_state_that_runs_away_has_not_converged() -> None:
    """The relative residual of z <- z + 1 falls as 1 / k, and says nothing."""
    z, report = unroll(lambda z: z + 1, torch.zeros(2, 1), steps=30, solver=Anderson(tol=0.1))
    assert torch.equal(z, torch.full((2, 1), 30.0))
    assert (report.residual < 0.1).all()
    assert not report.converged.any()
    _, still = unroll(lambda z: z, torch.ones(2, 1), steps=2)
    assert still.converged.all()


def test_what_is_not_finite_is_said() -> None:
    start = torch.tensor([[0.0], [2.0]])
    z, report = unroll(lambda z: z**9, start, steps=4)
    assert z[0] == 0
    assert not z[1].isfinite()
    assert report.status.tolist() == [SolverStatus.CONVERGED, SolverStatus.NON_FINITE]
    assert report.residual.tolist() == [0, torch.inf]


# ---------------------------------------------------------------------------------------- dropout, weights, precision


class DroppingCell(nn.Module):
    """f(z, x) = A (m * z) + x."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(contraction(4, 0.7))
        self.dropout = VariationalDropout(0.4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.dropout(z) @ self.A.mT + x


def test_all_applications_have_one_mask_and_the_next_call_another() -> None:
    cell = DroppingCell()
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator(1))
    results = []
    for _ in range(2):
        with one_draw():
            z, _ = unroll(cell, torch.zeros_like(x), x, steps=3)
            mask = cell.dropout(torch.ones_like(x))
        assert 0 < (mask == 0).sum() < mask.numel()
        expected = x + (mask * (x + (mask * x) @ cell.A.mT)) @ cell.A.mT
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-13)
        results.append(z)
    assert not torch.equal(*results)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_parametrised_weights_are_computed_once(enabled: bool, recompute: bool) -> None:
    cell = TanhCell(4).double()
    parametrizations.weight_norm(cell.linear)
    calls = []
    cell.linear.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator(1))
    deq = DEQ(cell, unrolled=4, recompute=recompute)
    with torch.set_grad_enabled(enabled):
        z, _ = deq(x)
    assert len(calls) == 1
    if not enabled:
        return
    found = torch.autograd.grad(z.square().sum(), list(cell.parameters()))
    state = torch.zeros_like(x)
    for _ in range(4):
        state = cell(state, x)
    assert len(calls) > 4, "the reference computes them each time"
    for ours, theirs in zip(found, torch.autograd.grad(state.square().sum(), list(cell.parameters())), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_autocast_is_that_of_the_call_and_weights_it_cached_have_graphs() -> None:
    cell = TanhCell(8)
    x = torch.randn(3, 8, generator=generator(1))
    seen = []
    cell.linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            cell.linear(x)  # caches the weight without a graph
        z, _ = DEQ(cell, unrolled=3)(x)
        state = torch.zeros_like(x)
        for _ in range(3):
            state = cell(state, x).float()
    assert set(seen) == {torch.bfloat16}
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, state, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(z.sum(), cell.linear.weight)
    assert grad.abs().max() > 0


# -------------------------------------------------------------------------------------------------------- as a layer


def test_a_layer_can_be_unrolled_for_a_while() -> None:
    problem = tanh_problem()
    deq = DEQ(problem.cell, Anderson(tol=1e-9), ImplicitGradient(Anderson(tol=1e-9)), on_failure="raise")
    assert deq.unrolled is None
    solved, _ = deq(*problem.inputs)
    solved.sum().backward()
    assert deq.adjoint_report is not None
    deq.unrolled = 2
    assert "unrolled=2" in repr(deq)
    z, report = deq(*problem.inputs, trace=True)
    torch.testing.assert_close(z, looped(problem, 2), rtol=0, atol=1e-15)
    assert not report.converged.any(), "and nothing is raised"
    assert report.trace is not None
    assert deq.report is not None
    assert torch.equal(deq.report.residual, report.residual)
    assert deq.adjoint_report is None
    deq.unrolled = None
    again, _ = deq(*problem.inputs)
    assert torch.equal(again, solved)
    assert "unrolled" not in repr(deq)


def test_a_layer_starts_where_it_is_told() -> None:
    problem = tanh_problem()
    deq = DEQ(problem.cell, unrolled=3)
    first, _ = deq(*problem.inputs)
    second, _ = deq(*problem.inputs, z0=first.detach())
    torch.testing.assert_close(second, looped(problem, 6), rtol=0, atol=1e-15)


def test_the_gradient_of_the_layer_does_not_matter() -> None:
    problem = tanh_problem()
    found = []
    for gradient in (ImplicitGradient(), PhantomGradient(), UnrolledGradient()):
        z, _ = DEQ(problem.cell, gradient=gradient, unrolled=3)(*problem.inputs)
        found.append(torch.autograd.grad(z.sum(), problem.cell.W)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_copies_and_pickles_stay_unrolled() -> None:
    deq = DEQ(TanhCell(4), unrolled=5)
    assert copy.deepcopy(deq).unrolled == pickle.loads(pickle.dumps(deq)).unrolled == 5  # noqa: S301
    assert not any("unrolled" in name for name in deq.state_dict())


def test_many_applications_of_a_contraction_are_its_equilibrium() -> None:
    problem = tanh_problem()
    z, _ = unroll(problem.cell, problem.z0, *problem.inputs, steps=80)
    exact, _ = fixed_point(problem.cell, problem.z0, *problem.inputs, solver=Anderson(tol=1e-12, max_steps=200))
    torch.testing.assert_close(z, exact, rtol=0, atol=1e-9)


def test_the_result_is_nobody_elses_storage() -> None:
    x = torch.ones(2, 3)
    z, _ = unroll(lambda z, x: x, torch.zeros(2, 3), x, steps=1)
    z.add_(1)
    assert torch.equal(x, torch.ones(2, 3))


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
def test_steps_are_counted(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"unroll\(steps=...\) takes an integer >= 1, the applications of the cell"):
        unroll(lambda z: z, torch.zeros(1, 1), steps=steps)
    with pytest.raises(ValueError, match=rf"DEQ\(unrolled=...\) takes an integer >= 1.*given: {steps!r}"):
        DEQ(TanhCell(2), unrolled=steps)
    deq = DEQ(TanhCell(2), unrolled=3)
    with pytest.raises(ValueError, match=r"DEQ\(unrolled=...\)"):
        deq.unrolled = steps
    assert deq.unrolled == 3


def test_a_trajectory_has_the_states_on_the_way_with_the_graph_of_all_applications() -> None:
    deq = DEQ(TanhCell(2), unrolled=3).double()
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    z, report, states = deq(x, trajectory=Trajectory([1, 2]))
    z0 = deq.cell.initial_state(x)
    expected = [z0]
    for _ in range(3):
        expected.append(deq.cell(expected[-1], x))
    assert report.evaluations == 4
    for found, wanted in zip([*states, z], expected[1:], strict=True):
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), x, retain_graph=True),
            torch.autograd.grad(wanted.square().sum(), x, retain_graph=True),
        )


def test_a_trajectory_ends_with_the_last_application() -> None:
    with pytest.raises(ValueError, match=r"among the 3 applications of an unrolled cell; given: steps=\(1, 4\)"):
        DEQ(TanhCell(2), unrolled=3)(torch.zeros(1, 2), trajectory=[1, 4])


class InPlace(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.add_(1)


@pytest.mark.parametrize(
    ("f", "z0", "error", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), torch.zeros(1, 2), ValueError, "VariationalDropout"),
        (nn.BatchNorm1d(2), torch.zeros(3, 2), ValueError, "BatchNorm1d that uses batch statistics"),
        (lambda z: z[:, :1], torch.zeros(1, 2), ValueError, "f must keep the shape of the state"),
        (lambda z: z.double(), torch.zeros(1, 2), TypeError, "f must keep the dtype of the state"),
        (InPlace(), torch.zeros(1, 2), RuntimeError, "f changed its argument z in place"),
        (lambda z: z, torch.zeros(1, 2, dtype=torch.int64), TypeError, "a state holds real floating tensors"),
    ],
)
def test_cells_and_states_are_checked_as_those_of_a_solve(
    f: Any, z0: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        unroll(f, z0, steps=2)


def test_vmap_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="each sample stops by itself"):
        torch.func.vmap(lambda z: unroll(torch.tanh, z, steps=2)[0])(torch.zeros(2, 1, 3))

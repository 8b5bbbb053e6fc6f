"""compact=True: rows that have stopped leave the batch, and nothing but the cost tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.problems import PROBLEMS, SOLVERS, contraction, flat, generator, slow_symmetric, tight
from zoo.implicit import (
    DEQ,
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    Newton,
    Solver,
    SolverReport,
    SolverStatus,
    UnrolledGradient,
    VariationalDropout,
    fixed_point,
)
from zoo.implicit.maps import FlatMap
from zoo.implicit.state import StateView

thorough = settings(deadline=None, derandomize=True, database=None)
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)

GAINS = [0.0, 0.1, 0.9, 0.2, 0.97, 0.3, 0.0, 0.6, 0.8, 0.1]


class GainCell(nn.Module):
    """tanh(gain W z) + x, each row as hard as its gain says; it writes down how many rows it was given."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.W = nn.Parameter(slow_symmetric(size, 1.0))
        self.rows: list[int] = []

    def forward(self, z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        self.rows.append(z.shape[0])
        return torch.tanh(gain * (z @ self.W.mT)) + x

    def jacobian(self, z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        slope = 1 - torch.tanh(gain * (z @ self.W.mT)).square()
        return (slope * gain).unsqueeze(2) * self.W

    def initial_state(self, x: Tensor, gain: Tensor) -> Tensor:
        return torch.zeros_like(x)


def gain_batch(gains: Sequence[float] = GAINS) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(gains), 6, dtype=torch.float64, generator=generator(1))
    return x, torch.tensor(gains, dtype=torch.float64).unsqueeze(1)


class Result(NamedTuple):
    z: Any
    report: SolverReport
    states: list[Any]
    rows: list[int]


def solve(solver: Solver, *inputs: Tensor, trajectory: Sequence[int] = (1, 4, 9)) -> Result:
    cell = GainCell()
    with torch.no_grad():
        z, report, states = fixed_point(
            cell,
            cell.initial_state(*inputs),
            *inputs,
            solver=solver,
            trace=True,
            trajectory=trajectory,
            on_failure="ignore",
        )
    return Result(z, report, states, cell.rows)


def assert_same(compact: Result, whole: Result, atol: float = 1e-11) -> None:
    """All but the rows evaluated."""
    for mine, reference in zip([compact.z, *compact.states], [whole.z, *whole.states], strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=atol)
    a, b = compact.report, whole.report
    assert a.steps.tolist() == b.steps.tolist()
    assert a.status.tolist() == b.status.tolist()
    assert a.converged.tolist() == b.converged.tolist()
    assert a.evaluations == b.evaluations
    assert a.trace is not None
    assert b.trace is not None
    torch.testing.assert_close(a.residual, b.residual, rtol=1e-5, atol=atol)
    torch.testing.assert_close(a.trace, b.trace, rtol=1e-5, atol=atol, equal_nan=True)


# ------------------------------------------------------------------------------------------------------ the same result


@every_solver
@pytest.mark.parametrize("norm", ["relative", "absolute"])
def test_only_the_rows_evaluated_are_fewer(solver: Any, norm: Any) -> None:
    solver = replace(solver, tol=1e-8, max_steps=400, norm=norm)
    whole, compact = (solve(replace(solver, compact=flag), *gain_batch()) for flag in (False, True))
    assert_same(compact, whole)
    assert compact.report.converged.all()
    batch = len(GAINS)
    assert whole.report.row_evaluations == sum(whole.rows) == batch * whole.report.evaluations
    assert compact.report.row_evaluations == sum(compact.rows)
    assert compact.rows == sorted(compact.rows, reverse=True)
    assert compact.rows[-1] <= 0.5 * batch
    # Rows stay until a quarter of those present has stopped.
    needed = int((compact.report.steps + 1).sum())
    assert needed <= compact.report.row_evaluations < whole.report.row_evaluations


@every_solver
@settings(thorough, max_examples=30)
@given(gains=st.lists(st.floats(-2, 2), min_size=1, max_size=9), max_steps=st.integers(1, 12))
def test_any_batch_and_any_budget(solver: Any, gains: list[float], max_steps: int) -> None:
    """Some rows may have no solution that this solver reaches."""
    solver = replace(solver, tol=1e-3, max_steps=max_steps)
    everywhere = range(1, max_steps + 1)
    whole, compact = (
        solve(replace(solver, compact=flag), *gain_batch(gains), trajectory=everywhere) for flag in (False, True)
    )
    assert_same(compact, whole, atol=1e-6)
    assert compact.report.row_evaluations == sum(compact.rows)


@every_solver
def test_rows_that_are_not_finite_leave_too(solver: Any) -> None:
    x, gain = gain_batch()
    x[[0, 3, 7]] = torch.nan
    solver = replace(solver, tol=1e-8, max_steps=200)
    whole, compact = (solve(replace(solver, compact=flag), x, gain) for flag in (False, True))
    assert_same(compact, whole)
    assert compact.report.status[[0, 3, 7]].tolist() == [SolverStatus.NON_FINITE] * 3
    assert compact.rows[-1] <= len(GAINS) - 3


def test_what_stays_unsolved_is_evaluated_to_the_end() -> None:
    """The others have left by then, and the hard row ends as it would alone."""
    solver = FixedPointIteration(tol=1e-10, max_steps=15, compact=True)
    result = solve(solver, *gain_batch([0.0, 0.0, 0.0, 0.999]))
    x, gain = gain_batch([0.0, 0.0, 0.0, 0.999])
    alone = solve(solver, x[3:], gain[3:])
    assert result.rows[-1] == 1
    assert result.report.converged.tolist() == [True, True, True, False]
    torch.testing.assert_close(result.z[3:], alone.z, rtol=0, atol=1e-13)
    torch.testing.assert_close(result.report.residual[3:], alone.report.residual, rtol=1e-6, atol=0)


def test_a_batch_whose_rows_all_stop_together_loses_none() -> None:
    result = solve(Anderson(compact=True), *gain_batch([0.5]))
    assert set(result.rows) == {1}


# ------------------------------------------------------------------------------------------------ states and inputs


@every_solver
@pytest.mark.parametrize("problem", PROBLEMS)
def test_states_and_inputs_of_every_structure(solver: Any, problem: str) -> None:
    p = PROBLEMS[problem](batch=8)
    solver = tight(solver, tol=1e-9)
    with torch.no_grad():
        start, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=tight(Anderson()))
        # Two rows start at zero, three at their solutions, and the others more or less near to them.
        near = torch.tensor([0, 1e-1, 1e-12, 0, 1e-2, 1e-12, 1e-3, 1e-12], dtype=torch.float64)
        z0 = pytree.tree_map(
            lambda z: torch.where(
                _column(near == 0, z), 0, z + _column(near, z) * torch.randn(z.shape, generator=generator(0))
            ),
            start,
        )
        whole, report = fixed_point(p.cell, z0, *p.inputs, solver=solver)
        compact, compact_report = fixed_point(p.cell, z0, *p.inputs, solver=replace(solver, compact=True))
    torch.testing.assert_close(flat(compact), flat(whole), rtol=0, atol=1e-12)
    assert pytree.tree_structure(compact) == pytree.tree_structure(whole)
    assert compact_report.steps.tolist() == report.steps.tolist()
    assert compact_report.evaluations == report.evaluations
    assert compact_report.row_evaluations < report.row_evaluations


def _column(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *[1] * (like.dim() - 1))


@every_solver
def test_a_channels_last_state_stays_so(solver: Any) -> None:
    weight = 0.1 * torch.randn(3, 3, 3, 3, dtype=torch.float64, generator=generator(3))
    shape = (8, 3, 4, 4)
    x = torch.randn(shape, dtype=torch.float64, generator=generator(4)).to(memory_format=torch.channels_last)
    gain = torch.linspace(0, 1, 8, dtype=torch.float64).view(8, 1, 1, 1)
    layouts: list[bool] = []

    def f(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        layouts.append(z.is_contiguous(memory_format=torch.channels_last))
        return torch.tanh(gain * nn.functional.conv2d(z, weight, padding=1)) + x

    z0 = torch.zeros_like(x)
    solver = replace(solver, tol=1e-9, max_steps=200)
    with torch.no_grad():
        whole, _ = fixed_point(f, z0, x, gain, solver=solver)
        compact, report = fixed_point(f, z0, x, gain, solver=replace(solver, compact=True))
    torch.testing.assert_close(compact, whole, rtol=0, atol=1e-11)
    assert compact.is_contiguous(memory_format=torch.channels_last)
    assert all(layouts)
    assert report.row_evaluations < 8 * report.evaluations


def test_a_narrow_state_is_rounded_in_every_batch() -> None:
    x, gain = gain_batch()
    x, gain = x.bfloat16(), gain.bfloat16()
    cell = GainCell().bfloat16()
    results = []
    for flag in (False, True):
        solver = Anderson(tol=1e-2, compact=flag)
        with torch.no_grad():
            results.append(fixed_point(cell, torch.zeros_like(x), x, gain, solver=solver, on_failure="ignore"))
    (whole, report), (compact, compact_report) = results
    assert compact.dtype == torch.bfloat16
    torch.testing.assert_close(compact, whole, rtol=0, atol=1e-2)
    assert compact_report.row_evaluations < report.row_evaluations


@pytest.mark.parametrize("shape", [(6,), (), (3, 6)])
def test_a_shared_input_is_refused(shape: tuple[int, ...]) -> None:
    x, gain = gain_batch()
    shared = torch.zeros(shape, dtype=torch.float64)

    def f(z: Tensor, x: Tensor, gain: Tensor, shared: Tensor) -> Tensor:
        return torch.tanh(gain * z) + x + shared.sum()

    z0 = torch.zeros_like(x)
    fixed_point(f, z0, x, gain, shared, solver=Anderson(max_steps=500))
    text = r"all are batch first, here with 10 rows; given: an input of shape " + str(shape).replace(
        "(", r"\("
    ).replace(")", r"\)")
    with pytest.raises(ValueError, match=text):
        fixed_point(f, z0, x, gain, shared, solver=Anderson(max_steps=500, compact=True))


def test_inputs_that_are_no_tensors_go_along() -> None:
    x, gain = gain_batch()

    def f(z: Tensor, x: Tensor, options: dict[str, Any]) -> Tensor:
        return torch.tanh(options["gain"] * z) + x if options["on"] else x

    options = {"gain": gain, "on": True, "name": "a string"}
    z0 = torch.zeros_like(x)
    whole, _ = fixed_point(f, z0, x, options, solver=Anderson(max_steps=500))
    compact, report = fixed_point(f, z0, x, options, solver=Anderson(max_steps=500, compact=True))
    torch.testing.assert_close(compact, whole, rtol=0, atol=1e-12)
    assert report.row_evaluations < 10 * report.evaluations


# ------------------------------------------------------------------------------------------------------------ gradients


@every_solver
def test_unrolled_gradients_are_the_same(solver: Any) -> None:
    """Rows leave in the middle of a recorded solve; their part of the graph stays."""
    R = torch.randn(len(GAINS), 6, dtype=torch.float64, generator=generator(2))
    found = []
    for flag in (False, True):
        cell, inputs = GainCell(), [part.requires_grad_() for part in gain_batch()]
        z0 = torch.zeros_like(inputs[0], requires_grad=True)
        z, report = fixed_point(
            cell,
            z0,
            *inputs,
            solver=replace(solver, tol=1e-6, max_steps=300, compact=flag),
            gradient=UnrolledGradient(),
        )
        found.append(torch.autograd.grad((R * z).sum(), [z0, cell.W, *inputs]))
        assert report.row_evaluations == sum(cell.rows)
        assert (report.row_evaluations < len(GAINS) * report.evaluations) == flag
    for whole, compact in zip(*found, strict=True):
        torch.testing.assert_close(compact, whole, rtol=1e-9, atol=1e-11)
        assert whole.abs().max() > 0


@every_solver
def test_the_implicit_gradient_has_all_rows(solver: Any) -> None:
    cell, (x, gain) = GainCell(), gain_batch()
    x.requires_grad_()
    deq = DEQ(cell, tight(replace(solver, compact=True)), ImplicitGradient(tight(Anderson())))
    z, _ = deq(x, gain)
    (found,) = torch.autograd.grad(z.sum(), x)
    J = cell.jacobian(z.detach(), x, gain).detach()
    expected = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - J.mT, torch.ones_like(z))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_adjoint_solves_refuse_it() -> None:
    with pytest.raises(ValueError, match=r"compact=False.*which has all rows.*given: Anderson\(.*compact=True"):
        ImplicitGradient(Anderson(compact=True))


@pytest.mark.parametrize("value", [1, "yes", None])
def test_it_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Anderson\(compact=...\) takes true or false; given"):
        Anderson(compact=value)


# -------------------------------------------------------------------------------------------------------------- dropout


class DroppedCell(nn.Module):
    def __init__(self, shared_dims: Sequence[int]) -> None:
        super().__init__()
        self.W = nn.Parameter(contraction(6, 0.9))
        self.dropout = VariationalDropout(0.4, shared_dims)

    def forward(self, z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        return torch.tanh(gain * self.dropout(z @ self.W.mT)) + x

    def initial_state(self, x: Tensor, gain: Tensor) -> Tensor:
        return torch.zeros_like(x)


@every_solver
@pytest.mark.parametrize("shared_dims", [(), (1,)])
def test_masks_follow_their_rows(solver: Any, shared_dims: Sequence[int]) -> None:
    cell = DroppedCell(shared_dims)
    found = []
    for flag in (False, True):
        torch.manual_seed(3)
        x, gain = gain_batch()
        x.requires_grad_()
        deq = DEQ(cell, replace(solver, tol=1e-9, max_steps=200, compact=flag), ImplicitGradient(tight(Anderson())))
        z, report = deq(x, gain)
        found.append((z.detach(), *torch.autograd.grad(z.sum(), (x, cell.W))))
        assert (report.row_evaluations < len(GAINS) * report.evaluations) == flag
    for whole, compact in zip(*found, strict=True):
        torch.testing.assert_close(compact, whole, rtol=0, atol=1e-7)


# -------------------------------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize("problem", PROBLEMS)
@settings(thorough, max_examples=30)
@given(data=st.data())
def test_a_selected_map_is_the_map_on_those_rows(problem: str, data: st.DataObject) -> None:
    p = PROBLEMS[problem](batch=5)
    view = StateView(p.z0)
    f: Callable[..., Tensor] = FlatMap(p.cell, view, p.inputs)
    index = torch.tensor(data.draw(st.lists(st.integers(0, 4), unique=True, max_size=5)), dtype=torch.int64)
    z = torch.randn(5, view.size, dtype=torch.float64, generator=generator(1))
    with torch.no_grad():
        selected = FlatMap(p.cell, view, p.inputs).select(index)
        torch.testing.assert_close(selected(z[index]), f(z)[index], rtol=0, atol=1e-14)
        torch.testing.assert_close(
            selected.jacobian(z[index]), FlatMap(p.cell, view, p.inputs).jacobian(z)[index], rtol=0, atol=1e-14
        )
        if index.numel() > 1:
            again = torch.tensor([1, 0])
            torch.testing.assert_close(selected.select(again)(z[index[again]]), f(z)[index[again]], rtol=0, atol=1e-14)


def test_newton_takes_its_jacobians_of_the_rows_that_are_left() -> None:
    class Recording(GainCell):
        def __init__(self) -> None:
            super().__init__()
            self.jacobians: list[int] = []

        def jacobian(self, z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
            self.jacobians.append(z.shape[0])
            return super().jacobian(z, x, gain)

    cell, (x, gain) = Recording(), gain_batch()
    fixed_point(cell, torch.zeros_like(x), x, gain, solver=Newton(tol=1e-10, compact=True))
    assert cell.jacobians[0] == len(GAINS)
    assert cell.jacobians[-1] < len(GAINS)

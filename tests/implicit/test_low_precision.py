"""bfloat16_until: first evaluations under bfloat16 autocast, last ones in the dtype of the state. And warm starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.problems import PROBLEMS, SOLVERS, contraction, flat, generator, residual, tight
from zoo.implicit import (
    DEQ,
    GMRES,
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    PhantomGradient,
    Solver,
    Trajectory,
    UnrolledGradient,
    fixed_point,
)

every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)

TOL = 1e-5  # well below the floor of bfloat16, which is about 1e-3


class Cell(nn.Module):
    """tanh(W z) + x, which writes down under which autocast it was evaluated."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24, bias=False, dtype=dtype)
        with torch.no_grad():
            self.linear.weight.copy_(contraction(24, 0.9))
        self.autocast: list[bool] = []
        self.computed_in: list[torch.dtype] = []
        self.seen: list[Tensor] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        if self.autocast[-1]:
            assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        product = self.linear(z)
        self.computed_in.append(product.dtype)
        self.seen.append(z.detach().clone())
        return torch.tanh(product) + x

    def jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        return (1 - torch.tanh(self.linear(z)).square()).unsqueeze(2) * self.linear.weight

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def input_of(dtype: torch.dtype = torch.float32, rows: int = 4) -> Tensor:
    return torch.randn(rows, 24, dtype=torch.float64, generator=generator(1)).to(dtype).requires_grad_()


def coarse_first(solver: Solver, **others: Any) -> Solver:
    return replace(solver, **{"tol": TOL, "max_steps": 200, "bfloat16_until": 5e-3, **others})


# --------------------------------------------------------------------------------------------------- the two precisions


@every_solver
def test_bfloat16_first_and_float32_last(solver: Any) -> None:
    cell, x = Cell(), input_of()
    with torch.no_grad():
        z, report = DEQ(cell, coarse_first(solver))(x)
        exact, _ = DEQ(Cell(), replace(solver, tol=1e-6, max_steps=500))(x)
    switch = cell.autocast.index(False)
    assert switch >= 2
    assert cell.autocast == [True] * switch + [False] * (len(cell.autocast) - switch)
    assert cell.computed_in == [torch.bfloat16] * switch + [torch.float32] * (len(cell.autocast) - switch)
    assert z.dtype == torch.float32
    assert report.converged.all()
    assert (report.residual <= TOL).all()
    torch.testing.assert_close(report.residual, residual(Cell(), z, x, norm="relative"), rtol=0.05, atol=1e-7)
    assert (z - exact).norm() <= 1e-3 * exact.norm()


def test_bfloat16_alone_does_not_come_that_far() -> None:
    """So the first stage could not have done it. Its own residual may even be 0: that of another map."""
    x = input_of()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = DEQ(Cell(), Anderson(tol=TOL, max_steps=200), on_failure="ignore")(x)
    assert (residual(Cell(), z, x, norm="relative") > 10 * TOL).all()


@every_solver
def test_the_counts_of_both_stages_are_joined(solver: Any) -> None:
    cell, x = Cell(), input_of()
    with torch.no_grad():
        _, report = fixed_point(cell, torch.zeros_like(x), x, solver=coarse_first(solver), trace=True)
    assert report.evaluations == len(cell.autocast)
    assert report.row_evaluations == 4 * report.evaluations
    assert report.trace is not None
    assert report.trace.shape == (report.evaluations, 4)
    assert int(report.steps.max()) <= report.evaluations - 2, "each stage evaluates once more than it steps"
    assert int(report.steps.max()) > cell.autocast.count(True) - 1


@every_solver
@pytest.mark.parametrize("max_steps", [0, 1, 2, 5, 9])
def test_both_stages_share_the_budget(solver: Any, max_steps: int) -> None:
    cell, x = Cell(), input_of()
    with torch.no_grad():
        z, report = fixed_point(
            cell,
            torch.zeros_like(x),
            x,
            solver=coarse_first(solver, max_steps=max_steps, tol=1e-7),
            on_failure="ignore",
        )
    assert len(cell.autocast) == report.evaluations <= max_steps + 2
    assert not cell.autocast[-1], "the report is of float32 in any case"
    assert (report.steps <= max_steps).all()
    torch.testing.assert_close(report.residual, residual(Cell(), z, x, norm="relative"), rtol=1e-2, atol=1e-7)


def test_most_of_the_work_is_done_in_bfloat16() -> None:
    """To 1e-3 few evaluations are left for float32."""
    cell, x = Cell(), input_of()
    with torch.no_grad():
        DEQ(cell, Anderson(tol=1e-3, bfloat16_until=5e-3))(x)
        cold = Cell()
        DEQ(cold, Anderson(tol=1e-3))(x)
    assert cell.autocast.count(False) <= 4
    assert cell.autocast.count(False) < len(cold.autocast) / 2


@every_solver
def test_a_tolerance_that_bfloat16_reaches_is_verified_in_float32(solver: Any) -> None:
    """The first stage ends at tol where that is the looser of the two."""
    cell, x = Cell(), input_of()
    with torch.no_grad():
        _, report = DEQ(cell, coarse_first(solver, tol=0.05, bfloat16_until=1e-3))(x)
    assert report.converged.all()
    assert cell.autocast[-1] is False
    assert cell.autocast.count(False) <= 3


def test_float64_states_are_computed_in_float64_all_the_time() -> None:
    """Autocast leaves float64 alone, on a CPU."""
    cell, x = Cell(torch.float64), input_of(torch.float64)
    with torch.no_grad():
        _, report = DEQ(cell, coarse_first(Anderson(), tol=1e-12))(x)
    assert set(cell.computed_in) == {torch.float64}
    assert report.converged.all()
    assert report.residual.dtype == torch.float64
    assert (report.residual <= 1e-12).all()


def test_an_absolute_tolerance_holds_for_the_second_stage() -> None:
    cell, x = Cell(), input_of()
    with torch.no_grad():
        z, report = DEQ(cell, coarse_first(Anderson(), tol=1e-4, norm="absolute"))(x)
    assert (report.residual <= 1e-4).all()
    torch.testing.assert_close(report.residual, residual(Cell(), z, x, norm="absolute"), rtol=0.05, atol=1e-6)
    assert cell.autocast[0]
    assert cell.autocast[-1] is False


def test_the_first_stage_ends_at_a_relative_residual_in_any_case() -> None:
    """Of a large state bfloat16 never reaches an absolute residual of 5e-3."""
    W, x = contraction(24, 0.9, dtype=torch.float32), 1e4 * input_of().detach()
    autocast: list[bool] = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return torch.as_tensor(z @ W.mT + x)

    with torch.no_grad():
        _, report = fixed_point(
            f, torch.zeros_like(x), x, solver=coarse_first(Anderson(), tol=1.0, norm="absolute", max_steps=100)
        )
    assert report.converged.all()
    assert autocast.count(True) < 30


@pytest.mark.parametrize("ambient", [torch.bfloat16, None], ids=str)
def test_an_ambient_autocast_does_not_reach_the_second_stage(ambient: torch.dtype | None) -> None:
    """Nor the gradient, which is that of the float32 equilibrium."""
    results = []
    for solver in (coarse_first(Anderson()), Anderson(tol=TOL, max_steps=200)):
        cell, x = Cell(), input_of()
        own = ambient if solver.bfloat16_until is not None else None
        with torch.autocast("cpu", dtype=own, enabled=own is not None):
            z, report = DEQ(cell, solver, ImplicitGradient(Anderson(tol=TOL, max_steps=200)))(x)
        assert report.converged.all()
        assert cell.autocast[-1] is False
        z.square().sum().backward()
        assert x.grad is not None
        results.append((z.detach(), x.grad, cell.linear.weight.grad))
    for mine, reference in zip(*results, strict=True):
        assert mine is not None
        assert reference is not None
        assert (mine - reference).norm() <= 1e-3 * reference.norm()


@pytest.mark.parametrize("compact", [False, True])
@every_solver
def test_with_compaction(solver: Any, compact: bool) -> None:
    x = input_of(rows=8).detach()
    gain = torch.linspace(0, 1, 8).unsqueeze(1)
    rows: list[int] = []
    W = contraction(24, 0.9, dtype=torch.float32)

    def f(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        rows.append(z.shape[0])
        return torch.tanh(gain * (z @ W.mT)) + x

    def jacobian(z: Tensor, x: Tensor, gain: Tensor) -> Tensor:
        return (1 - torch.tanh(gain * (z @ W.mT)).square()).unsqueeze(2) * (gain.unsqueeze(2) * W)

    f.jacobian = jacobian  # type: ignore[attr-defined]
    with torch.no_grad():
        z, report = fixed_point(f, torch.zeros_like(x), x, gain, solver=coarse_first(solver, compact=compact))
    assert report.row_evaluations == sum(rows)
    assert (report.row_evaluations < 8 * report.evaluations) == compact
    assert (residual(f, z, x, gain, norm="relative") <= 1.1 * TOL).all()


def test_a_trajectory_counts_the_updates_of_both_stages() -> None:
    cell, x = Cell(), input_of()[:1]  # one sample: others would be evaluated on after they have stopped
    everywhere = range(1, 61)
    with torch.no_grad():
        z, report, states = fixed_point(
            cell,
            torch.zeros_like(x),
            x,
            solver=coarse_first(FixedPointIteration(check_every=1), max_steps=60),
            trajectory=everywhere,
        )
    switch = cell.autocast.index(False)
    assert torch.equal(cell.seen[switch], cell.seen[switch - 1]), "the second stage starts where the first one ended"
    iterates = [*cell.seen[:switch], *cell.seen[switch + 1 :]]
    assert len(iterates) == report.evaluations - 1
    for k, state in zip(everywhere, states, strict=True):
        assert torch.equal(state, iterates[k] if k < len(iterates) else z)


def test_slices_go_through_both_stages() -> None:
    cell, x = Cell(), input_of()
    solver = coarse_first(FixedPointIteration(), max_steps=120)
    with torch.no_grad():
        z, report, states = fixed_point(
            cell, torch.zeros_like(x), x, solver=solver, trajectory=Trajectory([6], PhantomGradient(), sliced=True)
        )
    assert report.evaluations == len(cell.autocast)
    assert report.converged.all()
    assert (states[0] - z).abs().max() > 1e-6
    assert (residual(Cell(), z, x, norm="relative") <= 1.05 * TOL).all()


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(
    "gradient",
    [ImplicitGradient(Anderson(tol=1e-6, max_steps=200)), ImplicitGradient(GMRES(tol=1e-6)), PhantomGradient(80)],
    ids=["anderson", "gmres", "phantom"],
)
def test_the_gradient_is_that_of_the_full_precision_solve(gradient: Any) -> None:
    found = []
    for solver in (coarse_first(Anderson(), tol=1e-6), Anderson(tol=1e-6, max_steps=200)):
        cell, x = Cell(), input_of()
        z, _ = DEQ(cell, solver, gradient)(x)
        assert cell.autocast[-1] is False
        z.square().sum().backward()
        found.append((x.grad, cell.linear.weight.grad))
    for mine, reference in zip(*found, strict=True):
        assert mine is not None
        assert reference is not None
        assert mine.dtype == torch.float32
        assert (mine - reference).norm() <= 1e-4 * reference.norm()


def test_an_unrolled_solve_has_gradients_through_both() -> None:
    """The bfloat16 part is only where the rest starts from, so little of its rounding is left."""
    found = []
    for solver in (coarse_first(FixedPointIteration()), FixedPointIteration(tol=TOL, max_steps=200)):
        cell, x = Cell(), input_of()
        z, _ = DEQ(cell, solver, UnrolledGradient())(x)
        z.square().sum().backward()
        found.append(x.grad)
    mine, reference = found
    assert mine is not None
    assert reference is not None
    assert (mine - reference).norm() <= 2e-2 * reference.norm()


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_state_that_is_narrow_itself_is_refused(dtype: torch.dtype) -> None:
    x = input_of().detach().to(dtype)
    with pytest.raises(ValueError, match=r"bfloat16_until=0.005 finishes in the dtype of the state.*float32"):
        fixed_point(Cell(dtype), torch.zeros_like(x), x, solver=coarse_first(Anderson()))


@pytest.mark.parametrize("solver", [Anderson(bfloat16_until=5e-3), GMRES(bfloat16_until=5e-3)], ids=str)
def test_adjoint_solves_refuse_it(solver: Solver) -> None:
    with pytest.raises(ValueError, match=r"bfloat16_until=None.*in one precision; given: .*bfloat16_until=0.005"):
        ImplicitGradient(solver)


@pytest.mark.parametrize("value", [0, -1e-3, float("nan"), "bf16", True])
def test_it_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Anderson\(bfloat16_until=...\) takes a number > 0, or None; given"):
        Anderson(bfloat16_until=value)


# ---------------------------------------------------------------------------------------------------------- warm starts


@every_solver
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_start_at_the_solution_takes_one_evaluation(solver: Any, problem: str) -> None:
    p = PROBLEMS[problem]()
    deq = DEQ(p.cell, replace(solver, tol=1e-6, max_steps=200))
    with torch.no_grad():
        exact, _ = DEQ(p.cell, tight(Anderson()))(*p.inputs)
        z, report = deq(*p.inputs, z0=exact)
    assert report.evaluations == 1
    assert report.row_evaluations == p.weights().shape[0]
    assert report.converged.all()
    assert not report.steps.any()
    assert torch.equal(flat(z), flat(exact))


@every_solver
def test_a_start_near_the_solution_takes_few(solver: Any) -> None:
    """From the equilibrium of an input 1e-3 away, against that from zero."""
    cell, x = Cell(torch.float64), input_of(torch.float64).detach()
    solver = replace(solver, tol=1e-3)
    with torch.no_grad():
        near, _ = DEQ(cell, tight(Anderson()))(x * (1 + 1e-3 * torch.randn(x.shape, generator=generator(5))))
        _, cold = DEQ(cell, solver)(x)
        _, warm = DEQ(cell, solver)(x, z0=near)
    assert warm.evaluations <= 3 <= cold.evaluations
    assert warm.evaluations < cold.evaluations


def test_a_warm_start_with_a_bfloat16_stage_takes_one_evaluation_of_each() -> None:
    cell, x = Cell(), input_of()
    with torch.no_grad():
        exact, _ = DEQ(Cell(), Anderson(tol=1e-6, max_steps=100))(x)
        _, report = DEQ(cell, coarse_first(Anderson()))(x, z0=exact)
    assert cell.autocast == [True, False]
    assert report.evaluations == 2
    assert not report.steps.any()

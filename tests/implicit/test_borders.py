"""Where the backbone meets its caller: storage, cached weights, tiny losses, runaway states, names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.problems import GRADIENTS, SOLVERS, tanh_problem
from zoo.implicit import (
    DEQ,
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    Newton,
    PhantomGradient,
    Solver,
    SolverStatus,
    SpectralBound,
    UnrolledGradient,
    fixed_point,
    from_description,
    jacobian_penalty,
)


class BoundedCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        parametrize.register_parametrization(self.linear, "weight", SpectralBound(0.5))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def inputs() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


def weight_gradient(cell: BoundedCell) -> Tensor:
    gradient = cell.linear.parametrizations.weight.original.grad  # type: ignore[union-attr]
    assert gradient is not None
    cell.zero_grad()
    return gradient


def test_fixed_point_computes_parametrised_weights_with_a_graph_too() -> None:
    cell, x = BoundedCell(), inputs()
    DEQ(cell)(x)[0].sum().backward()
    expected = weight_gradient(cell)
    fixed_point(cell, torch.zeros_like(x), x)[0].sum().backward()
    assert torch.equal(weight_gradient(cell), expected)
    with parametrize.cached():
        fixed_point(cell, torch.zeros_like(x), x)[0].sum().backward()
    assert torch.equal(weight_gradient(cell), expected)


def test_weights_cached_without_a_graph_are_computed_anew() -> None:
    cell, x = BoundedCell(), inputs()
    deq = DEQ(cell)
    deq(x)[0].sum().backward()
    expected = weight_gradient(cell)
    with parametrize.cached():
        with torch.no_grad():
            deq(x)
        deq(x)[0].sum().backward()
    assert torch.equal(weight_gradient(cell), expected)


def test_parametrised_weights_that_f_closes_over_get_their_gradient_too() -> None:
    cell, x = BoundedCell(), inputs()
    DEQ(cell)(x)[0].sum().backward()
    expected = weight_gradient(cell)
    with parametrize.cached():
        fixed_point(cell.forward, torch.zeros_like(x), x)[0].sum().backward()
    assert torch.equal(weight_gradient(cell), expected)


def adds_in_place(z: Tensor, x: Tensor) -> Tensor:
    z += torch.tanh(0.5 * z + x) - z
    return z


def halves_in_place(z: Tensor, x: Tensor) -> Tensor:
    z.mul_(0.5)
    return torch.tanh(z + x)


@pytest.mark.parametrize("f", [adds_in_place, halves_in_place])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_a_map_that_changes_its_argument_is_refused(f: Any, mode: Any, gradient: Any) -> None:
    with mode(), pytest.raises(RuntimeError, match="f changed its argument z in place"):
        fixed_point(f, torch.zeros(3, 4), torch.ones(3, 4), gradient=gradient(Anderson()))


def test_the_adjoint_of_newton_uses_the_weights_of_the_forward() -> None:
    cell, x = BoundedCell(), inputs().requires_grad_()
    other = {name: p.detach() / 2 for name, p in cell.named_parameters()}
    tight = Newton(tol=1e-13)

    def gradient(solver: Solver) -> tuple[Tensor, Tensor]:
        deq = DEQ(Held(cell), tight, ImplicitGradient(solver))
        z = torch.func.functional_call(deq, {f"cell.held.{k}": v for k, v in other.items()}, (x,))[0]
        (result,) = torch.autograd.grad(z.sum(), x)
        assert deq.adjoint_report is not None
        return result, deq.adjoint_report.converged

    by_newton, converged = gradient(tight)
    assert converged.all()
    torch.testing.assert_close(by_newton, gradient(Anderson(tol=1e-13))[0], rtol=0, atol=1e-11)


class Held(nn.Module):
    def __init__(self, held: BoundedCell) -> None:
        super().__init__()
        self.held = held

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.held(z, x)  # type: ignore[no-any-return]

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func.jvp's own first use
def test_forward_mode_is_refused_where_it_would_be_wrong() -> None:
    x = inputs()

    def solve(x: Tensor, gradient: Any) -> Tensor:
        tight = Anderson(tol=1e-13)
        z: Tensor = fixed_point(
            lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x, solver=tight, gradient=gradient
        )[0]
        return z

    for gradient in (ImplicitGradient(), PhantomGradient()):
        with pytest.raises(NotImplementedError, match=r"UnrolledGradient\(\) only"):
            torch.func.jvp(lambda x: solve(x, gradient), (x,), (torch.ones_like(x),))  # noqa: B023
    z, tangent = torch.func.jvp(lambda x: solve(x, UnrolledGradient()), (x,), (torch.ones_like(x),))
    slope = 1 - z.square()
    torch.testing.assert_close(tangent, slope / (1 - 0.5 * slope), rtol=0, atol=1e-10)


def test_batch_statistics_in_a_cell_are_refused() -> None:
    class Normalized(BoundedCell):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return super().forward(self.norm(z), x)

    deq = DEQ(Normalized())
    with pytest.raises(ValueError, match=r"BatchNorm1d that uses batch statistics \(norm\)"):
        deq(inputs())
    assert deq.eval()(inputs())[1].converged.all()


def test_one_part_of_a_coupled_result_can_be_changed_in_place() -> None:
    x = inputs().requires_grad_()
    (a, b), _ = fixed_point(
        lambda z, x: (torch.tanh(0.3 * z[1] + x), torch.tanh(0.3 * z[0])), (torch.zeros_like(x), torch.zeros_like(x)), x
    )
    (expected,) = torch.autograd.grad((2 * a).sum() + b.sum(), x, retain_graph=True)
    a.mul_(2)
    assert torch.equal(torch.autograd.grad(a.sum() + b.sum(), x)[0], expected)


def test_the_jacobian_penalty_of_a_constant_map_is_zero() -> None:
    x = inputs().requires_grad_()
    assert jacobian_penalty(lambda z, x: 2 * x, torch.zeros_like(x), x).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e-8, 1.0, 1e4, 1e25])
def test_the_scale_of_the_loss_does_not_matter_in_float32(size: float) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    W = 0.3 * torch.randn(4, 4)
    z, _ = fixed_point(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros(3, 4), x)
    (expected,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    (scaled,) = torch.autograd.grad((z * size).sum(), x)
    torch.testing.assert_close(scaled / size, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("recording", [True, False])
def test_the_result_has_storage_of_its_own(solver: Any, gradient: Any, recording: bool) -> None:
    x = inputs()
    start = x.clone()
    kept = start.clone()
    with torch.set_grad_enabled(recording):
        z, report = fixed_point(lambda z, x: x, start, x, solver=solver, gradient=gradient(solver))
        assert report.steps.tolist() == [0, 0, 0]
        z.zero_()
    assert torch.equal(start, kept)
    assert torch.equal(x, kept)


def test_a_state_that_runs_away_is_divergent_although_its_relative_residual_falls() -> None:
    solver = FixedPointIteration(max_steps=20)
    _, report = fixed_point(
        lambda z, x: 2 * z + x, torch.zeros(2, 3), torch.ones(2, 3), solver=solver, on_failure="ignore"
    )
    assert report.status.tolist() == [SolverStatus.DIVERGED] * 2


def test_a_state_that_goes_to_zero_is_not_divergent() -> None:
    solver = FixedPointIteration(max_steps=20)
    z, report = fixed_point(lambda z: z / 2, torch.ones(2, 3), solver=solver, on_failure="ignore")
    assert report.status.tolist() == [SolverStatus.MAX_STEPS] * 2
    assert (z < 1e-5).all()
    _, report = fixed_point(lambda z: z / 2, torch.ones(2, 3), solver=FixedPointIteration(norm="absolute"))
    assert report.converged.all()


def test_a_users_class_does_not_hide_the_zoos_of_the_same_name() -> None:
    theirs = dataclass(frozen=True)(type("Anderson", (FixedPointIteration,), {"__module__": "elsewhere"}))
    assert type(from_description("Anderson", Solver)) is Anderson
    assert type(from_description("elsewhere.Anderson", Solver)) is theirs


def test_in_place_changes_of_the_result_do_not_reach_the_gradient() -> None:
    x = inputs().requires_grad_()
    tight = Anderson(tol=1e-12)

    def gradient(in_place: bool) -> Tensor:
        z, _ = fixed_point(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x, solver=tight,
                           gradient=ImplicitGradient(tight))  # fmt: skip
        z = z.mul_(3) if in_place else z * 3
        return torch.autograd.grad(z.sum(), x)[0]

    assert torch.equal(gradient(in_place=True), gradient(in_place=False))


@pytest.mark.parametrize("module", [nn.BatchNorm1d(3), nn.Dropout(0.5)], ids=["batch_norm", "dropout"])
@pytest.mark.parametrize("method", [False, True])
def test_cells_that_change_are_refused_by_the_function_too(module: nn.Module, method: bool) -> None:
    cell = nn.Sequential(nn.Linear(3, 3), module).train()
    with pytest.raises(ValueError, match="the cell holds a"):
        fixed_point(cell.forward if method else cell, torch.zeros(2, 3))
    cell.eval()
    fixed_point(cell.forward if method else cell, torch.zeros(2, 3), on_failure="ignore")


def test_an_unrolled_solve_that_starts_at_the_solution_has_the_gradient_of_one_step() -> None:
    """Row 0 starts at its solution, so no step of it is recorded."""
    p = tanh_problem()
    with torch.no_grad():
        z, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=Anderson(tol=1e-13, max_steps=200))
    z0 = torch.cat([z[:1], p.z0[1:]])
    start, (x,) = z0.clone(), p.inputs
    found, report = fixed_point(
        p.cell, start, x, solver=FixedPointIteration(tol=1e-9, max_steps=200), gradient=UnrolledGradient()
    )
    assert report.steps[0] == 0
    (gradient,) = torch.autograd.grad(found[0].sum(), x)
    (expected,) = torch.autograd.grad(p.cell(z, x)[0].sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-12)
    assert gradient[0].abs().min() > 0


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: DEQ(lambda z, x: z), TypeError, "takes a module with"),  # type: ignore[arg-type]
        (lambda: DEQ(nn.Linear(3, 3))(torch.zeros(2, 3)), TypeError, "has no method initial_state"),
        (lambda: fixed_point(torch.tanh, torch.zeros(2, 3), trajectory=4), TypeError, "numbers of updates"),  # type: ignore[call-overload]
        (lambda: jacobian_penalty(torch.tanh, torch.zeros(2, 3), probes=2.5), ValueError, "an integer >= 1"),  # type: ignore[arg-type]
    ],
    ids=["function", "no initial state", "one step", "probes"],
)
def test_what_is_given_and_what_was_expected(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_the_penalty_says_that_it_differentiates() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
        jacobian_penalty(torch.tanh, torch.zeros(2, 3))


@pytest.mark.parametrize("module", [nn.MultiheadAttention(4, 2, dropout=0.1), nn.LSTM(4, 4, 2, dropout=0.1)])
def test_dropout_inside_of_torchs_modules_is_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="it draws a new mask at each evaluation"):
        fixed_point(nn.Sequential(module), torch.zeros(2, 3, 4))

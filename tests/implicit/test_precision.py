"""Narrow states and autocast: solver arithmetic stays in float32, and no parameter loses its gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.problems import METHODS, SOLVERS, Method, contraction, generator, tanh_problem
from zoo.implicit import DEQ, Anderson, ImplicitGradient, Newton, PhantomGradient, Solver, UnrolledGradient, fixed_point
from zoo.tanh import TanhCell, TanhDEQ

GRADIENTS = {
    **{f"implicit-{name}": ImplicitGradient(replace(solver, tol=2e-3)) for name, solver in SOLVERS.items()},
    "phantom": PhantomGradient(20),
    "unrolled": UnrolledGradient(),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def cell_and_input(width: int = 16, batch: int = 4) -> tuple[TanhCell, Tensor]:
    cell = TanhCell(width)
    with torch.no_grad():
        cell.linear.weight.copy_(contraction(width, 0.7))
    return cell, torch.randn(batch, width, generator=generator(1)).requires_grad_()


def relative_error(found: Tensor, reference: Tensor) -> float:
    found, reference = found.detach().double(), reference.detach().double()
    return float((found - reference).norm() / reference.norm())


# ------------------------------------------------------------------------------------------------------- narrow states


@narrow
@every_solver
@every_gradient
def test_a_narrow_state_is_solved_and_comes_back_narrow(solver: Any, gradient: Any, dtype: torch.dtype) -> None:
    cell, x = cell_and_input()
    exact, _ = DEQ(cell, Newton(tol=1e-6))(x)
    (reference,) = torch.autograd.grad(exact.sum(), x)
    cell, x = cell.to(dtype), x.detach().to(dtype).requires_grad_()
    z, report = DEQ(cell, replace(solver, tol=1e-2), gradient, on_failure="ignore")(x)
    assert z.dtype == dtype
    assert report.residual.dtype == torch.float32
    assert relative_error(z, exact) < 0.03
    z.sum().backward()
    assert x.grad is not None
    assert cell.linear.weight.grad is not None
    assert x.grad.dtype == cell.linear.weight.grad.dtype == dtype
    assert relative_error(x.grad, reference) < 0.05


@narrow
def test_a_narrow_state_is_the_state_that_f_saw(dtype: torch.dtype) -> None:
    """Iterates are rounded before f sees them, so the residual is that of what is returned."""
    seen = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.append(z)
        return 0.5 * z + x

    x = torch.randn(2, 3, generator=generator(0)).to(dtype)
    z, report = fixed_point(f, torch.zeros_like(x), x, solver=Anderson(tol=1e-2))
    assert report.converged.all()
    assert all(state.dtype == dtype for state in seen)
    assert any(torch.equal(z[0], state[0]) for state in seen)


# ------------------------------------------------------------------------------------------------------------ autocast


def autocast_deq(
    cell: Any, x: Tensor, solver: Solver, gradient: Any, on_failure: Any = "warn"
) -> tuple[Tensor, list[Tensor]]:
    """z* in autocast, and d sum(z^2) of input and parameters by a backward pass outside autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = DEQ(cell, solver, gradient, on_failure=on_failure)(x)
    return z.detach(), list(torch.autograd.grad(z.square().sum(), [x, *cell.parameters()]))


@every_solver
@every_gradient
def test_in_autocast_gradients_are_within_two_percent(solver: Any, gradient: Any) -> None:
    """Of input and of parameters, which autocast's cache of weights made under no_grad would rob of theirs."""
    cell, x = cell_and_input()
    exact, _ = DEQ(cell, Newton(tol=1e-6), ImplicitGradient(Newton(tol=1e-6)))(x)
    references = torch.autograd.grad(exact.square().sum(), [x, *cell.parameters()])
    z, found = autocast_deq(cell, x, replace(solver, tol=1e-3), gradient, on_failure="ignore")
    assert z.dtype == torch.float32
    assert relative_error(z, exact) < 0.02
    for ours, reference in zip(found, references, strict=True):
        assert ours.dtype == torch.float32
        assert relative_error(ours, reference) < 0.02


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_f_runs_in_autocast_and_the_solver_does_not(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[Any]] = {"state": set(), "product": set(), "solver": set()}
    cls = type(method.solver)
    step = cls.step

    def spy(self: Any, f: Any, k: int, z: Tensor, fz: Tensor, memory: Any) -> tuple[Tensor, Any]:
        seen["solver"] |= {z.dtype, fz.dtype, torch.is_autocast_enabled("cpu")}
        return step(self, f, k, z, fz, memory)

    monkeypatch.setattr(cls, "step", spy)
    weight = nn.Parameter(contraction(4, 0.6).float())

    def f(z: Tensor, x: Tensor) -> Tensor:
        product = nn.functional.linear(z, weight)
        seen["state"].add(z.dtype)
        seen["product"].add(product.dtype)
        return torch.tanh(product) + x

    x = torch.randn(2, 4, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = fixed_point(f, torch.zeros(2, 4), x, solver=cls(tol=1e-2), gradient=method.gradient)
        assert torch.is_autocast_enabled("cpu")
    assert seen == {"state": {torch.float32}, "product": {torch.bfloat16}, "solver": {torch.float32, False}}
    assert z.dtype == torch.float32


def test_weights_that_autocast_cached_without_a_graph_get_gradients_all_the_same() -> None:
    """The same weights under no_grad first, then with gradients, in one autocast block."""
    cell, x = cell_and_input()
    deq = DEQ(cell, Anderson(tol=1e-2), ImplicitGradient(Anderson(tol=1e-2)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            deq(x)
        z, _ = deq(x)
        again, _ = deq(x)
    for state in (z, again):
        (gradient,) = torch.autograd.grad(state.sum(), cell.linear.weight)
        assert gradient.abs().max() > 0


def test_a_backward_pass_inside_autocast_is_the_same() -> None:
    cell, x = cell_and_input()
    deq = DEQ(cell, Anderson(tol=1e-2), ImplicitGradient(Anderson(tol=1e-2)))
    found = []
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, _ = deq(x)
            loss = z.square().sum()
            if inside:
                found.append(torch.autograd.grad(loss, x)[0])
        if not inside:
            found.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("own", [True, False])
def test_a_jacobian_is_computed_in_autocast_like_f(own: bool) -> None:
    """The input comes from a layer that ran in autocast, so that it is narrower than the cell's weights."""

    class Injected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.U = nn.Linear(4, 4, bias=False), nn.Linear(3, 4)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.W(z) + self.U(x))

        def jacobian(self, z: Tensor, x: Tensor) -> Tensor:
            return (1 - self.forward(z, x).square()).unsqueeze(2) * self.W.weight

    cell, encoder = Injected(), nn.Linear(5, 3)
    f = cell if own else cell.forward
    newton = Newton(tol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = encoder(torch.randn(2, 5, generator=generator(0)))
        assert x.dtype == torch.bfloat16
        z, report = fixed_point(f, torch.zeros(2, 4), x, solver=newton, gradient=ImplicitGradient(newton))
    assert report.converged.all()
    z.sum().backward()
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.abs().max() > 0


def test_the_tanh_model_keeps_its_state_in_float32() -> None:
    """Its injection is bfloat16 in autocast; a state of that dtype could not meet a tolerance of 1e-3."""
    model = TanhDEQ(in_features=12, width=16, contraction=0.7, solver=Anderson(tol=5e-3))
    states: list[Tensor] = []
    model.deq.cell.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    model.deq.on_failure = "ignore"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.rand(4, 3, 4, generator=generator(0)))
    assert {state.dtype for state in states} == {torch.float32}
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_a_model_of_narrow_weights_keeps_a_narrow_state() -> None:
    model = TanhDEQ(in_features=4, width=8, solver=Anderson(tol=3e-2), gradient=PhantomGradient()).bfloat16()
    assert model(torch.rand(2, 4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_overflowed_reaches_the_scaler(value: float) -> None:
    """Mixed float16 training scales the loss until a gradient overflows; that is no failure of the adjoint solve."""
    p = tanh_problem()
    z, _ = fixed_point(p.cell, p.z0, *p.inputs, on_failure="raise")
    g = torch.ones_like(z)
    g[1, 0] = value
    (x,) = p.inputs
    (found,) = torch.autograd.grad(z, x, g, retain_graph=True)
    assert found[1].isnan().all()
    g[1] = 1
    (expected,) = torch.autograd.grad(z, x, g)
    others = torch.tensor([0, 2])
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=0)

"""Newton: where its Jacobian comes from, and what it does where there is none to invert."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.problems import PROBLEMS, Counting, contraction, flat, generator, tanh_problem, tight
from zoo.implicit import Anderson, ImplicitGradient, Newton, SolverStatus, fixed_point
from zoo.implicit.maps import FlatMap
from zoo.implicit.state import StateView


class WithJacobian(Counting):
    """Counts the calls of the Jacobian too."""

    def __init__(self, cell: Any) -> None:
        super().__init__(cell)
        self.jacobians = 0

    def jacobian(self, z: Tensor, *inputs: Tensor) -> Tensor:
        self.jacobians += 1
        return self.f.jacobian(z, *inputs)


def test_the_cells_own_jacobian_is_used_once_a_step() -> None:
    p = tanh_problem()
    f = WithJacobian(p.cell)
    with torch.no_grad():
        _, report = fixed_point(f, p.z0, *p.inputs, solver=Newton(tol=1e-10))
    assert f.jacobians == int(report.steps.max()) > 1
    assert f.calls == report.evaluations


def test_in_the_adjoint_too_and_one_step_is_exact() -> None:
    p = tanh_problem()
    f = WithJacobian(p.cell)
    reports = []
    z, report = fixed_point(
        f, p.z0, *p.inputs, solver=Newton(), gradient=ImplicitGradient(tight(Newton())), on_adjoint=reports.append
    )
    taken = int(report.steps.max()) + 1
    assert f.jacobians == taken, "the adjoint's is taken with the forward evaluation at z*"
    z.sum().backward()
    assert f.jacobians == taken, "f may have other weights by now"
    assert reports[0].steps.tolist() == [1, 1, 1]


def test_without_a_jacobian_torch_func_gives_the_same() -> None:
    p = tanh_problem()
    R = p.weights()
    results = []
    for f in (WithJacobian(p.cell), Counting(p.cell)):
        z, report = fixed_point(f, p.z0, *p.inputs, solver=tight(Newton()), gradient=ImplicitGradient(tight(Newton())))
        results.append((z.detach(), report.steps, *torch.autograd.grad((R * z).sum(), p.leaves)))
    for own, automatic in zip(*results, strict=True):
        torch.testing.assert_close(own, automatic, rtol=0, atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_jacobian_is_the_dense_one(problem: str) -> None:
    """Of each sample, in the order of the flattened state, whatever the structure."""
    p = PROBLEMS[problem]()
    z = p.solution()
    dense = torch.autograd.functional.jacobian(p._flat_cell, z)
    blocks = torch.stack([dense[b, :, b] for b in range(z.shape[0])])
    found = FlatMap(p.cell, StateView(p.z0), p.inputs).jacobian(z)
    torch.testing.assert_close(found, blocks, rtol=0, atol=1e-12)
    assert flat(p.z0).shape == z.shape


def test_a_jacobian_of_the_wrong_shape_is_refused() -> None:
    class Wrong(Counting):
        def jacobian(self, z: Tensor, *inputs: Tensor) -> Tensor:
            return self.f.jacobian(z, *inputs)[0]

    p = tanh_problem()
    with pytest.raises(ValueError, match=r"Wrong.jacobian must return .*\(3, 4, 4\); it returned shape \(4, 4\)"):
        fixed_point(Wrong(p.cell), p.z0, *p.inputs, solver=Newton())


@pytest.mark.parametrize("own", [True, False])
def test_a_singular_sample_is_reported_and_leaves_the_others_alone(own: bool) -> None:
    """f(z) = a z + x with a = 1 has I - J = 0 and no solution."""

    class Affine:
        def __call__(self, z: Tensor, x: Tensor, a: Tensor) -> Tensor:
            return a * z + x

    class AffineWithJacobian(Affine):
        def jacobian(self, z: Tensor, x: Tensor, a: Tensor) -> Tensor:
            return a.unsqueeze(2) * torch.eye(z.shape[1], dtype=z.dtype)

    a = torch.tensor([[0.5], [1.0], [3.0]], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator(0)).requires_grad_()
    f = AffineWithJacobian() if own else Affine()
    z, report = fixed_point(
        f,
        torch.zeros(3, 2, dtype=torch.float64),
        x,
        a,
        solver=Newton(),
        gradient=ImplicitGradient(Newton()),
        on_failure="ignore",
    )
    assert report.status.tolist() == [SolverStatus.CONVERGED, SolverStatus.NON_FINITE, SolverStatus.CONVERGED]
    exact = x.detach() / (1 - a)
    torch.testing.assert_close(z.detach()[[0, 2]], exact[[0, 2]], rtol=0, atol=1e-12)
    assert not z[1].any(), "its start"
    (gradient,) = torch.autograd.grad(z[[0, 2]].sum(), x)
    torch.testing.assert_close(gradient[[0, 2]], (1 / (1 - a)).expand(3, 2)[[0, 2]], rtol=0, atol=1e-12)
    assert report.residual[1] == 1


def test_a_map_that_is_no_contraction_is_solved() -> None:
    """Spectral norm 3 and saturated nowhere: plain iteration and Anderson's descent have no guarantee here."""
    W = contraction(4, 3.0, seed=5)
    x = 0.1 * torch.randn(3, 4, dtype=torch.float64, generator=generator(6)).requires_grad_()

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.sin(z @ W.mT) + x

    z, report = fixed_point(
        f, torch.zeros_like(x), x, solver=tight(Newton()), gradient=ImplicitGradient(tight(Newton()))
    )
    assert report.steps.max() <= 8
    torch.testing.assert_close(f(z, x), z, rtol=0, atol=1e-12)
    assert torch.linalg.eigvals(torch.cos(z[0].detach() @ W.mT).unsqueeze(1) * W).abs().max() > 1
    assert torch.autograd.gradcheck(
        lambda x: fixed_point(
            f, torch.zeros_like(x), x, solver=tight(Newton()), gradient=ImplicitGradient(tight(Newton()))
        )[0],
        x.detach().requires_grad_(),
    )


def test_convergence_is_quadratic() -> None:
    p = tanh_problem()
    _, report = fixed_point(p.cell, p.z0, *p.inputs, solver=tight(Newton()), trace=True)
    trace = report.trace
    assert trace is not None
    for b in range(3):
        rows = trace[: int(report.steps[b]) + 1, b].tolist()
        near = [(before, after) for before, after in pairwise(rows) if before < 0.1]
        assert near
        assert all(after <= 2 * before**2 + 1e-15 for before, after in near)


def test_other_adjoint_solvers_serve_a_newton_solve() -> None:
    p = tanh_problem()
    R = p.weights()
    z, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=tight(Newton()), gradient=ImplicitGradient(tight(Anderson())))
    for ours, dense in zip(torch.autograd.grad((R * z).sum(), p.leaves), p.dense_gradients(R), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)

"""GMRES and BiCGSTAB for adjoint equations: dense solves, counts of products, and the ways in which they break down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.problems import contraction, generator, slow_symmetric, tanh_problem, tight
from zoo.implicit import (
    DEQ,
    GMRES,
    Anderson,
    BiCGSTAB,
    Broyden,
    FixedPointIteration,
    ImplicitGradient,
    Newton,
    Solver,
    SolverReport,
    fixed_point,
)
from zoo.implicit.driver import solve

KRYLOV: dict[str, Solver] = {"gmres": GMRES(), "gmres_restarting": GMRES(restart=4), "bicgstab": BiCGSTAB()}
thorough = settings(deadline=None, derandomize=True, database=None)
every_krylov = pytest.mark.parametrize("solver", KRYLOV.values(), ids=KRYLOV)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Affine:
    """u -> A u + g with a matrix A for each sample, as an adjoint solve sees it; it counts its products."""

    def __init__(self, A: Tensor, g: Tensor) -> None:
        self.A = A  # (B, N, N)
        self.offset = g  # (B, N)
        self.calls = 0

    def __call__(self, u: Tensor) -> Tensor:
        self.calls += 1
        return torch.bmm(self.A, u.unsqueeze(2)).squeeze(2) + self.offset

    def jacobian(self, u: Tensor) -> Tensor:
        return self.A

    def project(self, u: Tensor) -> Tensor:
        return u

    def select(self, index: Tensor) -> Affine:
        raise NotImplementedError

    def solve(self, solver: Solver) -> tuple[Tensor, SolverReport]:
        """As ``ImplicitGradient`` does it: from u = g, to a residual relative to ||g||."""
        u, report, _ = solve(self, self.offset, solver, scale=self.offset.norm(dim=1))
        assert report.evaluations == self.calls
        return u, report

    def exact(self) -> Tensor:
        """(I - A)^-1 g."""
        eye = torch.eye(self.A.shape[1], dtype=torch.float64)
        u: Tensor = torch.linalg.solve(eye - self.A.double(), self.offset.double())
        return u

    def residual(self, u: Tensor) -> Tensor:
        """``(B,)`` ||A u + g - u|| / ||g||."""
        Au = torch.bmm(self.A, u.unsqueeze(2)).squeeze(2)
        return torch.div((Au + self.offset - u).norm(dim=1), self.offset.norm(dim=1))


def random_affine(batch: int, size: int, norm: float, seed: int = 0) -> Affine:
    A = torch.stack([contraction(size, norm, seed + b) for b in range(batch)])
    return Affine(A, torch.randn(batch, size, dtype=torch.float64, generator=generator(seed + 99)))


# -------------------------------------------------------------------------------------------------- as forward solvers


@every_krylov
def test_they_solve_no_forward_equation(solver: Solver) -> None:
    name = type(solver).__name__
    expected = rf"{name} solves linear equations, so it is for adjoint solves: gradient=ImplicitGradient\({name}"
    with pytest.raises(ValueError, match=expected):
        fixed_point(torch.cos, torch.zeros(2, 3), solver=solver)
    with pytest.raises(ValueError, match=expected):
        DEQ(tanh_problem().cell, solver)


# ---------------------------------------------------------------------------------------------------------- solutions


@every_krylov
@thorough
@given(size=st.integers(1, 8), batch=st.integers(1, 4), norm=st.floats(0, 0.9), seed=st.integers(0, 10**6))
def test_contractions_are_solved(solver: Solver, size: int, batch: int, norm: float, seed: int) -> None:
    f = random_affine(batch, size, norm, seed)
    u, report = f.solve(replace(solver, tol=1e-11, max_steps=500))
    assert report.converged.all()
    torch.testing.assert_close(u, f.exact(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("cell_radius", [0.7, 0.99])
@every_krylov
def test_the_adjoint_of_a_cell_is_that_of_a_dense_solve(solver: Solver, cell_radius: float) -> None:
    W = slow_symmetric(12, cell_radius)
    x = torch.randn(3, 12, dtype=torch.float64, generator=generator(1)).requires_grad_()
    g = torch.randn(3, 12, dtype=torch.float64, generator=generator(2))
    reports: list[SolverReport] = []
    z, _ = fixed_point(
        lambda z, x: torch.tanh(z @ W.mT) + x,
        torch.zeros_like(x),
        x,
        solver=tight(Anderson()),
        gradient=ImplicitGradient(replace(solver, tol=1e-11, max_steps=300)),
        on_adjoint=reports.append,
    )
    (u,) = torch.autograd.grad(z, x, g)  # df/dx = I
    J = (1 - torch.tanh(z.detach() @ W.mT).square()).unsqueeze(2) * W
    expected = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - J.mT, g)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-9)
    assert reports[0].converged.all()


@pytest.mark.parametrize("restart", [12, 40])
def test_gmres_needs_no_contraction(restart: int) -> None:
    """Eigenvalues of modulus up to 30, on both sides; plain iteration has no chance."""
    Q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator(3)))
    eigenvalues = torch.tensor([-30.0, -8, -3, -2, -1, 0, 0.5, 2, 3, 4, 9, 20], dtype=torch.float64)
    g = torch.randn(3, 12, dtype=torch.float64, generator=generator(4))
    f = Affine((Q @ torch.diag(eigenvalues) @ Q.mT).expand(3, -1, -1), g)
    _, plain = f.solve(FixedPointIteration())
    assert not plain.converged.any()
    f.calls = 0
    u, report = f.solve(GMRES(restart=restart, tol=1e-10))
    assert report.converged.all()
    torch.testing.assert_close(u, f.exact(), rtol=0, atol=1e-8)


def test_a_cell_that_expands_has_its_gradient() -> None:
    """z = x - 3 sin z / 2: f expands where cos z is near 1, and the equilibrium is as differentiable as any other."""
    x = torch.tensor([[0.1, -0.2], [0.3, 0.05]], dtype=torch.float64, requires_grad=True)
    z, _ = fixed_point(
        lambda z, x: x - 1.5 * torch.sin(z),
        torch.zeros_like(x),
        x,
        solver=Newton(tol=1e-13),
        gradient=ImplicitGradient(GMRES(tol=1e-12)),
    )
    (found,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(found, 1 / (1 + 1.5 * torch.cos(z.detach())), rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------- counts


def dense_minimal_residuals(f: Affine, products: int) -> list[float]:
    """After k products, the worst sample's ||r|| / ||g||, minimal over u in g + span(r0, M r0, ..., M^(k-1) r0).

    An orthonormal basis of the images M K_k, by QR, tells: what is left of r0 outside of it is the residual.
    """
    M = torch.eye(f.A.shape[1], dtype=torch.float64) - f.A
    r = f.offset - torch.bmm(M, f.offset.unsqueeze(2)).squeeze(2)
    worst = [float((r.norm(dim=1) / f.offset.norm(dim=1)).max())]
    K = r.unsqueeze(2) / r.norm(dim=1)[:, None, None]  # an orthonormal basis of the Krylov space
    for _ in range(products):
        Q, _ = torch.linalg.qr(M @ K)
        left = r - torch.bmm(Q, torch.bmm(Q.mT, r.unsqueeze(2))).squeeze(2)
        worst.append(float((left.norm(dim=1) / f.offset.norm(dim=1)).max()))
        K, _ = torch.linalg.qr(torch.cat((K, M @ K[:, :, -1:]), dim=2))
    return worst


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("norm", [0.9, 1.8])
@pytest.mark.parametrize("seed", range(3))
def test_full_gmres_takes_as_many_products_as_are_needed(seed: int, norm: float, tol: float) -> None:
    """No method that sees only products can do with fewer; and one evaluation at the start, one that verifies."""
    f = random_affine(4, 30, norm, seed)
    best = dense_minimal_residuals(f, 30)
    needed = next(k for k, residual in enumerate(best) if residual <= 0.99 * tol)
    u, report = f.solve(GMRES(restart=30, tol=tol))
    assert report.evaluations == 1 + needed + 1
    assert (f.residual(u) <= tol).all()


@pytest.mark.parametrize("restart", [1, 2, 5, 11])
def test_restarting_takes_more_products_and_ends_at_the_same(restart: int) -> None:
    f = random_affine(4, 30, 0.8)
    _, full = f.solve(GMRES(restart=30, tol=1e-8))
    f.calls = 0
    u, report = f.solve(GMRES(restart=restart, tol=1e-8, max_steps=300))
    assert report.converged.all()
    assert report.evaluations > full.evaluations
    torch.testing.assert_close(u, f.exact(), rtol=0, atol=1e-6)


@every_krylov
@pytest.mark.parametrize("max_steps", range(14))
def test_the_budget_is_kept_and_the_residual_is_the_true_one(solver: Solver, max_steps: int) -> None:
    """Wherever it cuts a cycle, the iterate is formed and looked at; more products never make it worse."""
    f = random_affine(3, 20, 1.1)
    u, report = f.solve(replace(solver, tol=1e-13, max_steps=max_steps))
    assert f.calls == max_steps + 1
    assert not report.converged.any()
    torch.testing.assert_close(report.residual, f.residual(u), rtol=1e-9, atol=1e-12)
    assert (report.residual <= f.residual(f.offset) * (1 + 1e-9)).all()


def test_a_cycle_that_is_cut_is_not_lost() -> None:
    """Evaluation 6 ends the first cycle; two products more make a better iterate."""
    residuals = [
        float(f.solve(GMRES(restart=5, tol=1e-13, max_steps=max_steps))[1].residual.max())
        for max_steps, f in ((6, random_affine(3, 20, 0.9)), (9, random_affine(3, 20, 0.9)))
    ]
    assert residuals[1] < 0.9 * residuals[0]


@every_krylov
@thorough
@given(seed=st.integers(0, 10**6), exponent=st.floats(-6, -1), max_steps=st.integers(0, 40))
def test_what_is_reported_is_what_is_returned(solver: Solver, seed: int, exponent: float, max_steps: int) -> None:
    """In float32, where recursive residuals drift from the true ones first."""
    f = random_affine(3, 10, 0.95, seed)
    f.A, f.offset = f.A.float(), f.offset.float()
    tol = 10**exponent
    u, report = f.solve(replace(solver, tol=tol, max_steps=max_steps))
    torch.testing.assert_close(report.residual, f.residual(u), rtol=1e-2, atol=1e-6)
    assert report.converged.tolist() == (report.residual <= tol).tolist()
    assert f.calls <= max_steps + 1


@every_krylov
def test_the_report_of_a_backward_pass_counts_its_products(solver: Solver) -> None:
    p = tanh_problem()
    products = 0

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return g

    reports: list[SolverReport] = []
    (x,) = p.inputs
    z, _ = fixed_point(
        lambda z, x: p.cell(Count.apply(z), x),
        p.z0,
        x,
        solver=tight(Anderson()),
        gradient=ImplicitGradient(replace(solver, tol=1e-9, max_steps=200)),
        on_adjoint=reports.append,
    )
    torch.autograd.grad(z.sum(), x)
    (report,) = reports
    assert products == report.evaluations, "that of x itself does not pass z"
    assert report.row_evaluations == report.evaluations * x.shape[0]


# ------------------------------------------------------------------------------------------------ ways of breaking down


SIZE = 6


def breakdowns(names: Sequence[str], dtype: torch.dtype) -> Affine:
    g = torch.randn(len(names), SIZE, dtype=torch.float64, generator=generator(5))
    rows = []
    for b, name in enumerate(names):
        noise = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator(b + 10))
        rows.append(
            {
                "zero": torch.zeros(SIZE, SIZE, dtype=torch.float64),
                "half": 0.5 * torch.eye(SIZE, dtype=torch.float64),
                "rank one": 0.1 * torch.outer(noise[0], noise[1]),
                "nilpotent": torch.diag(torch.ones(SIZE - 1, dtype=torch.float64), 1),
                "no gradient": contraction(SIZE, 0.8),
                "hard": slow_symmetric(SIZE, 0.95),
                "skew": torch.eye(SIZE, dtype=torch.float64) - (noise - noise.mT),
            }[name]
        )
        if name == "no gradient":
            g[b] = 0
    return Affine(torch.stack(rows).to(dtype), g.to(dtype))


EASY = ["zero", "half", "rank one", "nilpotent", "no gradient"]


@both_dtypes
@every_krylov
def test_rows_that_are_done_stay_exact_while_others_go_on(solver: Solver, dtype: torch.dtype) -> None:
    f = breakdowns([*EASY, "hard"], dtype)
    tol = 1e-11 if dtype is torch.float64 else 2e-6
    u, report = f.solve(replace(solver, tol=tol, max_steps=400))
    assert report.converged.all()
    assert u.isfinite().all()
    error = (u - f.exact()).abs().amax(dim=1)
    assert (error[:-1] <= 20 * tol).all()
    assert error[-1] <= 200 * tol, "its condition is 39"
    torch.testing.assert_close(u[0], f.offset[0], rtol=0, atol=0)
    assert not u[EASY.index("no gradient")].any()
    assert report.steps[0] == 0


@both_dtypes
@pytest.mark.parametrize("name", EASY)
@every_krylov
def test_rows_that_are_done_stay_exact_without_any_tolerance(solver: Solver, name: str, dtype: torch.dtype) -> None:
    """The Krylov space is exhausted, and rounding is all that further steps are made of."""
    f = breakdowns([name, "hard"], dtype)
    u, report = f.solve(replace(solver, tol=0, max_steps=60))
    assert u.isfinite().all()
    assert not report.residual.isnan().any()
    torch.testing.assert_close(u[0].double(), f.exact()[0], rtol=0, atol=100 * torch.finfo(dtype).eps)


@both_dtypes
@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_rows_that_are_done_cost_their_batch_mates_nothing(tol: float, dtype: torch.dtype) -> None:
    """In one long cycle: what rounding makes of an exhausted Krylov space must not undo the row's solution."""
    size, small = 40, breakdowns(EASY, torch.float64)
    A = torch.zeros(len(EASY) + 1, size, size, dtype=torch.float64)
    A[:-1, :SIZE, :SIZE] = small.A
    A[-1] = slow_symmetric(size, 0.99)
    g = torch.randn(len(EASY) + 1, size, dtype=torch.float64, generator=generator(6))
    g[EASY.index("no gradient")] = 0
    f, alone = Affine(A.to(dtype), g.to(dtype)), Affine(A[-1:].to(dtype), g[-1:].to(dtype))
    solver = GMRES(restart=size, tol=tol, max_steps=100)
    u, report = f.solve(solver)
    _, report_alone = alone.solve(solver)
    assert report.evaluations == report_alone.evaluations
    assert report.converged.all()
    torch.testing.assert_close(u[:-1].double(), f.exact()[:-1], rtol=0, atol=1e-5)


@both_dtypes
def test_gmres_solves_a_skew_system(dtype: torch.dtype) -> None:
    """All eigenvalues of I - A are imaginary: residuals do not fall at every second product at all."""
    f = breakdowns([*EASY, "skew"], dtype)
    tol = 1e-10 if dtype is torch.float64 else 1e-5
    u, report = f.solve(GMRES(tol=tol))
    assert report.converged.all()
    torch.testing.assert_close(u.double(), f.exact(), rtol=0, atol=50 * tol)


@both_dtypes
def test_bicgstab_on_a_skew_system_says_that_it_failed(dtype: torch.dtype) -> None:
    """Omega is zero there, so it is the wrong tool; its batch mates do not notice."""
    f = breakdowns([*EASY, "skew"], dtype)
    tol = 1e-10 if dtype is torch.float64 else 1e-5
    u, report = f.solve(BiCGSTAB(tol=tol))
    assert report.converged.tolist() == [True] * len(EASY) + [False]
    assert u.isfinite().all()
    assert report.residual.isfinite().all()
    torch.testing.assert_close(u[:-1].double(), f.exact()[:-1], rtol=0, atol=50 * tol)


small_integers = st.integers(-1, 1).map(float)


@every_krylov
@both_dtypes
@thorough
@given(data=st.data(), batch=st.integers(1, 3), size=st.integers(1, 4))
def test_exact_breakdowns_make_no_nan(
    solver: Solver, dtype: torch.dtype, data: st.DataObject, batch: int, size: int
) -> None:
    """Entries of -1, 0 and 1: products that vanish exactly, and singular systems, which have no solution."""
    entries = data.draw(
        st.lists(small_integers, min_size=batch * size * (size + 1), max_size=batch * size * (size + 1))
    )
    block = torch.tensor(entries, dtype=dtype).view(batch, size, size + 1)
    f = Affine(block[:, :, :-1].contiguous(), block[:, :, -1].contiguous())
    solver = replace(solver, tol=1e-4, max_steps=30)
    u, report = f.solve(solver)
    assert u.isfinite().all()
    assert report.residual.isfinite().all()
    assert report.converged.tolist() == [
        not g.any() or bool(r <= 1e-4) for g, r in zip(f.offset, f.residual(u), strict=True)
    ]


@both_dtypes
@thorough
@given(data=st.data(), size=st.integers(1, 4))
def test_gmres_solves_every_regular_system(dtype: torch.dtype, data: st.DataObject, size: int) -> None:
    """In a cycle as long as the system is large, whatever happens on the way."""
    entries = data.draw(st.lists(small_integers, min_size=size * (size + 1), max_size=size * (size + 1)))
    block = torch.tensor(entries, dtype=dtype).view(1, size, size + 1)
    f = Affine(block[:, :, :-1].contiguous(), block[:, :, -1].contiguous())
    if not torch.linalg.det(torch.eye(size) - f.A[0].float()).abs() > 0.5:  # an integer, by the way
        return
    _, report = f.solve(GMRES(tol=1e-4, restart=size, max_steps=size + 1))
    assert report.converged.all()


@every_krylov
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(solver: Solver, bad: float) -> None:
    f = breakdowns(["hard", "half", "rank one"], torch.float64)
    f.A[1, 0, 0] = bad
    u, report = f.solve(replace(solver, tol=1e-10, max_steps=200))
    assert report.converged.tolist() == [True, False, True]
    f.A[1] = 0
    torch.testing.assert_close(u[[0, 2]], f.exact()[[0, 2]], rtol=0, atol=1e-7)
    assert u.isfinite().all()


@pytest.mark.parametrize("adjoint", [GMRES(), BiCGSTAB(), Anderson(), Broyden()], ids=lambda s: type(s).__name__)
def test_a_singular_adjoint_has_not_converged(adjoint: Solver) -> None:
    """I - J has no inverse, so u grows until g is lost in rounding, where the difference of iterates is 0."""
    J = torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1, 0.3, 0.4]))
    x = torch.zeros(2, 6, requires_grad=True)
    z, _ = fixed_point(
        lambda z, x: z @ J + x,
        torch.zeros(2, 6),
        x,
        gradient=ImplicitGradient(replace(adjoint, max_steps=60)),
        on_failure="ignore",
        on_adjoint=(reports := []).append,
    )
    z.sum().backward()
    assert not reports[0].converged.any()

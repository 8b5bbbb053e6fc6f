"""The solve as a graph: its steps and rules, with the loop operator as the loop that it stands for.

Whether torch and ONNX hold that operator is the matter of tests/zoo/test_export.py: tracing takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.problems import PROBLEMS, contraction, generator, slow_symmetric
from zoo.implicit import GMRES, Anderson, Broyden, FixedPointIteration, Newton, Solver, unroll
from zoo.implicit.driver import solve as solve_in_driver
from zoo.implicit.elimination import solve_definite, solve_pivoting
from zoo.implicit.exported import apply, solve
from zoo.implicit.exported_steps import steps_of
from zoo.implicit.maps import FlatMap
from zoo.implicit.state import StateView

SOLVERS: dict[str, Solver] = {
    "iteration": FixedPointIteration(),
    "damped_iteration": FixedPointIteration(damping=0.7, check_every=1),
    "anderson": Anderson(),
    "anderson_wrapping": Anderson(memory=4),
    "anderson_mixing_always": Anderson(memory=3, mix_every=1, damping=0.9),
    "anderson_type_1": Anderson(kind=1, memory=6),
    "anderson_type_1_damped": Anderson(kind=1, memory=4, mix_every=1, damping=0.8),
    "anderson_without_memory": Anderson(kind=1, memory=1, mix_every=1),
    "broyden": Broyden(),
    "broyden_sliding": Broyden(memory=3),
}


@pytest.fixture(autouse=True)
def plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def while_loop(goes_on: Callable[..., Any], body: Callable[..., Any], state: tuple[Tensor, ...]) -> Any:
        while goes_on(*state):
            before = [(x.shape, x.dtype) for x in state]
            state = body(*state)
            assert [(x.shape, x.dtype) for x in state] == before
        return state

    monkeypatch.setattr(torch, "while_loop", while_loop)


def both(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Solver) -> tuple[Tensor, Any]:
    """The result of a graph, which is that of the driver."""

    class Map(FlatMap):
        def __call__(self, z: Tensor) -> Tensor:
            return f(z)

    with torch.no_grad():
        wanted, report = solve_in_driver(Map(f, StateView(z0), ()), z0, solver)[:2]
        found, said = solve(f, z0, solver)
    assert said.steps.tolist() == report.steps.tolist()
    assert said.converged.tolist() == report.converged.tolist()
    torch.testing.assert_close(said.residual, report.residual, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    return found, said


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("norm", ["relative", "absolute"])
def test_a_graph_solves_as_the_driver_does(name: str, problem: str, norm: Any) -> None:
    cell, z0, inputs = PROBLEMS[problem](5)
    view = StateView(z0)
    f = FlatMap(cell, view, inputs)
    _, report = both(f, view.flatten(z0), replace(SOLVERS[name], tol=1e-6, norm=norm, max_steps=80))
    assert report.converged.all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("max_steps", [0, 1, 2, 7])
def test_so_it_does_where_steps_run_out(name: str, max_steps: int) -> None:
    A = slow_symmetric(6, 0.98)
    b = torch.randn(3, 6, dtype=torch.float64, generator=generator(0))
    _, report = both(lambda z: z @ A + b, torch.zeros_like(b), replace(SOLVERS[name], tol=1e-9, max_steps=max_steps))
    assert not report.converged.any()


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_that_fail_run_away_or_have_converged_change_nothing_for_the_others(name: str) -> None:
    A = contraction(4, 0.7)
    b = torch.randn(4, 4, dtype=torch.float64, generator=generator(1))
    growth = torch.tensor([[1.0], [1.0], [3.0], [1.0]], dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        value = (z @ A) * growth + b
        broken = (value[1:2] / 0).where(z[1:2].abs().amax() > 0, value[1:2])  # from the second evaluation on
        return torch.cat([value[:1], broken, value[2:]])

    z0 = torch.zeros_like(b)
    z0[3] = torch.linalg.solve(torch.eye(4, dtype=z0.dtype) - A.mT, b[3])
    z, report = both(f, z0, replace(SOLVERS[name], tol=1e-6, max_steps=40))
    assert z.isfinite().all()
    assert report.converged[[0, 3]].all()
    assert report.steps[3] == 0
    assert not report.converged[1]
    alone, _ = solve(lambda z: z @ A + b[:1], z0[:1], replace(SOLVERS[name], tol=1e-6, max_steps=40))
    torch.testing.assert_close(z[:1], alone)


@pytest.mark.parametrize("norm", ["relative", "absolute"])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_map_that_is_not_finite_from_the_start_is_told_as_infinite(start: float, norm: Any) -> None:
    z0 = torch.full((2, 3), start, dtype=torch.float64)
    z, report = both(lambda z: z / 0, z0, Anderson(norm=norm))
    assert report.residual.isinf().all()
    assert torch.equal(z, z0)


def test_f_is_not_shown_a_sample_that_failed_before() -> None:
    seen = []

    def f(z: Tensor) -> Tensor:
        seen.append(z)
        return torch.cat([z[:1] / 0, 0.5 * z[1:] + 1])

    solver = FixedPointIteration(check_every=1)
    _, report = solve(f, torch.ones(2, 3, dtype=torch.float64), solver)
    assert report.converged.tolist() == [False, True]
    assert all(torch.equal(z[0], seen[0][0]) for z in seen)
    assert len(seen) == report.steps[1] + 1


def test_an_unrolled_cell_is_judged_as_unroll_does() -> None:
    cell, z0, inputs = PROBLEMS["tanh"](3)
    for steps in (1, 4, 60):
        solver = Anderson(tol=1e-5)
        with torch.no_grad():
            wanted, report = unroll(cell, z0, *inputs, steps=steps, solver=solver)
            z, said = apply(lambda z: cell(z, *inputs), z0, steps, solver)
        assert torch.equal(z, wanted)
        for name, value in said._asdict().items():
            assert torch.equal(value, getattr(report, name))
    assert said.converged.all()


@pytest.mark.parametrize("solver", [Newton(), GMRES(), Anderson(bfloat16_until=5e-3)])
def test_what_has_no_form_as_a_graph_is_refused(solver: Solver) -> None:
    with pytest.raises(ValueError, match=r"[Ee]xport with"):
        steps_of(solver)


# ------------------------------------------------------------------------------------------------- small linear systems


@settings(deadline=None)
@given(
    m=st.integers(1, 30),
    count=st.integers(0, 30),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.integers(-12, 12),
)
def test_elimination_solves_as_torch_does(m: int, count: int, seed: int, dtype: torch.dtype, scale: int) -> None:
    count = min(m, count)
    some = torch.arange(m) < count
    A = torch.randn(3, m, m, dtype=torch.float64, generator=generator(seed)) * some * some.unsqueeze(1)
    b = torch.randn(3, m, dtype=torch.float64, generator=generator(seed + 1)) * some
    rest = torch.diag((~some).double())
    x = solve_pivoting((10.0**scale * A + rest).to(dtype), b.to(dtype), torch.tensor(count)).double() * 10.0**scale
    residual = (A @ x.unsqueeze(2)).squeeze(2) - b  # backward stable, whatever the condition of A
    size = torch.linalg.matrix_norm(A) * x.norm(dim=1) + b.norm(dim=1)
    assert (residual.norm(dim=1) <= 1e4 * torch.finfo(dtype).eps * size).all()

    definite = A @ A.mT + rest + 0.1 * torch.eye(m)
    x, found = solve_definite(definite.to(dtype), b.to(dtype), torch.tensor(count))
    assert found.all()
    torch.testing.assert_close(
        x.double(), torch.linalg.solve(definite, b), rtol=0.1, atol=2e-3 if dtype == torch.float32 else 1e-9
    )


def test_a_singular_matrix_has_no_finite_solution_and_an_indefinite_one_is_told() -> None:
    A = torch.eye(3).repeat(3, 1, 1)
    A[1, :, 1] = 0
    A[2, 1, 1] = -1
    x = solve_pivoting(A, torch.ones(3, 3), torch.tensor(3))
    assert x.isfinite().all(dim=1).tolist() == [True, False, True]
    assert solve_definite(A, torch.ones(3, 3), torch.tensor(3))[1].tolist() == [True, False, False]


def test_pivoting_is_for_matrices_with_a_zero_on_the_diagonal() -> None:
    A = torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])
    torch.testing.assert_close(
        solve_pivoting(A, torch.tensor([[2.0, 3.0]]), torch.tensor(2)), torch.tensor([[2.0, 1.0]])
    )

"""The measuring tools measure what they say, on cases that can be worked out by hand."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.clock import MIN_ROUNDS, Times, interleaved
from benchmarks.contestants import Contestant, Zoo
from benchmarks.counts import (
    Counting,
    SampleEvaluations,
    adjoint_residuals,
    backward_count,
    forward_count,
    relative_residuals,
    residual_trace,
    sample_evaluations,
)
from benchmarks.end_to_end import exact_gradient, loosest, relative_error, settings
from benchmarks.problems import LinearCell, Problem, TanhCell
from lightning_modules.memory import PeakMemory, peak_bytes
from zoo.implicit import Anderson, FixedPointIteration

PLAIN = Zoo("plain", FixedPointIteration(check_every=1))
ANDERSON = Zoo("anderson", Anderson())


def shrinking(rho: float = 0.8, batch: int = 3, size: int = 4) -> Problem:
    """z = rho z + x, whose k-th plain iterate is x (1 - rho^k) / (1 - rho)."""
    x = torch.arange(1.0, batch * size + 1, dtype=torch.float64).view(batch, size)
    cell = LinearCell(rho * torch.eye(size, dtype=torch.float64))
    return Problem("shrinking", cell, torch.zeros_like(x), (x,), lambda z: z.square().sum())


def small_tanh() -> Problem:
    g = torch.Generator().manual_seed(0)
    W = 0.25 * torch.randn(6, 6, dtype=torch.float64, generator=g)
    x, R = torch.randn(2, 3, 6, dtype=torch.float64, generator=g)
    return Problem("small", TanhCell(W), torch.zeros_like(x), (x,), lambda z: (R * z).sum())


def residual_after(k: int, rho: float = 0.8) -> float:
    """Of the k-th plain iterate."""
    return rho**k * (1 - rho) / (1 - rho ** (k + 1))


# --------------------------------------------------------------------------------------------------------------- memory

KILOBYTES = 8000  # a thousand float64


def test_memory_counts_storages_from_birth_to_death() -> None:
    x = torch.ones(1000, dtype=torch.float64)
    with PeakMemory() as memory:
        y = x + 1
        assert memory.live == KILOBYTES
        views = y.view(10, 100), y[5:]
        y += 1
        assert memory.live == KILOBYTES, "views and in-place operations have no storage of their own"
        z = y * 2
        assert memory.live == 2 * KILOBYTES
        del y
        assert memory.live == 2 * KILOBYTES, "a view keeps it alive"
        del views
        assert memory.live == KILOBYTES
        del z
        assert memory.live == 0
    assert memory.peak == 2 * KILOBYTES
    assert x.sum() == 1000, "what was there before does not count"


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_memory_of_a_graph(steps: int) -> None:
    """z <- sin z keeps every z for the backward pass, where cos z and its product come on top, and two scalars."""
    leaf = torch.ones(1000, dtype=torch.float64, requires_grad=True)

    def action() -> None:
        z = leaf
        for _ in range(steps):
            z = z.sin()
        torch.autograd.grad(z.sum(), leaf)

    assert peak_bytes(action) == (steps + 2) * KILOBYTES + 2 * 8


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_memory_without_a_graph_does_not_grow(steps: int) -> None:
    def action() -> None:
        z = torch.ones(1000, dtype=torch.float64)
        for _ in range(steps):
            z = z.sin()

    assert peak_bytes(action) == 2 * KILOBYTES


def test_memory_sees_nested_backward_passes() -> None:
    """As in an adjoint solve: autograd.grad within a backward pass."""

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            with torch.enable_grad():
                y = torch.ones(10_000, dtype=torch.float64).requires_grad_()
                (product,) = torch.autograd.grad((y * 2).sum(), y)
            return g * product[0]

    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    assert 20 * KILOBYTES <= peak_bytes(lambda: Nested.apply(x).sum().backward()) < 21 * KILOBYTES


def test_memory_of_an_action_that_fails_is_let_go() -> None:
    memory = PeakMemory()
    with pytest.raises(RuntimeError), memory:
        torch.ones(3) @ torch.ones(4)
    assert memory.live == 0
    assert torch.ones(5).sum() == 5


# ---------------------------------------------------------------------------------------------------------------- clock


class FakeClock:
    """A clock that actions move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[str] = []

    def __call__(self) -> float:
        return self.now

    def action(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def act() -> None:
            self.now += seconds(self.turns.count(name))
            self.turns.append(name)

        return act


def test_all_take_turns_in_each_round() -> None:
    clock = FakeClock()
    actions = {name: clock.action(name, lambda _: 1.0) for name in "abc"}
    times = interleaved(actions, rounds=4, clock=clock)
    assert "".join(clock.turns) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(item.seconds) for name, item in times.items()} == dict.fromkeys("abc", 4)


def test_the_first_round_does_not_count() -> None:
    clock = FakeClock()
    actions = {"a": clock.action("a", lambda k: 100.0 if k == 0 else 2.0)}
    assert interleaved(actions, rounds=5, clock=clock)["a"].seconds == [2.0] * 5


def test_the_first_round_counts_without_warming_up() -> None:
    clock = FakeClock()
    actions = {"a": clock.action("a", lambda k: 100.0 if k == 0 else 2.0)}
    assert interleaved(actions, rounds=2, warm_up=False, clock=clock)["a"].seconds == [100.0, 2.0]


def test_ratios_are_within_rounds() -> None:
    """A machine that gets four times slower half-way changes no ratio."""
    clock = FakeClock()
    slower = {
        "a": clock.action("a", lambda k: 3.0 if k < 3 else 12.0),
        "b": clock.action("b", lambda k: 1.0 if k < 3 else 4.0),
    }
    times = interleaved(slower, rounds=7, clock=clock)
    assert times["a"].ratio(times["b"]) == 3
    assert times["b"].ratio(times["a"]) == pytest.approx(1 / 3)
    assert times["a"].median == 12
    assert Times([4.0, 1.0, 9.0]).median == 4


def test_who_has_spent_its_budget_stops() -> None:
    clock = FakeClock()
    times = interleaved(
        {"slow": clock.action("slow", lambda _: 10.0), "quick": clock.action("quick", lambda _: 1.0)},
        rounds=8,
        budget=5.0,
        clock=clock,
    )
    assert len(times["slow"].seconds) == MIN_ROUNDS
    assert len(times["quick"].seconds) == 6
    assert times["slow"].ratio(times["quick"]) == 10


def test_who_is_much_too_slow_stops_at_once() -> None:
    clock = FakeClock()
    actions = {"slow": clock.action("slow", lambda _: 10.0), "quick": clock.action("quick", lambda _: 0.5)}
    times = interleaved(actions, rounds=4, budget=1.5, clock=clock)
    assert [len(times[name].seconds) for name in actions] == [1, 4]


def test_garbage_collection_is_left_as_it_was() -> None:
    assert gc.isenabled()
    seen: list[bool] = []
    interleaved({"a": lambda: seen.append(gc.isenabled())}, rounds=2)
    assert seen == [True, False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 // len(seen[:0])}, rounds=1)
    assert gc.isenabled()


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-8])
def test_forward_count_of_plain_iteration(tol: float) -> None:
    count = forward_count(PLAIN, shrinking(), tol)
    k = next(k for k in range(200) if residual_after(k) <= tol)
    assert count.number == k + 1
    assert count.residual == pytest.approx(residual_after(k), rel=1e-6)
    assert count.reached
    assert str(count) == str(k + 1)


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_backward_count_of_plain_iteration(tol: float, size: float) -> None:
    """From u = g the k-th iterate has the residual rho^(k + 1) g, and it takes one product to know."""
    problem = shrinking()
    count = backward_count(PLAIN, PLAIN, problem, problem.solution(), tol, size)
    assert count.number == math.ceil(math.log(tol) / math.log(0.8))
    assert count.residual == pytest.approx(0.8**count.number, rel=1e-6)
    assert count.reached


class Liar(Contestant):
    """Evaluates f once, and returns something else, or NaN."""

    name = "liar"

    def __init__(self, answer: float) -> None:
        self.answer = answer

    def solve(self, f: Any, problem: Problem, tol: float, max_steps: int | None = None) -> Tensor:
        return torch.full_like(f(problem.z0, *problem.inputs), self.answer)

    def equilibrium(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("answer", [7.0, math.nan])
def test_what_is_returned_is_measured(answer: float) -> None:
    count = forward_count(Liar(answer), shrinking(), 1e-3)
    assert count.number == 1
    assert not count.reached
    assert str(count) == "(1)"


def test_one_bad_sample_is_enough() -> None:
    problem = shrinking()
    z = problem.solution()
    assert float(relative_residuals(problem, z).max()) < 1e-14
    z[1, 2] += 1
    assert (relative_residuals(problem, z) > 1e-3).tolist() == [False, True, False]


def test_trace_of_plain_iteration() -> None:
    trace = residual_trace(PLAIN, shrinking(), 1e-6, max_steps=12)
    assert trace == pytest.approx([residual_after(k) for k in range(13)], rel=1e-6)


def test_trace_keeps_the_lowest() -> None:
    class Wandering(Liar):
        def solve(self, f: Any, problem: Problem, tol: float, max_steps: int | None = None) -> Tensor:
            f(problem.solution(), *problem.inputs)
            away: Tensor = f(problem.z0, *problem.inputs)
            return away

    trace = residual_trace(Wandering(0.0), shrinking(), 1e-6, 5)
    assert len(trace) == 2
    assert trace[1] == trace[0] < 1e-14


def test_adjoint_residual_of_a_dense_solve() -> None:
    problem = small_tanh()
    z = problem.solution()
    J = problem.jacobians(z)
    assert J is not None
    g = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - J.mT, g.unsqueeze(2)).squeeze(2)
    assert float(adjoint_residuals(problem, z, u, g).max()) < 1e-14
    torch.testing.assert_close(adjoint_residuals(problem, z, 0 * u, g), torch.ones(3, dtype=torch.float64))
    assert adjoint_residuals(problem, z, u / 0, g).isinf().all()


def test_counting_sees_evaluations_and_products() -> None:
    f = Counting(nn.Linear(2, 2))
    z = torch.ones(1, 2, requires_grad=True)
    fz = f(f(z))
    torch.autograd.grad(fz.sum(), z, retain_graph=True)
    torch.autograd.grad(fz.sum(), z)
    with torch.no_grad():
        f(z)
    assert (f.evaluations, f.products) == (3, 4)


def test_sample_evaluations() -> None:
    assert sample_evaluations([3, 0, 9], evaluations=10) == SampleEvaluations(whole_batch=30, per_sample=15)


# ----------------------------------------------------------------------------------------------------------- end to end


def dense_gradient(problem: Problem) -> tuple[Tensor, ...]:
    z = problem.solution().requires_grad_()
    J = problem.jacobians(z)
    assert J is not None
    (g,) = torch.autograd.grad(problem.loss(z), z)
    u = torch.linalg.solve(torch.eye(z.shape[1], dtype=torch.float64) - J.mT, g.unsqueeze(2)).squeeze(2)
    return torch.autograd.grad(problem.f(z, *problem.inputs), tuple(problem.f.parameters()), u)


def test_exact_gradient_is_the_dense_one() -> None:
    problem = small_tanh()
    assert relative_error(exact_gradient(problem, problem.solution()), dense_gradient(problem)) < 1e-9


def test_exact_gradient_takes_z_as_it_is() -> None:
    """At z = 0: J = (1 - tanh^2 x) W, g = R."""
    problem = small_tanh()
    (found,) = exact_gradient(problem, problem.z0)
    (exact,) = dense_gradient(problem)
    assert relative_error((found,), (exact,)) > 0.1
    assert found.count_nonzero() == 0, "df/dW at z = 0 is 0"


def test_relative_error() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])
    assert relative_error((a, b), (a, b)) == 0
    assert relative_error((0 * a, 0 * b), (a, b)) == 1
    assert relative_error((a + torch.tensor([1.0, 0.0]), b), (a, b)) == pytest.approx(1 / 13)


def test_loosest() -> None:
    asked: list[float] = []

    def error(tol: float) -> float:
        asked.append(tol)
        return 10 * tol

    assert loosest(error, (0.2, 0.1)) == {0.2: 2**-6, 0.1: 2**-7}
    assert asked == [2**-5, 2**-6, 2**-7], "not tighter than needed"
    assert loosest(lambda _: 1.0, (0.5,)) == {}
    assert loosest(lambda _: math.nan, (0.5,)) == {}


def test_settings_are_just_tight_enough() -> None:
    problem = small_tanh()
    exact = dense_gradient(problem)
    found = settings([(PLAIN, PLAIN), (ANDERSON, PLAIN)], problem, (1e-2, 1e-4), max_steps=200)
    assert [len(of_level) for of_level in found.values()] == [2, 2]
    for level, of_level in found.items():
        for s in of_level:
            assert s.error == pytest.approx(relative_error(s.run(problem), exact), rel=1e-6)
            assert level / 50 < s.error <= level
            assert s.evaluations == forward_count(s.forward, problem, s.tol).number
            assert s.name == f"{s.forward.name} / "
    plain, anderson = found[1e-4]
    assert plain.products == anderson.products
    assert plain.evaluations > anderson.evaluations
    assert found[1e-4][0].products > found[1e-2][0].products


def test_a_pair_that_does_not_get_there_is_left_out() -> None:
    found = settings([(PLAIN, PLAIN), (ANDERSON, ANDERSON)], small_tanh(), (1e-2, 1e-4), max_steps=10)
    assert [s.forward.name for s in found[1e-4]] == ["anderson"]
    assert len(found[1e-2]) == 2

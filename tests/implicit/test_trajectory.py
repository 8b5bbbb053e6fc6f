"""States on the way to the equilibrium: which they are, what gradients they have, and losses on them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.problems import PROBLEMS, SOLVERS, contraction, flat, generator, residual, tanh_problem, tight
from zoo.implicit import (
    DEQ,
    Anderson,
    Broyden,
    FixedPointIteration,
    ImplicitGradient,
    NeumannGradient,
    Newton,
    PhantomGradient,
    Trajectory,
    UnrolledGradient,
    correction_weights,
    fixed_point,
    fixed_point_correction,
)

thorough = settings(deadline=None, derandomize=True, database=None)
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)

W = contraction(6, 0.9)


def f(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W.mT) + x


def batch_of(rows: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 6, dtype=torch.float64, generator=generator(seed)).requires_grad_()
    return torch.zeros_like(x), x


def jacobian(z: Tensor, x: Tensor) -> Tensor:
    return (1 - torch.tanh(z @ W.mT).square()).unsqueeze(2) * W


class Recording:
    """f, which writes down where it was evaluated."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        self.seen.append(z.detach().clone())
        return f(z, x)

    def jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        return jacobian(z, x)


def damped(z: Tensor, x: Tensor, steps: int, damping: float) -> Tensor:
    for _ in range(steps):
        z = (1 - damping) * z + damping * f(z, x)
    return z


def gradient_of(state: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(state, x, torch.linspace(-1, 1, state.numel()).double().view(state.shape))
    return found


# --------------------------------------------------------------------------------------------------------- which states


@every_solver
def test_they_are_the_iterates_of_the_solver(solver: Any) -> None:
    """All solvers evaluate f at their iterates, one evaluation a step; and nobody changes them."""
    z0, x = batch_of()
    steps = [1, 2, 5, 8]
    recording = Recording()
    solver = replace(solver, tol=0, max_steps=8)
    with torch.no_grad():
        z, report = fixed_point(Recording(), z0, x, solver=solver, on_failure="ignore")
        same_z, same_report, states = fixed_point(
            recording, z0, x, solver=solver, trajectory=steps, on_failure="ignore"
        )
    assert len(recording.seen) == report.evaluations
    assert torch.equal(z, same_z)
    assert torch.equal(report.residual, same_report.residual)
    assert report.evaluations == same_report.evaluations
    for k, state in zip(steps, states, strict=True):
        if k < report.evaluations:
            assert torch.equal(state, recording.seen[k])
        else:  # Newton has a residual of 0 by then
            assert torch.equal(state, z)


@every_solver
@pytest.mark.parametrize("problem", PROBLEMS)
def test_they_have_the_structure_of_the_state(solver: Any, problem: str) -> None:
    p = PROBLEMS[problem]()
    z, _, states = fixed_point(p.cell, p.z0, *p.inputs, solver=tight(solver), trajectory=(1, 400))
    assert type(states[0]) is type(z)
    torch.testing.assert_close(flat(states[1]), flat(z), rtol=0, atol=1e-12)
    if problem != "linear" or not isinstance(solver, Newton):
        assert (flat(states[0]) - flat(z)).abs().max() > 1e-3


@every_solver
@settings(thorough, max_examples=20)
@given(steps=st.sets(st.integers(1, 40), min_size=1, max_size=5), scale=st.floats(0, 1))
def test_their_number_does_not_depend_on_the_data(solver: Any, steps: set[int], scale: float) -> None:
    """A solve that converges early has them all, with gradients; what it did not come to is in its last state."""
    z0, x = batch_of()
    cuts = sorted(steps)
    z, report, states = fixed_point(
        lambda z, x: scale * f(z, x) + (1 - scale) * x,
        z0,
        x,
        solver=replace(solver, tol=1e-2, max_steps=40),
        trajectory=cuts,
        on_failure="ignore",
    )
    assert len(states) == len(cuts)
    assert all(state.grad_fn is not None and state.shape == z.shape for state in states)
    late = [state for k, state in zip(cuts, states, strict=True) if k >= report.evaluations]
    assert all(torch.equal(state, z) for state in late)


def test_a_sample_that_has_stopped_stays_as_it_was() -> None:
    gain = torch.tensor([[0.0], [0.9]], dtype=torch.float64)
    z0, x = batch_of(2)
    solver = FixedPointIteration(tol=1e-6, max_steps=60, check_every=1)
    z, report, states = fixed_point(
        lambda z, x: gain * torch.tanh(z @ W.mT) + x, z0, x, solver=solver, trajectory=[1, 6, 12], on_failure="ignore"
    )
    assert report.steps[0] == 1
    assert report.steps[1] > 12
    for state in states:
        assert torch.equal(state[0], z[0])
        assert not torch.equal(state[1], z[1])


@pytest.mark.parametrize("sliced", [False, True])
def test_all_states_are_the_start_of_an_empty_batch(sliced: bool) -> None:
    x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    z, _, states = fixed_point(f, x.detach(), x, trajectory=Trajectory([2, 4], sliced=sliced))
    assert [state.shape for state in states] == [z.shape] * 2
    sum(state.sum() for state in [*states, z]).backward()


# ------------------------------------------------------------------------------------------------------ their gradients


@every_solver
@pytest.mark.parametrize(("steps", "damping", "advance"), [(1, 1.0, False), (3, 0.7, False), (3, 0.7, True)])
def test_each_has_the_phantom_gradient_and_the_equilibrium_its_own(
    solver: Any, steps: int, damping: float, advance: bool
) -> None:
    z0, x = batch_of()
    phantom = PhantomGradient(steps, damping, advance)
    z, _, states = fixed_point(
        f,
        z0,
        x,
        solver=tight(solver),
        gradient=ImplicitGradient(tight(Anderson())),
        trajectory=Trajectory([2, 4, 300], phantom),
    )
    with torch.no_grad():
        plain = fixed_point(f, z0, x, solver=tight(solver), trajectory=[2, 4, 300])[2]
    for state, value in zip(states, plain, strict=True):
        by_hand = damped(value, x, steps, damping)
        torch.testing.assert_close(gradient_of(state, x), gradient_of(by_hand, x), rtol=0, atol=1e-12)
        torch.testing.assert_close(state, by_hand if advance else value, rtol=0, atol=1e-14)
    J = jacobian(z, x)
    g = torch.linspace(-1, 1, z.numel()).double().view(z.shape)
    dense = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - J.detach().mT, g)
    torch.testing.assert_close(gradient_of(z, x), dense, rtol=0, atol=1e-10)


def test_one_backward_pass_through_all() -> None:
    """The sum of their gradients, parameters included."""
    p = tanh_problem()
    R = p.weights()
    deq = DEQ(p.cell, tight(Anderson()), ImplicitGradient(tight(Anderson())))
    z, _, states = deq(*p.inputs, trajectory=[2, 5])
    found = torch.autograd.grad((R * (states[0] + states[1] + z)).sum(), p.leaves)
    expected = p.dense_gradients(R)
    for state in states:
        parts = torch.autograd.grad((R * p.cell(state.detach(), *p.inputs)).sum(), p.leaves)
        expected = [a + b for a, b in zip(expected, parts, strict=True)]
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "gradient", [NeumannGradient(2), ImplicitGradient(tight(Anderson()))], ids=lambda g: str(g)[:8]
)
def test_other_gradients_of_a_state(gradient: Any) -> None:
    """Both treat the state as if it were the equilibrium: u = (I + J^T + (J^T)^2) g, or all terms of it."""
    z0, x = batch_of()
    _, _, (state,) = fixed_point(f, z0, x, solver=tight(Anderson()), trajectory=Trajectory([3], gradient))
    J = jacobian(state, x).detach()
    g = torch.linspace(-1, 1, state.numel()).double().view(state.shape)
    products = [g]
    for _ in range(2 if isinstance(gradient, NeumannGradient) else 300):
        products.append((J.mT @ products[-1].unsqueeze(2)).squeeze(2))
    torch.testing.assert_close(gradient_of(state, x), torch.stack(products).sum(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sliced", [False, True])
def test_without_gradients_there_are_states_and_no_graph(sliced: bool) -> None:
    z0, x = batch_of()
    trajectory = Trajectory([2, 4], PhantomGradient(2, advance=True), sliced)
    with torch.no_grad():
        z, _, states = fixed_point(f, z0, x, trajectory=trajectory)
    assert not any(state.requires_grad for state in [z, *states])
    expected = damped(z0, x, 2, 1.0)  # Anderson's first two evaluations: a plain step, a mix
    assert (states[0] - expected.detach()).abs().max() > 1e-6


def test_the_states_do_not_share_memory() -> None:
    """Losses may change them in place."""
    z0, x = batch_of()
    with torch.no_grad():
        z, _, states = fixed_point(f, z0, x, solver=Anderson(max_steps=40), trajectory=[1, 30, 40])
        kept = z.clone()
        for state in states:
            state.zero_()
    assert torch.equal(z, kept)


def test_an_unrolled_equilibrium_has_states_too() -> None:
    """Each has a graph of its own, which one backward pass through another does not free."""
    z0, x = batch_of()
    z, _, (state,) = fixed_point(
        f, z0, x, solver=tight(FixedPointIteration()), gradient=UnrolledGradient(), trajectory=[4]
    )
    value = damped(z0, x.detach(), 4, 1.0)
    torch.testing.assert_close(gradient_of(state, x), gradient_of(f(value, x), x), rtol=0, atol=1e-12)
    J = jacobian(z, x)
    g = torch.linspace(-1, 1, z.numel()).double().view(z.shape)
    dense = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - J.detach().mT, g)
    torch.testing.assert_close(gradient_of(z, x), dense, rtol=0, atol=1e-10)


# -------------------------------------------------------------------------------------------------------- sliced solves


@pytest.mark.parametrize("advance", [False, True])
def test_a_sliced_solve_is_the_loop_by_hand(advance: bool) -> None:
    z0, x = batch_of()
    recording = Recording()
    z, report, states = fixed_point(
        recording,
        z0,
        x,
        solver=FixedPointIteration(tol=0, max_steps=10),
        gradient=PhantomGradient(),
        trajectory=Trajectory([3, 7], PhantomGradient(2, 0.5, advance), sliced=True),
        on_failure="ignore",
    )
    at = z0
    for state, steps in zip(states, (3, 4), strict=True):
        at = damped(at, x.detach(), steps, 1.0)
        by_hand = damped(at, x, 2, 0.5)
        torch.testing.assert_close(state, by_hand if advance else at, rtol=0, atol=1e-14)
        torch.testing.assert_close(gradient_of(state, x), gradient_of(by_hand, x), rtol=0, atol=1e-13)
        at = state.detach()
    torch.testing.assert_close(z, damped(at, x.detach(), 3, 1.0), rtol=0, atol=1e-14)
    assert report.steps.tolist() == [10] * 3
    assert report.evaluations == (3 + 1) + (4 + 1) + (3 + 1)
    assert len(recording.seen) == report.evaluations + 2 * 2 + 1, "and those that gradients record"
    torch.testing.assert_close(report.residual, residual(f, z, x, norm="relative"), rtol=1e-9, atol=0)


@every_solver
def test_a_sliced_solve_ends_at_the_equilibrium(solver: Any) -> None:
    z0, x = batch_of()
    solver = tight(solver, tol=1e-12)
    with torch.no_grad():
        exact, _ = fixed_point(f, z0, x, solver=solver)
        z, report, states = fixed_point(f, z0, x, solver=solver, trajectory=Trajectory([4, 8], sliced=True), trace=True)
    assert report.converged.all()
    torch.testing.assert_close(z, exact, rtol=0, atol=1e-10)
    assert len(states) == 2
    assert report.trace is not None
    assert report.trace.shape == (report.evaluations, 3)


def test_a_slice_starts_with_an_empty_memory() -> None:
    """Two slices of Broyden's method are two solves."""
    z0, x = batch_of()
    with torch.no_grad():
        z, _, (state,) = fixed_point(
            f, z0, x, solver=Broyden(tol=0, max_steps=7), trajectory=Trajectory([3], sliced=True), on_failure="ignore"
        )
        first, _ = fixed_point(f, z0, x, solver=Broyden(tol=0, max_steps=3), on_failure="ignore")
        second, _ = fixed_point(f, first, x, solver=Broyden(tol=0, max_steps=4), on_failure="ignore")
        unsliced, _ = fixed_point(f, z0, x, solver=Broyden(tol=0, max_steps=7), on_failure="ignore")
    assert torch.equal(state, first)
    assert torch.equal(z, second)
    assert not torch.equal(z, unsliced)


# ------------------------------------------------------------------------------------------------------ beside TorchDEQ


@pytest.mark.parametrize(("grad", "tau"), [(1, 1.0), (2, 0.7)])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_torchdeq_gives_the_same_states_and_gradients(core: str, grad: int, tau: float) -> None:
    """Its fixed_point_iter, where it does not stop early; its states have all been moved on by the recorded steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in its docstrings
        torchdeq = pytest.importorskip("torchdeq")
    z0, x = batch_of()
    deq = torchdeq.get_deq(
        core=core, f_solver="fixed_point_iter", f_max_iter=12, f_tol=0.0, indexing=[4, 8], grad=grad, tau=tau
    )
    theirs, _ = deq(lambda z: f(z, x), z0)
    phantom = PhantomGradient(grad, tau, advance=True)
    z, _, states = fixed_point(
        f,
        z0,
        x,
        solver=FixedPointIteration(tol=0, max_steps=12),
        gradient=phantom,
        trajectory=Trajectory([4, 8], phantom, sliced=core == "sliced"),
        on_failure="ignore",
    )
    for mine, other in zip([*states, z], theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)
        torch.testing.assert_close(gradient_of(mine, x), gradient_of(other, x), rtol=0, atol=1e-13)


# -------------------------------------------------------------------------------------------------------------- advance


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (4, 0.6)])
def test_advance_returns_the_state_after_the_recorded_steps(steps: int, damping: float) -> None:
    """The report stays that of the solve; under no_grad nothing is recorded, and z* itself comes back."""
    z0, x = batch_of()
    solver = FixedPointIteration(tol=1e-2)
    with torch.no_grad():
        exact, exact_report = fixed_point(f, z0, x, solver=solver, gradient=PhantomGradient(steps, damping, True))
    z, report = fixed_point(f, z0, x, solver=solver, gradient=PhantomGradient(steps, damping, advance=True))
    by_hand = damped(exact, x, steps, damping)
    torch.testing.assert_close(z, by_hand, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient_of(z, x), gradient_of(by_hand, x), rtol=0, atol=1e-14)
    torch.testing.assert_close(report.residual, exact_report.residual)
    torch.testing.assert_close(report.residual, residual(f, exact, x, norm="relative"))
    unmoved, _ = fixed_point(f, z0, x, solver=solver, gradient=PhantomGradient(steps, damping))
    torch.testing.assert_close(unmoved, exact, rtol=0, atol=0)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_advance_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match=r"PhantomGradient\(advance=...\) takes true or false"):
        PhantomGradient(advance=value)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("steps", [[], [0], [-1, 2], [3, 3], [5, 2], [1.5], [True], [2, "4"]], ids=str)
def test_steps_are_increasing_and_positive(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"Trajectory\(steps=...\) takes increasing integers >= 1; given"):
        Trajectory(steps)
    with pytest.raises(ValueError, match="increasing integers"):
        fixed_point(f, *batch_of(), trajectory=steps)


@pytest.mark.parametrize("sliced", [False, True])
def test_steps_are_those_of_the_solver(sliced: bool) -> None:
    with pytest.raises(ValueError, match=r"among the solver's max_steps=5 updates; given: steps=\(2, 6\)"):
        fixed_point(f, *batch_of(), solver=Anderson(max_steps=5), trajectory=Trajectory([2, 6], sliced=sliced))


@pytest.mark.parametrize("gradient", [UnrolledGradient(), "phantom", None, Anderson()], ids=lambda g: type(g).__name__)
def test_a_state_has_no_unrolled_gradient(gradient: Any) -> None:
    with pytest.raises(TypeError, match=r"Trajectory\(gradient=...\) takes PhantomGradient"):
        Trajectory([1], gradient)


# ----------------------------------------------------------------------------------------------- fixed-point correction


@thorough
@given(count=st.integers(1, 12), gamma=st.floats(0, 1))
def test_weights(count: int, gamma: float) -> None:
    for k in range(count):  # states are numbered from 0; the last is z*
        left = count - 1 - k
        assert correction_weights(count, "exponential", gamma)[k] == pytest.approx(gamma**left)
        assert correction_weights(count, "linear", gamma)[k] == pytest.approx(1 - gamma * left / count)
        assert correction_weights(count, "constant", gamma)[k] == 1


def test_weights_by_hand() -> None:
    assert correction_weights(3) == pytest.approx([0.64, 0.8, 1])
    assert correction_weights(4, "linear", 0.8) == pytest.approx([0.4, 0.6, 0.8, 1])
    assert correction_weights(1, "linear") == [1]
    assert correction_weights(2, gamma=0) == [0, 1]


@pytest.mark.parametrize("kind", ["exponential", "linear", "constant"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_correction_is_the_weighted_sum(kind: Any, per_sample: bool) -> None:
    z0, x = batch_of()
    z, _, states = fixed_point(f, z0, x, trajectory=[1, 3])

    def loss(state: Tensor) -> Tensor:
        return state.square().sum(1) if per_sample else state.square().sum()

    total = fixed_point_correction(loss, [*states, z], kind, gamma=0.5)
    by_kind: dict[str, list[float]] = {
        "exponential": [0.25, 0.5, 1],
        "linear": [2 / 3, 5 / 6, 1],
        "constant": [1, 1, 1],
    }
    weights = by_kind[kind]
    parts: Sequence[Tensor] = [w * loss(state) for w, state in zip(weights, [*states, z], strict=True)]
    torch.testing.assert_close(total, parts[0] + parts[1] + parts[2])
    assert total.shape == ((3,) if per_sample else ())
    total.sum().backward()
    assert x.grad is not None
    z, _, states = fixed_point(f, z0, x, trajectory=[1, 3])
    by_hand = [torch.autograd.grad(w * loss(state).sum(), x)[0] for w, state in zip(weights, [*states, z], strict=True)]
    torch.testing.assert_close(x.grad, torch.stack(by_hand).sum(0))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"count": 0}, "count=...) takes an integer >= 1"),
        ({"count": 2, "gamma": 1.5}, "gamma=...) takes a number in [0, 1]; given: 1.5"),
        ({"count": 2, "gamma": float("nan")}, "gamma=...) takes a number in [0, 1]"),
        ({"count": 2, "kind": "exp"}, "kind=...) takes one of exponential, linear, constant; given: 'exp'"),
    ],
)
def test_weights_that_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its text is looked at below
        correction_weights(**arguments)
    assert text in str(error.value)


def test_a_correction_of_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="count"):
        fixed_point_correction(torch.sum, [])


def test_slices_of_an_unrolled_solve_are_refused() -> None:
    """z* would know the last slice only, and its gradient would be wrong."""
    with pytest.raises(ValueError, match="the last slice only"):
        fixed_point(f, *batch_of(), gradient=UnrolledGradient(), trajectory=Trajectory([2], sliced=True))

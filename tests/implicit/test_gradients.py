"""Gradients against finite differences, their behaviour in larger graphs, and second derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tests.problems import (
    METHODS,
    PROBLEMS,
    SOLVERS,
    Counting,
    InjectedTanhCell,
    Method,
    Problem,
    contraction,
    flat,
    generator,
    tanh_problem,
    tight,
)
from zoo.implicit import (
    DEQ,
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    Newton,
    PhantomGradient,
    SolverReport,
    UnrolledGradient,
    fixed_point,
)
from zoo.tanh import TanhCell

IMPLICIT = [name for name, method in METHODS.items() if isinstance(method.gradient, ImplicitGradient)]

# The phantom gradient does not care which solver found z*.
CHECKED = {name: m for name, m in METHODS.items() if "phantom" not in name or name == "newton-phantom"}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_implicit = pytest.mark.parametrize("method", [METHODS[m] for m in IMPLICIT], ids=IMPLICIT)


def deq_of(problem: Problem, method: Method) -> DEQ:
    return DEQ(problem.cell, method.solver, method.gradient)


# ----------------------------------------------------------------------------------------------- finite differences


@pytest.mark.parametrize("method", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradcheck_by_inputs_and_parameters(problem: str, method: Method) -> None:
    p = PROBLEMS[problem](batch=2)
    names = [name for name, _ in p.cell.named_parameters()]
    input_spec = pytree.tree_structure(p.inputs)

    def solve(*leaves: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, leaves[: len(names)], strict=True))
        inputs = pytree.tree_unflatten(list(leaves[len(names) :]), input_spec)

        def f(z: Any, *x: Any) -> Any:
            return functional_call(p.cell, parameters, (z, *x))

        z, _ = fixed_point(f, p.z0, *inputs, solver=method.solver, gradient=method.gradient)
        return tuple(pytree.tree_leaves(z))

    leaves = [leaf.detach().clone().requires_grad_() for leaf in p.leaves]
    assert torch.autograd.gradcheck(solve, leaves, eps=1e-5, atol=1e-7, rtol=1e-6, fast_mode=True)


# ------------------------------------------------------------------------------------------------ in a larger graph


@every_method
def test_one_deq_used_twice_in_one_graph(method: Method) -> None:
    p, q = tanh_problem(), tanh_problem()
    x2 = torch.randn(3, 2, dtype=torch.float64, generator=generator(5))
    deq = deq_of(p, method)
    R = p.weights()
    parameters = list(p.cell.parameters())

    first, second = deq(*p.inputs)[0], deq(x2)[0]
    together = torch.autograd.grad((R * first).sum() + (R * second).square().sum(), parameters)

    alone = torch.autograd.grad((R * deq(*q.inputs)[0]).sum(), parameters)
    other = torch.autograd.grad((R * deq(x2)[0]).square().sum(), parameters)
    for t, a, b in zip(together, alone, other, strict=True):
        torch.testing.assert_close(t, a + b, rtol=0, atol=1e-12)


@every_method
def test_one_deq_fed_with_its_own_output(method: Method) -> None:
    W, U = contraction(3, 0.5, seed=1), contraction(3, 1.0, seed=2)
    cell = InjectedTanhCell(W, U, torch.zeros(3, dtype=torch.float64))
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator(3)).requires_grad_()
    deq = DEQ(cell, method.solver, method.gradient)
    z, _ = deq(deq(x)[0])
    found = torch.autograd.grad(z.square().sum(), [x, *cell.parameters()])

    unrolled = x
    for _ in range(2):
        state = torch.zeros_like(x)
        for _ in range(80):
            state = cell(state, unrolled)
        unrolled = state
    for ours, reference in zip(
        found, torch.autograd.grad(unrolled.square().sum(), [x, *cell.parameters()]), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)


@every_method
def test_a_second_backward_over_a_retained_graph_gives_the_same(method: Method) -> None:
    p = tanh_problem()
    z, _ = deq_of(p, method)(*p.inputs)
    loss = (p.weights() * z).sum()
    first = torch.autograd.grad(loss, p.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, p.leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, p.leaves)


@every_method
def test_eval_mode_has_the_gradients_of_train_mode(method: Method) -> None:
    p = tanh_problem()
    deq = deq_of(p, method)
    found = []
    for mode in (True, False):
        z, _ = deq.train(mode)(*p.inputs)
        found.append(torch.autograd.grad((p.weights() * z).sum(), p.leaves))
    for train, evaluation in zip(*found, strict=True):
        assert train.abs().max() > 0
        torch.testing.assert_close(train, evaluation, rtol=0, atol=0)


@every_method
@pytest.mark.parametrize("wanted", ["parameters", "inputs"])
def test_only_parameters_or_only_inputs(method: Method, wanted: str) -> None:
    p = tanh_problem()
    parameters, inputs = list(p.cell.parameters()), list(p.inputs)
    R = p.weights()
    dense = dict(zip(p.leaves, p.dense_gradients(R), strict=True))
    asked, other = (parameters, inputs) if wanted == "parameters" else (inputs, parameters)
    for leaf in other:
        leaf.requires_grad_(False)
    z, _ = deq_of(p, method)(*p.inputs)
    (R * z).sum().backward()
    for leaf in asked:
        torch.testing.assert_close(leaf.grad, dense[leaf], rtol=0, atol=1e-8)
    assert all(leaf.grad is None for leaf in other)


@every_method
def test_where_nothing_requires_a_gradient_the_output_does_not(method: Method) -> None:
    p = tanh_problem()
    p.cell.requires_grad_(False)
    z, _ = deq_of(p, method)(p.inputs[0].detach())
    assert not z.requires_grad
    assert z.grad_fn is None


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_no_graph_where_gradients_are_off(method: Method, mode: Any) -> None:
    p = tanh_problem()
    with mode():
        z, _ = deq_of(p, method)(*p.inputs)
    assert not z.requires_grad
    torch.testing.assert_close(z.clone(), p.solution(), rtol=0, atol=1e-11)


@every_method
@pytest.mark.parametrize("max_steps", [0, 30])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_start_gets_a_gradient_from_unrolling_only(method: Method, max_steps: int, enabled: bool) -> None:
    z0 = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    solver = type(method.solver)(max_steps=max_steps)
    with torch.set_grad_enabled(enabled):
        z, _ = fixed_point(lambda z: 0.5 * z + 1, z0, solver=solver, gradient=method.gradient, on_failure="ignore")
    assert z.requires_grad == (enabled and isinstance(method.gradient, UnrolledGradient))


@every_method
def test_a_map_that_ignores_its_state(method: Method) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator(0)).requires_grad_()
    z, report = fixed_point(
        lambda _, x: x, torch.zeros(2, 3, dtype=torch.float64), x, solver=method.solver, gradient=method.gradient
    )
    torch.testing.assert_close(z, x, rtol=0, atol=1e-12)
    assert bool(report.converged.all())
    (gradient,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gradient", [ImplicitGradient(Newton()), ImplicitGradient(), PhantomGradient(40)], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_the_result_may_be_changed_in_place(gradient: Any, frozen: bool) -> None:
    """As ``nn.ReLU(inplace=True)`` does; a solver that reads z* in the backward pass must not see the change."""
    cell = TanhCell(4, contraction=0.8).double().requires_grad_(not frozen)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator(0)).requires_grad_()
    leaves = [x, *(p for p in cell.parameters() if not frozen)]

    def gradients(change: Any) -> tuple[Tensor, ...]:
        z, _ = DEQ(cell, Newton(), gradient)(x)
        return torch.autograd.grad(change(z).square().sum(), leaves)

    for ours, expected in zip(gradients(lambda z: z.mul_(3)), gradients(lambda z: z * 3), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
def test_scaling_the_loss_scales_the_gradient_and_nothing_else(solver: str, scale: float) -> None:
    """A tolerance that was absolute would stop the adjoint earlier for a smaller loss."""
    p = tanh_problem()
    deq = DEQ(p.cell, SOLVERS[solver], ImplicitGradient(SOLVERS[solver]))
    found = []
    for factor in (1.0, scale):
        z, _ = deq(*p.inputs)
        found.append([g / factor for g in torch.autograd.grad(factor * (p.weights() * z).sum(), p.leaves)])
    for plain, scaled in zip(*found, strict=True):
        assert (plain - scaled).norm() <= 1e-10 * plain.norm()


def test_phantom_gradient_of_one_step_is_the_jacobian_free_one() -> None:
    p = tanh_problem()
    R = p.weights()
    z, _ = DEQ(p.cell, tight(Newton()), PhantomGradient())(*p.inputs)
    found = torch.autograd.grad((R * z).sum(), p.leaves)
    expected = torch.autograd.grad((R * p.cell(p.solution(), *p.inputs)).sum(), p.leaves)
    for ours, one_step in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, one_step, rtol=0, atol=1e-11)


def test_damped_phantom_gradient_is_backpropagation_through_damped_steps() -> None:
    p = tanh_problem()
    R = p.weights()
    z, _ = DEQ(p.cell, tight(Newton()), PhantomGradient(steps=3, damping=0.4))(*p.inputs)
    found = torch.autograd.grad((R * z).sum(), p.leaves)
    state = p.solution()
    for _ in range(3):
        state = 0.6 * state + 0.4 * p.cell(state, *p.inputs)
    for ours, expected in zip(found, torch.autograd.grad((R * state).sum(), p.leaves), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


def test_phantom_gradient_does_not_move_the_value() -> None:
    """Far from the solution, where a step would be seen."""
    p = tanh_problem()
    solver = FixedPointIteration(max_steps=2)
    values = [
        fixed_point(p.cell, p.z0, *p.inputs, solver=solver, gradient=g, on_failure="ignore")[0].detach()
        for g in (PhantomGradient(5), ImplicitGradient(), UnrolledGradient())
    ]
    with torch.no_grad():
        expected = p.cell(p.cell(p.z0, *p.inputs), *p.inputs)
    for value in values:
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------------ second derivatives


def scalar(method: Method) -> tuple[Tensor, Tensor, Tensor]:
    """x, z* of z = tanh(z / 2 + x), and d2z/dx2 by hand: -2 z z' / (1 - s/2)^2, s = 1 - z^2, z' = s / (1 - s/2)."""
    x = torch.tensor([[0.3], [-0.8]], dtype=torch.float64, requires_grad=True)
    z, _ = fixed_point(
        lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x, solver=method.solver, gradient=method.gradient
    )
    value = z.detach()
    s = 1 - value.square()
    return x, z, -2 * value * (s / (1 - s / 2)) / (1 - s / 2).square()


@every_method
def test_the_first_derivative_with_create_graph_is_the_usual_one(method: Method) -> None:
    x, z, _ = scalar(method)
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    s = 1 - z.detach().square()
    torch.testing.assert_close(first.detach(), s / (1 - s / 2), rtol=0, atol=1e-10)


@every_method
def test_second_derivatives(method: Method) -> None:
    x, z, expected = scalar(method)
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-7)


def hiding(p: Problem, method: Method) -> Any:
    """The solve of a map that is no module: nobody sees its parameters."""
    return fixed_point(Counting(p.cell), p.z0, *p.inputs, solver=method.solver, gradient=method.gradient)


@every_implicit
@pytest.mark.parametrize("by", ["x", "W", "target", "cotangent", "backward"])
def test_second_derivatives_are_refused_where_f_hides_a_dependence(method: Method, by: str) -> None:
    """Every way of asking: u depends on all of these, so that each answer would lack a term."""
    p = tanh_problem()
    target, cotangent = (torch.ones_like(p.solution(), requires_grad=True) for _ in range(2))
    z, _ = hiding(p, method)
    (first,) = torch.autograd.grad((z - target).square(), p.inputs, grad_outputs=cotangent, create_graph=True)
    leaves = {"x": p.inputs[0], "W": p.cell.W, "target": target, "cotangent": cotangent}
    loss = first.sum()
    ask = loss.backward if by == "backward" else partial(torch.autograd.grad, loss, leaves[by])
    with pytest.raises(NotImplementedError, match=r"pass it to f as an input.*or use UnrolledGradient\(\)"):
        ask()


@every_implicit
def test_the_refusal_does_not_depend_on_the_loss(method: Method) -> None:
    """With a linear one the cotangent is a constant, and x is reached through the graph of f alone."""
    for leaf in (0, 1):
        p = tanh_problem()
        z, _ = hiding(p, method)
        (first,) = torch.autograd.grad(z.sum(), p.inputs, create_graph=True)
        loss = first.sum()
        with pytest.raises(NotImplementedError, match="pass it to f as an input"):
            torch.autograd.grad(loss, [p.inputs[0], p.cell.W][leaf])


def test_create_graph_leaves_the_cotangent_alone() -> None:
    """Where J = 0 the adjoint's solution is the cotangent itself, an object of the caller."""
    x = torch.ones(2, 3, requires_grad=True)
    cotangent = torch.ones(2, 3)
    z, _ = fixed_point(lambda z, x: x + 0 * z, torch.zeros(2, 3), x, solver=Anderson())
    torch.autograd.grad(z, x, grad_outputs=cotangent, create_graph=True)
    assert not cotangent.requires_grad
    assert cotangent.grad_fn is None


# ------------------------------------------------------------------------------------------------------ empty batches


@every_method
@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_empty_batch_goes_forward_and_backward(problem: str, method: Method) -> None:
    p = PROBLEMS[problem](batch=0)
    deq = deq_of(p, method)
    z, report = deq(*p.inputs)
    assert pytree.tree_map(lambda t: t.shape, z) == pytree.tree_map(lambda t: t.shape, p.z0)
    assert report.converged.shape == report.residual.shape == report.steps.shape == report.status.shape == (0,)
    flat(z).sum().backward()
    for leaf in p.leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


@every_method
def test_a_state_without_entries(method: Method) -> None:
    z, report = fixed_point(lambda z: z, torch.zeros(3, 0), solver=method.solver, gradient=method.gradient)
    assert z.shape == (3, 0)
    assert bool(report.converged.all())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_an_absolute_tolerance_of_the_adjoint_is_absolute(scale: float) -> None:
    p = tanh_problem()
    reports: list[SolverReport] = []
    adjoint = FixedPointIteration(tol=1e-3, norm="absolute", max_steps=200, check_every=1)
    z, _ = fixed_point(
        p.cell, p.z0, *p.inputs, solver=tight(Anderson()), gradient=ImplicitGradient(adjoint), on_adjoint=reports.append
    )
    R = scale * p.weights()
    (z * R).sum().backward()
    J = p.cell.jacobian(z, *p.inputs)
    u, before = R, None
    for _ in range(int(reports[0].steps.max()) + 1):
        u, before = torch.einsum("bij,bi->bj", J, u) + R, u
    assert reports[0].converged.all()
    assert (reports[0].residual <= 1e-3).all()
    slowest = int(reports[0].steps.argmax())
    assert before is not None
    expected = (u - before)[slowest].norm().detach()
    torch.testing.assert_close(reports[0].residual[slowest], expected, rtol=1e-6, atol=1e-12)

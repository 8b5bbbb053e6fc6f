"""Derivatives of implicit gradients, against closed forms, finite differences and recorded iterations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree

from tests.problems import (
    ADJOINT_SOLVERS,
    PROBLEMS,
    Counting,
    InjectedTanhCell,
    Problem,
    contraction,
    flat,
    generator,
    tanh_problem,
    tight,
    unflat,
)
from zoo.implicit import (
    DEQ,
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    Newton,
    SpectralBound,
    VariationalDropout,
    fixed_point,
    one_draw,
)

ADJOINTS = {name: tight(ADJOINT_SOLVERS[name]) for name in ("anderson", "newton", "gmres", "bicgstab", "broyden")}
every_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)

IMPLICIT = ImplicitGradient(tight(Anderson()))

Solve = Callable[..., Any]
"""(f, z0, *inputs) -> z*."""

Loss = Callable[[Solve], Tensor]


def implicit(f: Any, z0: Any, *inputs: Any, gradient: ImplicitGradient = IMPLICIT) -> Any:
    return fixed_point(f, z0, *inputs, solver=tight(Anderson()), gradient=gradient)[0]


def recorded(f: Any, z0: Any, *inputs: Any) -> Any:
    """So many plain iterations that only rounding is left; autograd does the rest."""
    z = z0
    for _ in range(80):
        z = f(z, *inputs)
    return z


def derivatives(loss: Loss, solve: Solve, leaves: list[Tensor]) -> list[Tensor]:
    """First derivatives, and the product of a fixed vector with the second ones."""
    first = torch.autograd.grad(loss(solve), leaves, create_graph=True)
    vectors = [torch.randn(x.shape, dtype=x.dtype, generator=generator(k)) for k, x in enumerate(leaves)]
    along = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
    return [*first, *torch.autograd.grad(along, leaves)]


def check(loss: Loss, leaves: list[Tensor], solve: Solve = implicit, atol: float = 1e-9) -> None:
    found, expected = derivatives(loss, solve, leaves), derivatives(loss, recorded, leaves)
    assert max(float(e.detach().abs().max()) for e in expected[len(leaves) :]) > 1e-3  # there is something to find
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=atol)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return (0.5 * torch.randn(*shape, dtype=torch.float64, generator=generator(seed))).requires_grad_()


# ------------------------------------------------------------------------------------------- problems, adjoint solvers


@every_adjoint
@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradgradcheck_by_inputs(problem: str, adjoint: Any) -> None:
    """Parameters are inputs here, as finite differences of them need."""
    p = PROBLEMS[problem](batch=1)
    parameters = dict(p.cell.named_parameters())
    spec = pytree.tree_structure((parameters, p.inputs))

    def solve(*leaves: Tensor) -> Tensor:
        parameters, inputs = pytree.tree_unflatten(list(leaves), spec)

        def f(z: Any, parameters: Any, *x: Any) -> Any:
            return functional_call(p.cell, parameters, (z, *x))

        return flat(implicit(f, p.z0, parameters, *inputs, gradient=ImplicitGradient(adjoint)))

    leaves = [x.detach().clone().requires_grad_() for x in p.leaves]
    assert torch.autograd.gradgradcheck(solve, leaves, eps=1e-5, atol=1e-6, rtol=1e-6, fast_mode=True)


@every_adjoint
@pytest.mark.parametrize("problem", PROBLEMS)
def test_by_the_parameters_of_a_module(problem: str, adjoint: Any) -> None:
    p = PROBLEMS[problem](batch=2)
    R = p.weights()

    def loss(solve: Solve) -> Tensor:
        z = flat(solve(p.cell, p.z0, *p.inputs))
        return (R * z).sum() + z.square().sum()

    def solve(f: Any, z0: Any, *inputs: Any) -> Any:
        return DEQ(f, tight(Anderson()), ImplicitGradient(adjoint))(*inputs, z0=z0)[0]

    check(loss, p.leaves, solve)


@pytest.mark.parametrize("name", ["anderson", "newton"])
@pytest.mark.parametrize("batch", [0, 2])
def test_batches_that_are_empty_or_not(name: str, batch: int) -> None:
    p = tanh_problem(batch=batch)
    z = implicit(p.cell, p.z0, *p.inputs, gradient=ImplicitGradient(ADJOINTS[name]))
    first = torch.autograd.grad(z.square().sum(), p.leaves, create_graph=True)
    second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), p.leaves)
    assert [s.shape for s in second] == [x.shape for x in p.leaves]
    assert any(bool(s.any()) for s in second) == (batch > 0)


# ------------------------------------------------------------------------------------------------------ one dimension


def scalar_equilibrium(x: Tensor) -> Tensor:
    z: Tensor = implicit(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x)
    return z


def exact_second(x: Tensor) -> Tensor:
    """d2z/dx2 = -2 z z' / (1 - s/2)^2, where z' = s / (1 - s/2) and s = 1 - z^2."""
    z = torch.zeros_like(x)
    for _ in range(200):
        z = torch.tanh(0.5 * z + x)
    s = 1 - z.square()
    return -2 * z * s / (1 - s / 2) ** 3


def test_the_second_derivative_of_a_scalar_equilibrium() -> None:
    x = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(scalar_equilibrium(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert abs(float(second) + 3.0676) < 5e-5  # TorchDEQ: -1.1999
    torch.testing.assert_close(second, exact_second(x.detach()), rtol=0, atol=1e-11)


def test_the_third_derivative_of_a_scalar_equilibrium() -> None:
    x = torch.tensor([[0.3], [-0.8], [0.05]], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(scalar_equilibrium(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    h = 1e-5
    expected = (exact_second(x.detach() + h) - exact_second(x.detach() - h)) / (2 * h)
    torch.testing.assert_close(third, expected, rtol=1e-7, atol=1e-7)


# ---------------------------------------------------------------------------------------- nothing is counted twice


def f_of_two(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(0.4 * z.roll(1, 1) + x * y + 0.3 * y)


def test_two_inputs_of_which_one_is_made_of_the_other() -> None:
    x = numbers(2, 3)
    check(lambda solve: solve(f_of_two, torch.zeros_like(x), x, x.square() + 0.1).square().sum(), [x])


def test_two_inputs_that_are_both_made_of_one_leaf() -> None:
    x = numbers(2, 3)

    def loss(solve: Solve) -> Tensor:
        y = x.sin()
        return solve(f_of_two, torch.zeros_like(x), y, (y * x).cos()).square().sum()  # type: ignore[no-any-return]

    check(loss, [x])


def test_one_input_given_twice() -> None:
    x = numbers(2, 3)
    check(lambda solve: solve(f_of_two, torch.zeros_like(x), x, x).square().sum(), [x])

    def loss(solve: Solve) -> Tensor:
        y = 2 * x
        return solve(f_of_two, torch.zeros_like(x), y, y).square().sum()  # type: ignore[no-any-return]

    check(loss, [x])


@every_adjoint
def test_an_equilibrium_as_the_input_of_another(adjoint: Any) -> None:
    x, W = numbers(2, 3), contraction(3, 0.6, seed=1).requires_grad_()

    def f(z: Tensor, x: Tensor, W: Tensor) -> Tensor:
        return torch.tanh(z @ W.mT + x)

    def loss(solve: Solve) -> Tensor:
        start = torch.zeros_like(x)
        first = solve(f, start, x, W)
        second = solve(f, start, first, W)
        return (second.square() + first * second).sum()  # type: ignore[no-any-return]

    check(loss, [x, W], lambda *args: implicit(*args, gradient=ImplicitGradient(adjoint)))


def test_an_equilibrium_and_what_it_was_made_of_as_inputs_of_another() -> None:
    x = numbers(2, 3)

    def loss(solve: Solve) -> Tensor:
        start = torch.zeros_like(x)
        z = solve(f_of_two, start, x, x.cos())
        return solve(f_of_two, start, z, x).square().sum()  # type: ignore[no-any-return]

    check(loss, [x])


def test_an_equilibrium_within_the_map_of_another() -> None:
    x, a = numbers(2, 3), numbers(3, seed=1)

    def loss(solve: Solve) -> Tensor:
        def inner(z: Tensor, y: Tensor, a: Tensor) -> Tensor:
            return torch.tanh(0.3 * z + y + a)

        def outer(z: Tensor, x: Tensor, a: Tensor) -> Tensor:
            return 0.5 * solve(inner, torch.zeros_like(z), 0.5 * z + x, a)  # type: ignore[no-any-return]

        return solve(outer, torch.zeros_like(x), x, a).square().sum()  # type: ignore[no-any-return]

    check(loss, [x, a])


def test_an_input_made_of_a_parameter_of_the_cell() -> None:
    p = tanh_problem()
    y = numbers(3, 4, seed=3)

    def loss(solve: Solve) -> Tensor:
        return solve(p.cell, p.z0, y @ p.cell.W @ p.cell.U).square().sum()  # type: ignore[no-any-return]

    check(loss, [y, *p.cell.parameters()])


def test_a_start_made_of_an_input() -> None:
    x = numbers(2, 3)
    check(lambda solve: solve(f_of_two, 0.1 * x, x, x.cos()).square().sum(), [x])


def test_the_equilibrium_several_times_in_a_loss_beside_its_input() -> None:
    p = tanh_problem()
    (x,) = p.inputs

    def loss(solve: Solve) -> Tensor:
        z = solve(p.cell, p.z0, x)
        return (z * z.roll(1, 1)).sum() + (z.exp() * x.sum(1, keepdim=True)).sum() + x.pow(3).sum() + z[0].prod()  # type: ignore[no-any-return]

    check(loss, p.leaves)


def test_a_tied_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Linear(3, 3, bias=False).double() for _ in range(2))
            self.first.weight = self.second.weight = nn.Parameter(contraction(3, 0.7))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(z) + x))  # type: ignore[no-any-return]

    cell, x = Tied(), numbers(2, 3)
    assert len(list(cell.parameters())) == 1
    check(lambda solve: solve(cell, torch.zeros_like(x), x).square().sum(), [x, *cell.parameters()])


def test_pytree_states_with_a_loss_on_one_part() -> None:
    p = PROBLEMS["pair"](batch=2)

    def loss(solve: Solve) -> Tensor:
        a, _ = solve(p.cell, p.z0, *p.inputs)
        return a.square().sum()  # type: ignore[no-any-return]

    check(loss, p.leaves)


# ------------------------------------------------------------------------------------------------------- parametrised


def bounded(linear: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(linear, "weight", SpectralBound(0.5))
    return linear


class WrappedLinear(nn.Module):
    """f(z, x) = tanh(W z + x), with a parametrised W."""

    def __init__(self, wrap: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        linear = nn.Linear(3, 3).double()
        with torch.no_grad():
            linear.weight.copy_(contraction(3, 0.7))
            linear.bias.copy_(torch.linspace(-0.5, 0.5, 3))
        self.linear = wrap(linear)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("wrap", [bounded, parametrizations.weight_norm])
@pytest.mark.parametrize("cached", [False, True])
def test_parametrised_weights(wrap: Any, cached: bool) -> None:
    cell, x = WrappedLinear(wrap), numbers(2, 3)
    leaves = [x, *cell.parameters()]

    def loss(solve: Solve) -> Tensor:
        return solve(cell, torch.zeros_like(x), x).square().sum()  # type: ignore[no-any-return]

    expected = derivatives(loss, recorded, leaves)
    if cached:
        with parametrize.cached():
            found = derivatives(loss, implicit, leaves)
    else:
        found = derivatives(loss, implicit, leaves)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)


def test_an_input_made_of_a_cached_parametrised_weight() -> None:
    cell, x = WrappedLinear(bounded), numbers(2, 3)
    linear: Any = cell.linear
    leaves = [x, *cell.parameters()]
    found = []
    for solve in (implicit, recorded):
        with parametrize.cached():
            found.append(
                derivatives(lambda s: s(cell, torch.zeros_like(x), x @ linear.weight).square().sum(), solve, leaves)
            )
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------ what second derivatives are for


@pytest.mark.parametrize("through", ["inputs", "parameters"])
def test_a_training_step_with_a_gradient_penalty(through: str) -> None:
    """||dL/dx||^2, differentiated by parameters, against finite differences of dense solutions."""
    p = tanh_problem()
    R = p.weights()
    by = slice(3, None) if through == "inputs" else slice(0, 3)
    deq = DEQ(p.cell, tight(Anderson()), IMPLICIT)

    z, _ = deq(*p.inputs)
    first = torch.autograd.grad((R * z).sum(), p.leaves[by], create_graph=True)
    torch.stack([g.square().sum() for g in first]).sum().backward()

    def penalty() -> float:
        return sum(float(g.square().sum()) for g in p.dense_gradients(R)[by])

    for leaf in p.leaves:
        assert leaf.grad is not None
        direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator(5))
        values = []
        for h in (1e-5, -1e-5):
            leaf.data.add_(h * direction)
            values.append(penalty())
            leaf.data.sub_(h * direction)
        expected = (values[0] - values[1]) / 2e-5
        assert abs(float((leaf.grad * direction).sum()) - expected) <= 1e-6 * max(1.0, abs(expected))


def test_the_hessian_of_torch_autograd_functional() -> None:
    p = tanh_problem(batch=2)
    p.cell.requires_grad_(False)
    x = p.inputs[0].detach()

    def hessian(solve: Solve) -> Tensor:
        found: Tensor = torch.autograd.functional.hessian(lambda x: solve(p.cell, p.z0, x).pow(3).sum(), x)  # type: ignore[no-untyped-call]
        return found

    found = hessian(implicit)
    torch.testing.assert_close(found, hessian(recorded), rtol=0, atol=1e-10)
    assert found[0, :, 0].abs().max() > 1e-2
    assert not found[0, :, 1].any()  # samples do not depend on each other


def test_hessian_vector_products_against_differences_of_gradients() -> None:
    p = PROBLEMS["nested"]()
    deq = DEQ(p.cell, tight(Anderson()), IMPLICIT)
    vectors = [torch.randn(x.shape, dtype=x.dtype, generator=generator(9)) for x in p.leaves]

    def gradient(**options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(flat(deq(*p.inputs)[0]).square().sum(), p.leaves, **options)

    along = torch.stack([(g * v).sum() for g, v in zip(gradient(create_graph=True), vectors, strict=True)]).sum()
    products = torch.autograd.grad(along, p.leaves)
    ends = []
    for h in (1e-5, -1e-5):
        for x, v in zip(p.leaves, vectors, strict=True):
            x.data.add_(h * v)
        ends.append(gradient())
        for x, v in zip(p.leaves, vectors, strict=True):
            x.data.sub_(h * v)
    for product, plus, minus in zip(products, *ends, strict=True):
        torch.testing.assert_close(product, (plus - minus) / 2e-5, rtol=1e-7, atol=1e-7)


@every_adjoint
def test_by_the_cotangent_alone(adjoint: Any) -> None:
    """d<dz/dx^T R, v>/dR = dz/dx v: the forward-mode derivative, by two passes in reverse."""
    p = tanh_problem(batch=2)
    p.cell.requires_grad_(False)
    (x,) = p.inputs
    R = torch.zeros_like(p.solution()).requires_grad_()
    v = torch.randn(x.shape, dtype=x.dtype, generator=generator(3))
    z = implicit(p.cell, p.z0, x, gradient=ImplicitGradient(adjoint))
    (first,) = torch.autograd.grad(z, x, grad_outputs=R, create_graph=True)
    assert not first.any()
    (found,) = torch.autograd.grad((first * v).sum(), R)
    dzdx = torch.autograd.functional.jacobian(lambda x: recorded(p.cell, p.z0, x), x.detach()).reshape(R.numel(), -1)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.flatten(), dzdx @ v.flatten(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("by", ["x", "W", "target", "cotangent"])
def test_every_leaf_alone(by: str) -> None:
    """The graph of the others is there, and is not asked for."""
    p = tanh_problem()
    target, cotangent = (torch.ones_like(p.solution(), requires_grad=True) for _ in range(2))

    def second(solve: Solve) -> Tensor:
        z = solve(p.cell, p.z0, *p.inputs)
        loss = (z - target).square()
        (first,) = torch.autograd.grad(loss, p.inputs, grad_outputs=cotangent, create_graph=True)
        leaf = {"x": p.inputs[0], "W": p.cell.W, "target": target, "cotangent": cotangent}[by]
        (found,) = torch.autograd.grad(first.square().sum(), leaf)
        return found

    torch.testing.assert_close(second(implicit), second(recorded), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_backward_with_create_graph_accumulates_first_derivatives() -> None:
    p = tanh_problem()
    implicit(p.cell, p.z0, *p.inputs).square().sum().backward(create_graph=True)
    expected = torch.autograd.grad(recorded(p.cell, p.z0, *p.inputs).square().sum(), p.leaves)
    for leaf, reference in zip(p.leaves, expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.detach(), reference, rtol=0, atol=1e-10)
        leaf.grad = None  # the graph of a gradient that its own leaf holds is a cycle


# --------------------------------------------------------------------------------------- other precision, random masks


def test_under_autocast_f_is_evaluated_in_the_precision_of_the_forward() -> None:
    cell = InjectedTanhCell(contraction(8, 0.5), contraction(8, 1.0, seed=1), torch.zeros(8)).float()
    x = torch.randn(4, 8, generator=generator(2)).requires_grad_()
    leaves = [x, cell.W]
    seen: list[torch.dtype] = []
    cell.register_forward_hook(lambda _, __, output: seen.append((output @ cell.W).dtype))

    def second(solve: Solve, dtype: torch.dtype | None) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            z = solve(cell, torch.zeros(4, 8), x)
        seen.clear()
        first = torch.autograd.grad(z.float().square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves))

    loose = Anderson(tol=1e-3)
    found = second(lambda f, z0, *x: fixed_point(f, z0, *x, solver=loose, on_failure="ignore")[0], torch.bfloat16)
    assert seen
    assert set(seen) == {torch.bfloat16}
    for ours, reference in zip(found, second(recorded, None), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() <= 0.1 * reference.norm()


class DroppingCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(contraction(6, 0.6))
        self.dropout = VariationalDropout(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(z) @ self.W.mT + x)


def test_the_masks_are_those_of_the_forward() -> None:
    cell, x = DroppingCell(), numbers(2, 6)
    leaves = [x, cell.W]
    with one_draw():
        z, reference = (solve(cell, torch.zeros_like(x), x) for solve in (implicit, recorded))
    # The context is left, and other masks would be drawn here.
    found, expected = derivatives(lambda _: z.square().sum(), implicit, leaves), derivatives(
        lambda _: reference.square().sum(), recorded, leaves
    )  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


# ----------------------------------------------------------------------------------------------- what f is seen to use


def test_a_bound_method_shows_the_parameters_of_its_module() -> None:
    p = tanh_problem()
    check(lambda solve: solve(p.cell.forward, p.z0, *p.inputs).square().sum(), p.leaves)


def test_a_hidden_tensor_gets_its_first_derivative_and_the_second_is_refused() -> None:
    x, w = numbers(2, 3), numbers(3, seed=1)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * w * z + x)

    z = implicit(f, torch.zeros_like(x), x)
    expected = torch.autograd.grad(recorded(f, torch.zeros_like(x), x).square().sum(), [x, w])
    for create_graph in (False, True):
        found = torch.autograd.grad(z.square().sum(), [x, w], create_graph=create_graph, retain_graph=True)
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.detach(), reference, rtol=0, atol=1e-10)
    for first in found:
        for leaf in (x, w):
            with pytest.raises(NotImplementedError, match="pass it to f as an input"):
                torch.autograd.grad(first.sum(), leaf, retain_graph=True)
    with pytest.raises(NotImplementedError, match=r"let f be the nn\.Module that owns it"):
        found[0].sum().backward()


def test_a_tensor_hidden_behind_an_input_is_refused_too() -> None:
    """f reaches the input y by the way that it was told of, and by another one."""
    x = numbers(2, 3)
    y = 2 * x
    other = y.square()
    z = implicit(lambda z, y: torch.tanh(0.5 * z + y + other), torch.zeros_like(x), y)
    first = torch.autograd.grad(z.square().sum(), x, create_graph=True)[0]
    reference = recorded(lambda z, y: torch.tanh(0.5 * z + y + other), torch.zeros_like(x), y)
    torch.testing.assert_close(first.detach(), torch.autograd.grad(reference.square().sum(), x)[0], rtol=0, atol=1e-10)
    with pytest.raises(NotImplementedError, match="pass it to f as an input"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("closure", ["the leaf", "made of the leaf"])
def test_a_closure_over_a_leaf_that_is_also_an_input_hides_nothing(closure: str) -> None:
    x = numbers(2, 3)

    def loss(solve: Solve) -> Tensor:
        y = x if closure == "the leaf" else x.square()
        return solve(lambda z, x: torch.tanh(0.5 * z + x * y), torch.zeros_like(x), x).square().sum()  # type: ignore[no-any-return]

    check(loss, [x])


@pytest.mark.parametrize("change", [lambda w: w.detach().clone().requires_grad_(), lambda w: w * 1, lambda w: 0.9 * w])
def test_parameters_that_functional_call_has_taken_back_by_the_backward_pass(change: Any) -> None:
    p = tanh_problem()
    copies = {name: change(w) for name, w in p.cell.named_parameters()}
    leaves = [*p.inputs, *(copies.values() if copies["W"].is_leaf else p.cell.parameters())]

    class Solving(nn.Module):
        def __init__(self, solve: Solve) -> None:
            super().__init__()
            self.f, self.solve = p.cell, solve

        def forward(self, x: Tensor) -> Any:
            return self.solve(self.f, p.z0, x)

    def loss(solve: Solve) -> Tensor:
        given = {
            f"f.{name}": copies[name] if copies[name].is_leaf else change(w) for name, w in p.cell.named_parameters()
        }
        return functional_call(Solving(solve), given, p.inputs).square().sum()  # type: ignore[no-any-return]

    check(loss, leaves)


def test_weights_that_were_changed_in_between_are_noticed() -> None:
    p = tanh_problem()
    z = implicit(p.cell, p.z0, *p.inputs)
    with torch.no_grad():
        p.cell.W.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"Differentiate before the weights are changed|modified by an inplace"):
        torch.autograd.grad(z.square().sum(), p.inputs, create_graph=True)


def test_weights_that_were_assigned_in_between_are_noticed() -> None:
    """Autograd's own check does not see this."""
    p = tanh_problem()
    z = implicit(p.cell, p.z0, *p.inputs)
    p.cell.W.data = p.cell.W.data * 0.5
    with pytest.raises(RuntimeError, match="Differentiate before the weights are changed"):
        torch.autograd.grad(z.square().sum(), p.inputs, create_graph=True)


def test_a_random_map_is_noticed() -> None:
    x = numbers(2, 3)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + x + 0.1 * torch.rand_like(x))

    z, _ = fixed_point(f, torch.zeros_like(x), x, solver=FixedPointIteration(max_steps=3), on_failure="ignore")
    with pytest.raises(RuntimeError, match="or f is random"):
        torch.autograd.grad(z.square().sum(), x, create_graph=True)


def test_a_parameter_that_the_cell_does_not_use_has_no_gradient() -> None:
    """None, as distributed training with find_unused_parameters expects; not zeros."""
    p = tanh_problem()
    p.cell.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    unused = p.cell.unused
    z = implicit(p.cell, p.z0, *p.inputs)
    first = torch.autograd.grad(z.square().sum(), [*p.inputs, unused], create_graph=True, allow_unused=True)
    assert first[1] is None
    first[0].square().sum().backward()
    assert unused.grad is None
    assert all(leaf.grad is not None for leaf in p.leaves if leaf is not unused)


# ------------------------------------------------------------------------------------------------------------- the cost


def test_evaluations_of_f() -> None:
    """One for the first derivative; with a graph, one more and one for the adjoint equation's own graph."""
    x = numbers(2, 3)
    f = Counting(lambda z, x: torch.tanh(0.5 * z + x))
    z, report = fixed_point(f, torch.zeros_like(x), x, solver=tight(Newton()), gradient=ImplicitGradient(Anderson()))
    before = f.calls
    torch.autograd.grad(z.square().sum(), x, retain_graph=True)
    assert f.calls == before
    (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    assert f.calls == before + 2
    torch.autograd.grad(first.sum(), x)
    assert f.calls == before + 2
    assert report.converged.all()


@every_adjoint
def test_graphs_die_by_counting_references(adjoint: Any) -> None:
    class Cell(InjectedTanhCell):
        pass

    gc.disable()
    try:
        cell = Cell(contraction(4, 0.6), contraction(4, 1.0, seed=1), torch.zeros(4, dtype=torch.float64))
        x = numbers(2, 4)
        z = implicit(cell, torch.zeros_like(x), x, gradient=ImplicitGradient(adjoint))
        (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), x)
        references = [weakref.ref(t) for t in (cell, cell.W, x, z, first, second)]
        del cell, x, z, first, second
        assert [reference() is None for reference in references] == [True] * len(references)
        assert third.isfinite().all()
    finally:
        gc.enable()


def test_reports_of_all_adjoint_solves_arrive() -> None:
    x = numbers(2, 3)
    reports: list[Any] = []
    z, _ = fixed_point(
        lambda z, x: torch.tanh(0.5 * z + x),
        torch.zeros_like(x),
        x,
        solver=tight(Anderson()),
        gradient=IMPLICIT,
        on_adjoint=reports.append,
    )
    (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    assert len(reports) == 1
    torch.autograd.grad(first.sum(), x)
    assert len(reports) == 3  # by g, which the adjoint equation holds, and by z
    assert all(r.converged.all() for r in reports)


def test_the_tolerance_of_the_adjoint_is_that_of_second_derivatives() -> None:
    p: Problem = tanh_problem()

    def second(tol: float) -> list[Tensor]:
        solve = replace(tight(Anderson()), tol=tol)
        return derivatives(
            lambda s: s(p.cell, p.z0, *p.inputs).square().sum(),
            lambda *args: implicit(*args, gradient=ImplicitGradient(solve)),
            p.leaves,
        )[len(p.leaves) :]

    exact = second(1e-13)
    errors = [max(float((a - b).norm()) for a, b in zip(second(tol), exact, strict=True)) for tol in (1e-2, 1e-4, 1e-8)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-6


def test_flat_and_unflat_of_the_tests_are_inverse() -> None:
    p = PROBLEMS["nested"]()
    assert torch.equal(flat(unflat(p.weights(), p.z0)), p.weights())

"""Cells compiled with ``torch.compile``, under all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

from tests.problems import GRADIENTS, generator, tanh_problem, tight
from zoo.implicit import (
    DEQ,
    GMRES,
    Anderson,
    ImplicitGradient,
    Newton,
    PhantomGradient,
    SpectralBound,
    UnrolledGradient,
    VariationalDropout,
    fixed_point,
    jacobian_penalty,
    spectral_radius,
)

EAGER_BACKEND = "aot_eager"  # all of torch.compile but the generation of code

SOLVER = tight(Anderson())

every_gradient = pytest.mark.parametrize("gradient", [g(SOLVER) for g in GRADIENTS.values()], ids=GRADIENTS)
one_of_each = pytest.mark.parametrize(  # with a graph of one evaluation, and of all
    "gradient", [ImplicitGradient(SOLVER), UnrolledGradient()], ids=["implicit", "unrolled"]
)

pytestmark = [  # of torch's compiler, which hides the last one itself, unless warnings are errors
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Each test compiles for itself: which backward pass was compiled first matters."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


class Cell(nn.Module):
    """f(z, x) = tanh(V relu(W z + x)), with buffers to save in between."""

    def __init__(self, dropout: float = 0.0, bounded: bool = False) -> None:
        super().__init__()
        self.W = nn.Linear(4, 8).double()
        self.V = nn.Linear(8, 4).double()
        self.dropout = VariationalDropout(dropout)
        g = generator(1)
        with torch.no_grad():
            for linear in (self.W, self.V):
                weight = torch.randn(linear.weight.shape, dtype=torch.float64, generator=g)
                linear.weight.copy_(weight * (0.8 / torch.linalg.matrix_norm(weight, ord=2)))
                linear.bias.copy_(0.3 * torch.randn(linear.bias.shape, dtype=torch.float64, generator=g))
        if bounded:
            for linear in (self.W, self.V):
                parametrize.register_parametrization(linear, "weight", SpectralBound(0.7))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = torch.nn.functional.softplus(self.W(z + x))
        return torch.tanh(self.V(self.dropout(h)) + x)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)).requires_grad_()


def values(f: Any, leaves: list[Tensor], gradient: Any, solver: Any = SOLVER, recompute: bool = False) -> list[Tensor]:
    """z*, and the gradients of a loss on it."""
    torch.manual_seed(0)
    x = leaves[0]
    z, _ = fixed_point(f, torch.zeros_like(x), x, solver=solver, gradient=gradient, recompute=recompute)
    return [z.detach(), *torch.autograd.grad(z.square().sum(), leaves)]


def check(cell: nn.Module, compiled: Any, gradient: Any, atol: float = 1e-11, **options: Any) -> None:
    leaves = [numbers(3, 4), *cell.parameters()]
    found, expected = values(compiled, leaves, gradient, **options), values(cell, leaves, gradient, **options)
    for ours, reference in zip(found, expected, strict=True):
        assert reference.any()
        torch.testing.assert_close(ours, reference, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------------ the same values


@every_gradient
@pytest.mark.parametrize("recompute", [False, True])
def test_values_and_gradients_are_those_of_the_eager_cell(gradient: Any, recompute: bool) -> None:
    """Without a graph break, which fullgraph refuses."""
    cell = Cell()
    check(cell, torch.compile(cell, backend=EAGER_BACKEND, fullgraph=True), gradient, recompute=recompute)


@one_of_each
@pytest.mark.parametrize("kind", ["parametrised", "dropout"])
def test_cells_with_parametrised_weights_and_with_masks(gradient: Any, kind: str) -> None:
    cell = Cell(bounded=True) if kind == "parametrised" else Cell(dropout=0.5)
    check(cell, torch.compile(cell, backend=EAGER_BACKEND, fullgraph=True), gradient)


@pytest.mark.parametrize("kind", ["parametrised", "dropout"])
def test_recomputation_of_such_cells(kind: str) -> None:
    cell = Cell(bounded=True) if kind == "parametrised" else Cell(dropout=0.5)
    compiled = torch.compile(cell, backend=EAGER_BACKEND)
    check(cell, compiled, ImplicitGradient(SOLVER), recompute=True)


@pytest.mark.parametrize("adjoint", [Newton(), GMRES()], ids=["newton", "gmres"])
@pytest.mark.parametrize("solver", [Anderson(), Newton()], ids=["anderson", "newton"])
def test_solvers_that_look_into_f(solver: Any, adjoint: Any) -> None:
    """Newton's Jacobian is one of torch.func, which does not see into compiled functions."""
    cell = Cell()
    compiled = torch.compile(cell, backend=EAGER_BACKEND, fullgraph=True)
    check(cell, compiled, ImplicitGradient(tight(adjoint)), solver=tight(solver))


def test_inductor() -> None:
    cell = Cell()
    compiled = torch.compile(cell, backend="inductor", fullgraph=True)
    for gradient in (PhantomGradient(2), ImplicitGradient(SOLVER), UnrolledGradient()):
        check(cell, compiled, gradient)


def test_compiled_in_place() -> None:
    deq, cell = (DEQ(Cell(), SOLVER, ImplicitGradient(SOLVER)) for _ in range(2))
    deq.cell.compile(backend=EAGER_BACKEND, fullgraph=True)
    x = numbers(3, 4)
    for a, b in zip(*(grads_of(d, x) for d in (deq, cell)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert [name for name, _ in deq.named_parameters()] == [name for name, _ in cell.named_parameters()]


def grads_of(deq: DEQ, x: Tensor) -> tuple[Tensor, ...]:
    z, report = deq(x)
    assert report.converged.all()
    return torch.autograd.grad(z.square().sum(), [x, *deq.parameters()])


@one_of_each
def test_a_compiled_part_of_the_cell(gradient: Any) -> None:
    whole, parts = Cell(), Cell()
    parts.W.compile(backend=EAGER_BACKEND, fullgraph=True)
    leaves = [numbers(3, 4), *parts.parameters()]
    expected = values(whole, [leaves[0], *whole.parameters()], gradient)
    for ours, reference in zip(values(parts, leaves, gradient), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-11)


# -------------------------------------------------------------------------------------------------- how often, and when


@one_of_each
@pytest.mark.parametrize("kind", ["plain", "parametrised", "dropout"])
def test_no_recompilation_from_step_to_step(gradient: Any, kind: str) -> None:
    cell = Cell(bounded=kind == "parametrised", dropout=0.5 * (kind == "dropout"))
    counter = CompileCounterWithBackend(EAGER_BACKEND)
    compiled = torch.compile(cell, backend=counter, fullgraph=True)
    leaves = [numbers(3, 4), *cell.parameters()]
    values(compiled, leaves, gradient)
    compiled_first = counter.frame_count
    assert 1 <= compiled_first <= 4  # with and without a graph, each with its own inputs
    for seed in range(3):
        with torch.no_grad():
            for p in cell.parameters():
                p.mul_(0.99)
        values(compiled, [numbers(3, 4, seed=seed), *cell.parameters()], gradient)
    assert counter.frame_count == compiled_first


@pytest.mark.parametrize("first", [PhantomGradient(2), UnrolledGradient()], ids=str)
@pytest.mark.parametrize("adjoint", [Anderson(), Newton()], ids=["anderson", "newton"])
def test_a_backward_pass_that_was_compiled_to_run_once_can_run_again(first: Any, adjoint: Any) -> None:
    """As where training begins with unrolled steps. Torch would refuse the retain_graph of adjoint solves."""
    cell = Cell()
    compiled = torch.compile(cell, backend=EAGER_BACKEND, fullgraph=True)
    for gradient in (first, ImplicitGradient(tight(adjoint)), first):
        check(cell, compiled, gradient)


def test_donation_elsewhere_is_as_it_was() -> None:
    assert torch._functorch.config.donated_buffer
    cell = Cell()
    compiled = torch.compile(cell, backend=EAGER_BACKEND)
    check(cell, compiled, PhantomGradient())
    assert torch._functorch.config.donated_buffer


def test_what_was_compiled_with_donation_elsewhere_is_refused() -> None:
    """By torch: the buffers of a compiled backward pass are gone after one product."""
    cell, x = Cell(), numbers(3, 4)
    compiled = torch.compile(cell, backend=EAGER_BACKEND)
    compiled(torch.zeros_like(x).requires_grad_(), x).sum().backward()
    z, _ = fixed_point(compiled, torch.zeros_like(x), x, gradient=ImplicitGradient())
    with pytest.raises(RuntimeError, match=r"donated_buffer=False to disable"):
        torch.autograd.grad(z.square().sum(), x)


# --------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("name", ["implicit", "neumann"])
def test_second_derivatives_evaluate_the_cell_as_it_was_written(name: str) -> None:
    """A compiled graph has none; but f is evaluated again for them, and then without the compiler."""
    cell = Cell(bounded=True)
    compiled = torch.compile(cell, backend=EAGER_BACKEND, fullgraph=True)
    leaves = [numbers(3, 4), *cell.parameters()]
    found = []
    for f in (compiled, cell):
        z, _ = fixed_point(f, torch.zeros_like(leaves[0]), leaves[0], solver=SOLVER, gradient=GRADIENTS[name](SOLVER))
        first = torch.autograd.grad(z.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)
        assert all(bool(s.any()) for s in second)
        found.append([*first, *second])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gradient", [PhantomGradient(3), UnrolledGradient()], ids=str)
def test_second_derivatives_of_recorded_compiled_iterations_are_refused_by_torch(gradient: Any) -> None:
    cell, x = Cell(), numbers(3, 4)
    compiled = torch.compile(cell, backend=EAGER_BACKEND)
    z, _ = fixed_point(compiled, torch.zeros_like(x), x, solver=SOLVER, gradient=gradient)
    with pytest.raises(RuntimeError, match=r"donated buffers|does not currently support double backward"):  # noqa: PT012
        (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        torch.autograd.grad(first.sum(), x)


def test_regularisation_and_diagnostics_see_a_compiled_cell() -> None:
    """They need second derivatives, and products on one graph, which compiled graphs do not have."""
    p = tanh_problem()
    compiled = torch.compile(p.cell, backend="aot_eager")
    z, _ = fixed_point(compiled, p.z0, *p.inputs, gradient=PhantomGradient(2))
    z.sum().backward()  # compiled without retained buffers
    z = z.detach()
    expected, found = ([], [])
    for f, values in ((p.cell, expected), (compiled, found)):
        torch.manual_seed(0)
        penalty = jacobian_penalty(f, z, *p.inputs).mean()
        values += [penalty, *torch.autograd.grad(penalty, p.leaves, allow_unused=True, materialize_grads=True)]
        values.append(spectral_radius(f, z, *p.inputs, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(found, expected)

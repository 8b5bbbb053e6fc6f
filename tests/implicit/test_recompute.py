"""``recompute=True``: the same gradients, and no activation of f is kept for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from tests.problems import GRADIENTS, PROBLEMS, Counting, contraction, flat, generator, tanh_problem, tight
from zoo.implicit import (
    DEQ,
    GMRES,
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    NeumannGradient,
    Newton,
    PhantomGradient,
    SpectralBound,
    UnrolledGradient,
    VariationalDropout,
    fixed_point,
)

every_gradient = pytest.mark.parametrize("gradient", [g(tight(Anderson())) for g in GRADIENTS.values()], ids=GRADIENTS)


def wide_cell(width: int = 1000) -> nn.Module:
    """f(z, x) = tanh(W2 tanh(W1 z) + x), whose hidden layer is far larger than its state."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            g = generator(1)
            self.W1 = nn.Parameter(torch.randn(4, width, dtype=torch.float64, generator=g) / width**0.5)
            self.W2 = nn.Parameter(0.5 * torch.randn(width, 4, dtype=torch.float64, generator=g) / width**0.5)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(torch.tanh(z @ self.W1) @ self.W2 + x)

        def initial_state(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    return Wide()


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0)).requires_grad_()


# ----------------------------------------------------------------------------------------------------- the same numbers


@every_gradient
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", [tight(Anderson()), tight(Newton())], ids=["anderson", "newton"])
def test_gradients_are_those_without(problem: str, gradient: Any, solver: Any) -> None:
    p = PROBLEMS[problem](batch=2)
    found = []
    for recompute in (False, True):
        z, _ = DEQ(p.cell, solver, gradient, recompute=recompute)(*p.inputs)
        found.append(torch.autograd.grad((p.weights() * flat(z)).sum(), p.leaves))
    for without, with_it in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adjoint", [Newton(), GMRES()], ids=["newton", "gmres"])
def test_fixed_point_has_it_too_and_so_have_other_adjoint_solvers(adjoint: Any) -> None:
    p = tanh_problem()
    R = p.weights()
    z, _ = fixed_point(
        p.cell, p.z0, *p.inputs, solver=tight(Newton()), gradient=ImplicitGradient(tight(adjoint)), recompute=True
    )
    for ours, exact in zip(torch.autograd.grad((R * z).sum(), p.leaves), p.dense_gradients(R), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10)


@every_gradient
def test_second_derivatives_are_those_without(gradient: Any) -> None:
    p = tanh_problem(batch=2)
    found = []
    for recompute in (False, True):
        z, _ = DEQ(p.cell, tight(Anderson()), gradient, recompute=recompute)(*p.inputs)
        first = torch.autograd.grad(z.square().sum(), p.leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), p.leaves)
        assert all(bool(s.any()) for s in second)
        found.append([*first, *second])
    for without, with_it in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-10)


@every_gradient
def test_a_tensor_that_f_closes_over_gets_its_gradient(gradient: Any) -> None:
    """TorchDEQ's mem_gc gives None."""
    x, w = numbers(2, 3), (0.5 * torch.ones(3, dtype=torch.float64)).requires_grad_()
    found = []
    for recompute in (False, True):
        z, _ = fixed_point(
            lambda z, x: torch.tanh(w * z + x),
            torch.zeros_like(x),
            x,
            solver=tight(Anderson()),
            gradient=gradient,
            recompute=recompute,
        )
        found.append(torch.autograd.grad(z.square().sum(), [x, w]))
    for without, with_it in zip(*found, strict=True):
        assert without.any()
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-12)


def test_a_retained_graph_can_be_used_again() -> None:
    p = tanh_problem()
    z, _ = DEQ(p.cell, recompute=True)(*p.inputs)
    first = torch.autograd.grad(z.square().sum(), p.leaves, retain_graph=True)
    second = torch.autograd.grad(z.square().sum(), p.leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_states_of_a_trajectory() -> None:
    p = tanh_problem()
    found = []
    for recompute in (False, True):
        deq = DEQ(p.cell, Anderson(), recompute=recompute)
        z, _, states = deq(*p.inputs, trajectory=[1, 2])
        found.append(torch.autograd.grad(sum(s.square().sum() for s in [z, *states]), p.leaves))
    for without, with_it in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- the memory


def kept_entries(solve: Callable[[], Any]) -> int:
    """Entries of the largest tensor that graphs keep when ``solve`` is over, parameters aside."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = solve()
    sizes = [t.numel() for t in kept if not (t.is_leaf or (t._base is not None and t._base.is_leaf))]
    assert result is not None
    return max(sizes, default=0)


@pytest.mark.parametrize(
    "gradient",
    [ImplicitGradient(), NeumannGradient(), PhantomGradient(3), UnrolledGradient()],
    ids=lambda g: type(g).__name__,
)
def test_the_hidden_layer_is_not_kept(gradient: Any) -> None:
    cell, x = wide_cell(), numbers(8, 4)

    def kept(recompute: bool) -> int:
        solver = FixedPointIteration(max_steps=3)
        deq = DEQ(cell, solver, gradient, on_failure="ignore", recompute=recompute)
        return kept_entries(lambda: deq(x))

    assert kept(recompute=False) == 8 * 1000
    assert kept(recompute=True) <= 8 * 4


# ---------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("gradient", [ImplicitGradient(), PhantomGradient(2), UnrolledGradient()], ids=str)
def test_f_is_recomputed_under_the_autocast_of_the_forward(gradient: Any) -> None:
    """TorchDEQ's mem_gc recomputes a bfloat16 forward in float32."""
    W = nn.Parameter(contraction(8, 0.5, dtype=torch.float32))
    x = torch.randn(4, 8, generator=generator(2)).requires_grad_()
    seen: list[torch.dtype] = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        product = z @ W
        seen.append(product.dtype)
        return torch.tanh(product + x)

    found = []
    for recompute in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, _ = fixed_point(
                f, torch.zeros(4, 8), x, solver=Anderson(tol=1e-2), gradient=gradient, recompute=recompute
            )
        assert z.dtype == torch.float32
        seen.clear()
        found.append(torch.autograd.grad(z.sum(), [x, W]))
        assert bool(seen) == recompute
        assert set(seen) <= {torch.bfloat16}
    for without, with_it in zip(*found, strict=True):
        assert torch.equal(with_it, without)


def test_the_autocast_around_the_backward_pass_does_not_reach_f() -> None:
    W = nn.Parameter(contraction(8, 0.5, dtype=torch.float32))
    x = torch.randn(4, 8, generator=generator(2)).requires_grad_()
    seen: list[torch.dtype] = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        product = z @ W
        seen.append(product.dtype)
        return torch.tanh(product + x)

    z, _ = fixed_point(f, torch.zeros(4, 8), x, recompute=True)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.autograd.grad(z.sum(), x)
    assert seen
    assert set(seen) == {torch.float32}


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(contraction(16, 0.4))
        self.dropout = VariationalDropout(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(z) @ self.W.mT + x)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@every_gradient
@pytest.mark.parametrize("create_graph", [False, True])
def test_masks_are_those_of_the_forward(gradient: Any, create_graph: bool) -> None:
    cell, x = Dropping(), numbers(3, 16)
    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        z, _ = DEQ(cell, tight(Anderson()), gradient, recompute=recompute)(x)
        torch.manual_seed(6)  # other masks would be drawn here
        state = torch.get_rng_state()
        found.append([z, *torch.autograd.grad(z.square().sum(), [x, cell.W], create_graph=create_graph)])
        assert torch.equal(torch.get_rng_state(), state)  # and the generator is left as it was
    for without, with_it in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-12)


def test_a_map_that_draws_by_itself_draws_the_same() -> None:
    """Random numbers of torch's generator are restored, whoever draws them."""
    x = numbers(2, 3)
    gradient, solver = PhantomGradient(2), FixedPointIteration(max_steps=2)
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)
        z, _ = fixed_point(
            lambda z, x: torch.tanh(0.5 * z * torch.rand_like(z) + x),
            torch.zeros_like(x),
            x,
            solver=solver,
            gradient=gradient,
            on_failure="ignore",
            recompute=recompute,
        )
        found.append(torch.autograd.grad(z.square().sum(), x)[0])
    assert torch.equal(*found)


class Bounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        parametrize.register_parametrization(self.linear, "weight", SpectralBound(0.5))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


@every_gradient
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("cached", ["nowhere", "forward", "both passes"])
def test_parametrised_weights(gradient: Any, hidden: bool, cached: str) -> None:
    """Cached in the forward pass, and not in the backward pass, or the other way around."""
    cell, x = Bounded(), numbers(3, 4)
    found = []
    for recompute in (False, True):
        f = cell.forward if hidden else cell
        with ExitStack() as both, ExitStack() as forward:
            if cached != "nowhere":
                (forward if cached == "forward" else both).enter_context(parametrize.cached())
            z, _ = fixed_point(
                f, torch.zeros_like(x), x, solver=tight(Anderson()), gradient=gradient, recompute=recompute
            )
            forward.close()
            found.append(torch.autograd.grad(z.square().sum(), [x, *cell.parameters()]))
        assert not parametrize._cache
        assert not parametrize._cache_enabled
    for without, with_it in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ the price


def test_nothing_is_recomputed_where_nothing_is_recorded() -> None:
    p = tanh_problem()
    f = Counting(p.cell)
    with torch.no_grad():
        z, report = fixed_point(f, p.z0, *p.inputs, recompute=True)
    assert f.calls == report.evaluations
    assert not z.requires_grad


def test_an_evaluation_a_product() -> None:
    p = tanh_problem()
    f = Counting(p.cell)
    k = 4
    z, report = fixed_point(f, p.z0, *p.inputs, gradient=NeumannGradient(k), recompute=True)
    assert f.calls == report.evaluations + 1
    torch.autograd.grad(z.sum(), p.leaves)
    assert f.calls == report.evaluations + 1 + k + 1


def test_deq_says_so() -> None:
    p = tanh_problem()
    assert DEQ(p.cell, recompute=True).recompute
    assert not DEQ(p.cell).recompute


def test_weights_changed_before_the_backward_pass_are_refused() -> None:
    """Recomputed with other weights, the gradient would be that of another function."""
    p = tanh_problem()
    z, _ = fixed_point(p.cell, p.z0, *p.inputs, recompute=True)
    with torch.no_grad():
        p.cell.W += 0.1
    with pytest.raises(RuntimeError, match="changed in place since the forward pass"):
        z.sum().backward()

"""The implicit gradient cut after k terms: against the same sum of dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tests.problems import (
    PROBLEMS,
    Counting,
    Problem,
    contraction,
    flat,
    generator,
    slow_symmetric,
    tanh_problem,
    tight,
)
from zoo.implicit import (
    DEQ,
    Anderson,
    Gradient,
    ImplicitGradient,
    NeumannGradient,
    Newton,
    PhantomGradient,
    describe,
    fixed_point,
    from_description,
)

SOLVER = tight(Newton())


def found(p: Problem, gradient: Gradient, R: Tensor) -> Sequence[Tensor]:
    z, _ = DEQ(p.cell, SOLVER, gradient)(*p.inputs)
    return torch.autograd.grad((R * flat(z)).sum(), p.leaves)


def dense_sum(p: Problem, R: Tensor, k: int) -> Sequence[Tensor]:
    """u = R + J^T R + ... + (J^T)^k R, with the dense Jacobian of the whole batch, and u^T df/dtheta."""
    z = p.solution()
    J = torch.autograd.functional.jacobian(p._flat_cell, z).reshape(z.numel(), z.numel())  # type: ignore[no-untyped-call]
    u = term = R.flatten()
    for _ in range(k):
        term = J.mT @ term
        u = u + term
    return torch.autograd.grad(p._flat_cell(z), p.leaves, u.reshape(z.shape))


@pytest.mark.parametrize("k", [0, 1, 2, 7])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_sum_of_k_plus_1_terms(problem: str, k: int) -> None:
    p = PROBLEMS[problem](batch=2)
    R = p.weights()
    for ours, expected in zip(found(p, NeumannGradient(k), R), dense_sum(p, R, k), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_the_error_falls_as_the_spectral_radius_to_the_power_of_k() -> None:
    """With a symmetric Jacobian A, the u that is left out is A^(k+1) (I - A)^-1 R."""
    radius = 0.9
    A = slow_symmetric(6, radius)
    x = torch.randn(2, 6, dtype=torch.float64, generator=generator(1)).requires_grad_()
    R = torch.randn(2, 6, dtype=torch.float64, generator=generator(2))
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - A, R.mT).mT

    def error(k: int) -> float:
        z, _ = fixed_point(lambda z, x: z @ A + x, torch.zeros_like(x), x, solver=SOLVER, gradient=NeumannGradient(k))
        (u,) = torch.autograd.grad((R * z).sum(), x)
        torch.testing.assert_close(exact - u, exact @ torch.linalg.matrix_power(A, k + 1), rtol=0, atol=1e-10)
        return float((u - exact).norm())

    errors = [error(k) for k in (0, 20, 40, 60)]
    for longer, shorter in zip(errors[1:], errors, strict=False):
        assert longer <= 1.001 * radius**20 * shorter
    assert errors[3] > 0.5 * radius**20 * errors[2]  # and no faster, once the largest eigenvalue is left alone


def test_no_terms_are_the_one_step_gradient() -> None:
    p = tanh_problem()
    R = p.weights()
    for ours, one_step in zip(found(p, NeumannGradient(0), R), found(p, PhantomGradient(), R), strict=True):
        torch.testing.assert_close(ours, one_step, rtol=0, atol=1e-14)


def test_many_terms_are_the_implicit_gradient() -> None:
    p = tanh_problem()
    R = p.weights()
    for ours, exact in zip(found(p, NeumannGradient(100), R), p.dense_gradients(R), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11)


def test_terms_and_phantom_steps_agree_where_f_is_linear() -> None:
    """k + 1 steps of z <- f(z) from z* have the same sum in their backward pass, if J is constant."""
    p = PROBLEMS["linear"]()
    (x,) = p.inputs
    for k in (0, 3):
        gradients = []
        for gradient in (NeumannGradient(k), PhantomGradient(k + 1)):
            z, _ = DEQ(p.cell, SOLVER, gradient)(x)
            gradients.append(torch.autograd.grad((p.weights() * z).sum(), p.leaves))
        for ours, phantom in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, phantom, rtol=0, atol=1e-11)


class CountedIdentity(torch.autograd.Function):
    """z, whose backward passes are counted."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        CountedIdentity.passes += 1
        return g


@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_one_evaluation_and_k_products(k: int) -> None:
    """The pass that gives the gradient itself does not go through z: nobody asks for that."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    f = Counting(lambda z, x: torch.tanh(0.5 * CountedIdentity.apply(z) + x))
    z, report = fixed_point(f, torch.zeros_like(x), x, gradient=NeumannGradient(k))
    assert f.calls == report.evaluations + 1
    CountedIdentity.passes = 0
    before = f.calls
    torch.autograd.grad(z.sum(), x)
    assert f.calls == before
    assert CountedIdentity.passes == k


def test_no_adjoint_is_reported() -> None:
    deq = DEQ(tanh_problem().cell, SOLVER, NeumannGradient(3))
    deq(*tanh_problem().inputs)[0].sum().backward()
    assert deq.adjoint_report is None


class WideCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.V = nn.Parameter(contraction(64, 0.5)), nn.Parameter(contraction(64, 1.0, seed=1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(z @ self.W) @ self.V + x)


def test_memory_is_flat_in_the_number_of_terms() -> None:
    cell = WideCell()
    x = torch.randn(2, 64, dtype=torch.float64, generator=generator(0))

    def kept(k: int) -> tuple[int, int]:
        """Bytes that graphs save: in the forward pass, and in both passes."""
        sizes: list[int] = []

        def pack(t: Tensor) -> Tensor:
            sizes.append(t.nbytes)
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            z, _ = fixed_point(cell, torch.zeros_like(x), x, solver=Anderson(), gradient=NeumannGradient(k))
            forward = sum(sizes)
            z.sum().backward()
        return forward, sum(sizes)

    assert kept(0) == kept(50)
    assert kept(50)[0] > 0


def test_the_sum_has_second_derivatives_of_the_implicit_function() -> None:
    """Enough terms: the derivative of the truncated sum is that of the equilibrium."""
    p = tanh_problem()
    second = []
    for gradient in (NeumannGradient(120), ImplicitGradient(tight(Anderson()))):
        z, _ = DEQ(p.cell, SOLVER, gradient)(*p.inputs)
        first = torch.autograd.grad(z.square().sum(), p.leaves, create_graph=True)
        second.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), p.leaves))
    for ours, exact in zip(*second, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [-1, 1.5, True, "3", None])
def test_bad_steps_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"NeumannGradient\(steps=\.\.\.\) takes an integer >= 0; given: "):
        NeumannGradient(steps)


def test_the_description_names_the_steps() -> None:
    gradient = NeumannGradient(steps=7)
    assert from_description(describe(gradient), Gradient) == gradient  # type: ignore[type-abstract]

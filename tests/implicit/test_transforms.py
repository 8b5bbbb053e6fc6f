"""Equilibria under torch.func, forward mode and several cotangents: which are right, and how the others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.problems import GRADIENTS, tight
from zoo.implicit import Anderson, ImplicitGradient, Newton, UnrolledGradient, fixed_point

SOLVER = tight(Anderson())
CHOICES = {name: make(SOLVER) for name, make in GRADIENTS.items()} | {"newton": ImplicitGradient(tight(Newton()))}
EXACT = {"implicit", "newton", "neumann"}  # of which every product is of the adjoint equation

X = torch.tensor([[0.3], [-0.8], [0.05]], dtype=torch.float64)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func's own


def solution() -> Tensor:
    z = torch.zeros_like(X)
    for _ in range(200):
        z = torch.tanh(0.5 * z + X)
    return z


def slope() -> Tensor:
    """dz*/dx by hand."""
    s = 1 - solution().square()
    return s / (1 - s / 2)


def ones() -> Tensor:
    return torch.ones_like(X)


Solve = Callable[[Tensor], Tensor]


def dual(solve: Solve) -> Tensor | None:
    with forward_ad.dual_level():
        tangent: Tensor | None = forward_ad.unpack_dual(solve(forward_ad.make_dual(X, ones()))).tangent
        return tangent


def several(solve: Solve) -> Tensor:
    """Two cotangents at once."""
    x = X.clone().requires_grad_()
    first, second = torch.autograd.grad(solve(x), x, torch.stack([ones(), 3 * ones()]), is_grads_batched=True)[0]
    return (first + second) / 4


ASKED: dict[str, Callable[[Solve], Any]] = {
    "grad": lambda solve: torch.func.grad(lambda x: solve(x).sum())(X),
    "grad_and_value": lambda solve: torch.func.grad_and_value(lambda x: solve(x).sum())(X)[0],
    "vjp": lambda solve: torch.func.vjp(solve, X)[1](ones())[0],
    "jacrev": lambda solve: torch.func.jacrev(lambda x: solve(x).sum(0))(X)[0],
    "jvp": lambda solve: torch.func.jvp(solve, (X,), (ones(),))[1],
    "jacfwd": lambda solve: torch.func.jacfwd(lambda x: solve(x).sum(0))(X)[0],
    "dual": dual,
    "vmap of grad": lambda solve: torch.vmap(torch.func.grad(lambda x: solve(x[None]).sum()))(X),
    "functional.jacobian": lambda solve: torch.autograd.functional.jacobian(lambda x: solve(x).sum(0), X)[0],  # type: ignore[no-untyped-call]
    "functional.jvp": lambda solve: torch.autograd.functional.jvp(solve, X, ones())[1],  # type: ignore[no-untyped-call]
    "vectorized": lambda solve: torch.autograd.functional.jacobian(lambda x: solve(x).sum(0), X, vectorize=True)[0],  # type: ignore[no-untyped-call]
    "several cotangents": several,
}

REFUSED: dict[tuple[str, str], str] = (
    {(asked, name): r"UnrolledGradient\(\) only" for asked in ("jvp", "dual") for name in (*EXACT, "phantom")}
    | {
        (asked, name): "the mapped dimension part of the batch"
        for asked in ("jacfwd", "vmap of grad")
        for name in CHOICES
    }
    | {
        (asked, name): r"use torch\.autograd\.grad\(create_graph=True\)"
        for asked in ("vjp", "jacrev")
        for name in EXACT
    }
    | {
        (asked, name): r"vectorize=False\); or NeumannGradient\(\)"
        for asked in ("vectorized", "several cotangents")
        for name in ("implicit", "newton")
    }
)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("where", ["input", "closure"])
def test_right_or_refused_with_the_remedy(asked: str, name: str, where: str) -> None:
    def solve(x: Tensor) -> Tensor:
        def f(z: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(0.5 * z + (y if where == "input" else x))

        z: Tensor = fixed_point(f, torch.zeros_like(x), x, solver=SOLVER, gradient=CHOICES[name])[0]
        return z

    message = REFUSED.get((asked, name))
    if message is not None:
        with pytest.raises(NotImplementedError, match=message):
            ASKED[asked](solve)
    else:
        torch.testing.assert_close(ASKED[asked](solve), slope(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [*EXACT, "phantom"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_dual_tensor_that_only_f_knows_is_refused(name: str, warm: bool) -> None:
    """From the solution itself there is no iteration that could carry the tangent: it would be None."""
    start = solution() if warm else torch.zeros_like(X)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, ones())
        with pytest.raises(NotImplementedError, match=r"UnrolledGradient\(\) only"):
            fixed_point(lambda z: torch.tanh(0.5 * z + x), start, solver=SOLVER, gradient=CHOICES[name])


@pytest.mark.parametrize("name", CHOICES)
def test_grad_of_grad(name: str) -> None:
    def first(x: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(
            lambda x: fixed_point(
                lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x, solver=SOLVER, gradient=CHOICES[name]
            )[0].sum()
        )(x)
        return gradient.sum()

    if name == "unrolled":
        s = 1 - solution().square()
        expected = -2 * solution() * s / (1 - s / 2) ** 3
        torch.testing.assert_close(torch.func.grad(first)(X), expected, rtol=0, atol=1e-7)
    else:
        with pytest.raises(NotImplementedError, match=r"use torch\.autograd\.grad\(create_graph=True\)"):
            torch.func.grad(first)(X)


@pytest.mark.parametrize("name", CHOICES)
def test_grad_around_what_does_not_depend_on_its_variable(name: str) -> None:
    def equilibrium(x: Tensor) -> Tensor:
        z: Tensor = fixed_point(
            lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x, solver=SOLVER, gradient=CHOICES[name]
        )[0]
        return z

    found = torch.func.grad(lambda y: (y * equilibrium(X)).sum())(ones())
    torch.testing.assert_close(found, solution(), rtol=0, atol=1e-11)

    def without_gradient(x: Tensor) -> Tensor:
        with torch.no_grad():
            z = equilibrium(x)
        return (x * z).sum()

    torch.testing.assert_close(torch.func.grad(without_gradient)(X), solution(), rtol=0, atol=1e-11)


def test_forward_over_reverse_with_vectorize_is_refused() -> None:
    def loss(x: Tensor) -> Tensor:
        z, _ = fixed_point(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x, gradient=ImplicitGradient())
        return z.sum()  # type: ignore[no-any-return]

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.autograd.functional.hessian(loss, X, vectorize=True, outer_jacobian_strategy="forward-mode")  # type: ignore[no-untyped-call]


def test_no_transform_stays_behind_a_refusal() -> None:
    x = X.clone().requires_grad_()

    def solve(x: Tensor, gradient: Any) -> Tensor:
        z: Tensor = fixed_point(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), x, gradient=gradient)[0]
        return z

    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda x: solve(x, ImplicitGradient()), (X,), (ones(),))
    (found,) = torch.autograd.grad(solve(x, UnrolledGradient()).sum(), x)
    torch.testing.assert_close(found, slope(), rtol=0, atol=1e-3)

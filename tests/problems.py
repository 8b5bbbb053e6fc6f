"""Small equilibrium problems with known answers, and the table of methods that the tests of the backbone run over.

To put a new solver under all of these tests, add one line to ``SOLVERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoo.implicit import (
    GMRES,
    Anderson,
    BiCGSTAB,
    Broyden,
    FixedPointIteration,
    Gradient,
    ImplicitGradient,
    NeumannGradient,
    Newton,
    PhantomGradient,
    Solver,
    UnrolledGradient,
)

SOLVERS: dict[str, Solver] = {
    "iteration": FixedPointIteration(),
    "damped_iteration": FixedPointIteration(damping=0.7),
    "anderson": Anderson(),
    "anderson_mixing_always": Anderson(memory=5, mix_every=1, damping=0.9),
    "anderson_type_1": Anderson(kind=1),
    "broyden": Broyden(),
    "broyden_sliding": Broyden(memory=3),
    "newton": Newton(),
}

ADJOINT_SOLVERS: dict[str, Solver] = {
    **SOLVERS,
    "gmres": GMRES(),
    "gmres_restarting": GMRES(restart=3),
    "bicgstab": BiCGSTAB(),
}

GRADIENTS: dict[str, Callable[[Solver], Gradient]] = {
    "implicit": ImplicitGradient,
    "neumann": lambda _: NeumannGradient(steps=60),
    "phantom": lambda _: PhantomGradient(steps=50),
    "unrolled": lambda _: UnrolledGradient(),
}


class Method(NamedTuple):
    """How to solve and how to differentiate; with the implicit gradient the solver also solves the adjoint."""

    solver: Solver
    gradient: Gradient


def tight(solver: Solver, tol: float = 1e-13) -> Solver:
    """The solver at the limit of float64."""
    return replace(solver, tol=tol, max_steps=500)


METHODS: dict[str, Method] = {
    f"{name}-{kind}": Method(tight(solver), make(tight(solver)))
    for name, solver in SOLVERS.items()
    for kind, make in GRADIENTS.items()
} | {
    f"anderson-implicit-{name}": Method(tight(Anderson()), ImplicitGradient(tight(solver)))
    for name, solver in ADJOINT_SOLVERS.items()
    if name not in SOLVERS
}


# ---------------------------------------------------------------------------------------------------------- problems


class LinearCell(nn.Module):
    """f(z, x) = A z + x, with z* = (I - A)^-1 x."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A.clone())

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.A.mT + x

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class InjectedTanhCell(nn.Module):
    """f(z, x) = tanh(W z + U x + b)."""

    def __init__(self, W: Tensor, U: Tensor, b: Tensor) -> None:
        super().__init__()
        self.W, self.U, self.b = (nn.Parameter(p.clone()) for p in (W, U, b))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.mT + x @ self.U.mT + self.b)

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.W.shape[0])

    def jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """The other cells have none, so that Newton takes ``torch.func`` there."""
        return (1 - self.forward(z, x).square()).unsqueeze(2) * self.W


class PairCell(nn.Module):
    """Two coupled tensors of different ranks and sizes: a (B, 3) and b (B, 2, 2)."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.P = nn.Parameter(0.3 * torch.randn(3, 4, dtype=torch.float64, generator=generator))
        self.q = nn.Parameter(0.3 * torch.randn(2, 2, dtype=torch.float64, generator=generator))

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z
        new_a = torch.tanh(0.4 * b.flatten(1) @ self.P.mT + x)
        new_b = 0.4 * torch.sin(b + self.q) + 0.3 * a[:, :2, None] * x[:, None, 1:]
        return new_a, new_b

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(x.shape[0], 3), x.new_zeros(x.shape[0], 2, 2)


class NestedCell(nn.Module):
    """A dict that holds a list that holds a tensor of rank 3, with the input as a dict."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, dtype=torch.float64, generator=generator))

    def forward(self, z: dict[str, Any], x: dict[str, Tensor]) -> dict[str, Any]:
        h, (m,) = z["h"], z["rest"]
        return {
            "h": torch.tanh(0.5 * h.flip(1) * self.w + x["u"]),
            "rest": [0.4 * torch.cos(m) * self.w[0] + 0.3 * h[:, None, :1] + x["v"][:, None, :]],
        }

    def initial_state(self, x: dict[str, Tensor]) -> dict[str, Any]:
        u, v = x["u"], x["v"]
        return {"h": torch.zeros_like(u), "rest": [v.new_zeros(v.shape[0], 1, v.shape[1])]}


class Problem(NamedTuple):
    """A contraction in float64: a cell, where to start, and its inputs (which require gradients)."""

    cell: Any
    z0: Any
    inputs: tuple[Any, ...]

    @property
    def leaves(self) -> list[Tensor]:
        """All that a gradient can be asked for: parameters, then inputs."""
        return [*self.cell.parameters(), *pytree.tree_leaves(self.inputs)]

    def weights(self, seed: int = 7) -> Tensor:
        """R of the loss sum(R * z), ``(B, N)``."""
        return torch.randn(flat(self.z0).shape, dtype=torch.float64, generator=generator(seed))

    def solution(self) -> Tensor:
        """z* ``(B, N)``, by so many plain iterations that only rounding is left."""
        with torch.no_grad():
            z = self.z0
            for _ in range(400):
                z = self.cell(z, *self.inputs)
        return flat(z)

    def dense_gradients(self, R: Tensor) -> list[Tensor]:
        """d sum(R * z*) / d leaves, with u = (I - J)^-T R from the dense Jacobian of the whole batch."""
        z = self.solution()
        J = torch.autograd.functional.jacobian(self._flat_cell, z).reshape(z.numel(), z.numel())
        u = torch.linalg.solve(torch.eye(z.numel(), dtype=z.dtype) - J.mT, R.flatten())
        return list(torch.autograd.grad(self._flat_cell(z), self.leaves, u.reshape(z.shape)))

    def _flat_cell(self, z: Tensor) -> Tensor:
        return flat(self.cell(unflat(z, self.z0), *self.inputs))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(state: Any) -> Tensor:
    """A state as ``(B, N)``, without the help of the code under test."""
    return torch.cat([x.reshape(x.shape[0], x.shape[1:].numel()) for x in pytree.tree_leaves(state)], dim=1)


def unflat(matrix: Tensor, example: Any) -> Any:
    leaves, spec = pytree.tree_flatten(example)
    parts = matrix.split([x.shape[1:].numel() for x in leaves], dim=1)
    return pytree.tree_unflatten([p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)], spec)


def contraction(size: int, norm: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random matrix (not symmetric) of this spectral norm."""
    A = torch.randn(size, size, dtype=torch.float64, generator=generator(seed))
    return (A * (norm / torch.linalg.matrix_norm(A, ord=2))).to(dtype)


def slow_symmetric(size: int, largest: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues evenly spread over [-largest, largest]."""
    Q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator(seed)))
    return Q @ torch.diag(torch.linspace(-largest, largest, size, dtype=torch.float64)) @ Q.mT


def linear_problem(batch: int = 3) -> Problem:
    x = torch.randn(batch, 4, dtype=torch.float64, generator=generator(1)).requires_grad_()
    return _problem(LinearCell(contraction(4, 0.6)), x)


def tanh_problem(batch: int = 3) -> Problem:
    g = generator(2)
    U, b = (torch.randn(4, n, dtype=torch.float64, generator=g) for n in (2, 1))
    x = torch.randn(batch, 2, dtype=torch.float64, generator=g).requires_grad_()
    return _problem(InjectedTanhCell(contraction(4, 0.7), U, b.squeeze(1)), x)


def pair_problem(batch: int = 2) -> Problem:
    g = generator(3)
    x = torch.randn(batch, 3, dtype=torch.float64, generator=g).requires_grad_()
    return _problem(PairCell(g), x)


def nested_problem(batch: int = 2) -> Problem:
    g = generator(4)
    u, v = (torch.randn(batch, n, dtype=torch.float64, generator=g).requires_grad_() for n in (2, 3))
    return _problem(NestedCell(g), {"u": u, "v": v})


def _problem(cell: Any, *inputs: Any) -> Problem:
    with torch.no_grad():
        return Problem(cell, cell.initial_state(*inputs), inputs)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "linear": linear_problem,
    "tanh": tanh_problem,
    "pair": pair_problem,
    "nested": nested_problem,
}


class Counting:
    """f, and how often it was called."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.calls = 0

    def __call__(self, z: Any, *inputs: Any) -> Any:
        self.calls += 1
        return self.f(z, *inputs)


def residual(f: Callable[..., Any], z: Any, *inputs: Any, norm: str) -> Tensor:
    """``(B,)`` the residual of a state by its definition."""
    with torch.no_grad():
        fz = flat(f(z, *inputs))
        distance = (fz - flat(z)).norm(dim=1)
        return distance if norm == "absolute" else distance / fz.norm(dim=1)

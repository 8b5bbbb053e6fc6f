"""One forward and backward pass, compared at equal error of the parameters' gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .contestants import Contestant
from .counts import Counting
from .problems import Problem

TOLERANCES = tuple(0.5**k for k in range(2, 18))


@dataclass(frozen=True)
class Setting:
    """A pair of solvers with the loosest tolerance, forward and adjoint alike, that gives an error below a level.

    Attributes:
        error: ||dL/dtheta - reference|| / ||reference||.
        evaluations: of f in the forward solve.
        products: with J^T in the adjoint solve. Both solves are allowed just as many steps as they take: TorchDEQ's
            Broyden pays for what it could take.
    """

    forward: Contestant
    adjoint: Contestant
    tol: float
    error: float
    evaluations: int
    products: int

    @property
    def name(self) -> str:
        return f"{self.forward.name} / {self.adjoint.name.split(' ', 1)[1]}"

    def run(self, problem: Problem) -> tuple[Tensor, ...]:
        """The gradient of the loss with respect to f's parameters."""
        return gradient(problem, lambda: self._equilibrium(problem))

    def _equilibrium(self, problem: Problem) -> Tensor:
        return self.forward.equilibrium(
            problem.f, problem, self.tol, self.adjoint, self.tol, (self.evaluations, self.products)
        )


def gradient(problem: Problem, equilibrium: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(problem.loss(equilibrium()), tuple(problem.f.parameters()))


def reference_gradient(problem: Problem, forward: Contestant, adjoint: Contestant) -> tuple[Tensor, ...]:
    """The same to about ten digits: z* by plain iteration, and u to a tight tolerance."""
    start = replace(problem, z0=problem.solution())
    return gradient(problem, lambda: forward.equilibrium(problem.f, start, 1e-11, adjoint, 1e-11))


def relative_error(found: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """||found - reference|| / ||reference|| over all tensors together."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, reference, strict=True))
    return float((difference / sum(float(b.square().sum()) for b in reference)) ** 0.5)


def loosest_settings(
    problem: Problem,
    forward: Contestant,
    adjoint: Contestant,
    reference: Sequence[Tensor],
    levels: Sequence[float],
    max_steps: int,
) -> dict[float, Setting]:
    """For each level of error that the pair reaches, its loosest sufficient setting.

    Tolerances go down by factors of 2, until the strictest level is reached or a solve runs out of steps.
    """
    found: dict[float, Setting] = {}
    f = Counting(problem.f)
    for tol in TOLERANCES:
        f.evaluations = f.products = 0
        z = forward.equilibrium(f, problem, tol, adjoint, tol, (max_steps, max_steps))
        evaluations = f.evaluations - 1  # the last one is recorded for the gradient
        error = relative_error(torch.autograd.grad(problem.loss(z), tuple(problem.f.parameters())), reference)
        setting = Setting(forward, adjoint, tol, error, evaluations, f.products)
        for level in levels:
            if error <= level and level not in found:
                found[level] = setting
        if len(found) == len(levels) or max(evaluations, f.products) >= max_steps:
            break
    return found

"""How many evaluations of f, or vector-Jacobian products, a solver takes to a residual that is measured afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .contestants import Contestant
from .problems import Problem

ROUNDING = 1.05  # what a measured residual may be above the tolerance


class Counting(nn.Module):
    """f, and the number of its evaluations and of products with its Jacobian's transpose.

    The state is a tensor, or a tuple of tensors.
    """

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.evaluations = 0
        self.products = 0

    def forward(self, z: Any, *inputs: Any) -> Any:
        self.evaluations += 1
        return self.f(self._counted(z) if isinstance(z, Tensor) else (self._counted(z[0]), *z[1:]), *inputs)

    def _counted(self, z: Tensor) -> Tensor:
        """``z``, so that a gradient with respect to it is counted."""
        counted: Tensor = _CountBackward.apply(z, self) if z.requires_grad else z
        return counted


class _CountBackward(torch.autograd.Function):
    """The identity of z, whose backward pass adds to the counter's products."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, counter: Counting) -> Tensor:
        ctx.counter = counter
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.counter.products += 1
        return g, None


@dataclass(frozen=True)
class Count:
    """How many it took, and the residual of the worst sample at the end."""

    number: int
    residual: float
    tol: float

    @property
    def reached(self) -> bool:
        return self.residual <= ROUNDING * self.tol

    def __str__(self) -> str:
        return str(self.number) if self.reached else f"({self.number})"


def forward_count(contestant: Contestant, problem: Problem, tol: float) -> Count:
    """Evaluations of f by a contestant that is asked for ``tol``."""
    f = Counting(problem.f)
    z = contestant.solve(f, problem, tol)
    return Count(f.evaluations, float(relative_residuals(problem, z).max()), tol)


def backward_count(
    forward: Contestant, adjoint: Contestant, problem: Problem, z: Tensor, tol: float, size: float = 1.0
) -> Count:
    """Vector-Jacobian products by an adjoint that is asked for ||g - (I - J^T) u|| <= tol ||g||.

    The solve starts at z*, and g is the gradient of the problem's loss with each sample's part scaled to the norm
    ``size``: one number for all samples, so that TorchDEQ's absolute tolerance can be asked for the same. It is told
    ``tol * size``. The equation solved is that of f(z, x) + s, where dL/ds = u lets u be seen.
    """
    g = size * unit_gradient(problem, z)
    f = Counting(problem.f)
    s = torch.zeros_like(z, requires_grad=True)
    shifted = replace(problem, z0=z, inputs=(*problem.inputs, s))
    absolute = getattr(adjoint, "stop_mode", None) == "abs"
    solved = forward.equilibrium(
        lambda z, *inputs: f(z, *inputs[:-1]) + inputs[-1], shifted, 1e-9, adjoint, tol * size if absolute else tol
    )
    f.products = 0
    (u,) = torch.autograd.grad(solved, s, g)  # of s alone: the parameters' own product is not made
    return Count(f.products, float(adjoint_residuals(problem, z, u, g).max()), tol)


def residual_trace(contestant: Contestant, problem: Problem, tol: float, max_steps: int) -> list[float]:
    """After each evaluation of f, the worst sample's lowest relative residual so far."""
    lowest = torch.full((problem.z0.shape[0],), torch.inf, dtype=problem.z0.dtype)
    trace: list[float] = []

    def f(z: Tensor, *inputs: Tensor) -> Tensor:
        fz: Tensor = problem.f(z, *inputs)
        with torch.no_grad():
            lowest.copy_(torch.minimum(lowest, _rows(fz - z) / _rows(fz)))
        trace.append(float(lowest.max()))
        return fz

    contestant.solve(f, problem, tol, max_steps)
    return trace


def relative_residuals(problem: Problem, z: Tensor) -> Tensor:
    """``(B,)`` ||f(z) - z|| / ||f(z)||; infinite where it is not a number."""
    with torch.no_grad():
        fz = problem.f(z, *problem.inputs)
        return (_rows(fz - z) / _rows(fz)).nan_to_num(torch.inf)


def adjoint_residuals(problem: Problem, z: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """``(B,)`` ||g - (I - J^T) u|| / ||g|| with J at z; infinite where it is not a number."""
    z = z.detach().requires_grad_()
    (product,) = torch.autograd.grad(problem.f(z, *problem.inputs), z, u)
    return (_rows(g - u + product) / _rows(g)).nan_to_num(torch.inf)


def unit_gradient(problem: Problem, z: Tensor) -> Tensor:
    """The gradient g = dL/dz at z, each sample's scaled to norm 1."""
    z = z.detach().requires_grad_()
    (g,) = torch.autograd.grad(problem.loss(z), z)
    return g / _rows(g).view(-1, *[1] * (g.dim() - 1))


@dataclass(frozen=True)
class SampleEvaluations:
    """Rows evaluated for a batch of mixed difficulty.

    Attributes:
        whole_batch: if all rows are evaluated until all samples have stopped.
        per_sample: if each sample's end with it, after its steps + 1.
    """

    whole_batch: int
    per_sample: int


def sample_evaluations(steps: Sequence[int], evaluations: int) -> SampleEvaluations:
    """From a report's steps of each sample and its evaluations of the batch."""
    return SampleEvaluations(whole_batch=len(steps) * evaluations, per_sample=sum(k + 1 for k in steps))


def _rows(x: Tensor) -> Tensor:
    norms: Tensor = x.flatten(1).norm(dim=1)
    return norms

"""One forward and backward pass, compared at equal error of the parameters' gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoo.implicit import GMRES

from .contestants import ANDERSON, Contestant, Equation, Map, Steps, Zoo
from .counts import Counting
from .problems import Problem

TOLERANCES = tuple(0.5**k for k in range(5, 20))
TIGHT = Zoo("tight", GMRES(restart=100))

Gradient = Sequence[Tensor]


@dataclass(frozen=True)
class Pair:
    """A pair of solvers of one library with their tolerances, and what one pass with them took and gave.

    Attributes:
        tol: of the forward solve, relative to ||f(z)||.
        adjoint_tol: relative to ||g|| in the zoo, to ||u|| in TorchDEQ.
        error: ||dL/dtheta - reference|| / ||reference||.
        evaluations: of f.
        products: with J^T in the adjoint solve.
    """

    forward: Contestant
    adjoint: Contestant
    tol: float
    adjoint_tol: float
    error: float = math.nan
    evaluations: int = 0
    products: int = 0

    @property
    def name(self) -> str:
        return pair_name(self.forward, self.adjoint)

    def equilibrium_of(self, f: Map, equation: Equation, max_steps: Steps) -> Any:
        """z* with its implicit gradient."""
        if type(self.forward) is not type(self.adjoint):
            raise TypeError(f"a pair is of one library; given: {self.forward.name}, {self.adjoint.name}")
        return self.forward.equilibrium(f, equation, self.tol, self.adjoint, self.adjoint_tol, max_steps)


def pair_name(forward: Contestant, adjoint: Contestant) -> str:
    """The forward solver, and the adjoint one without its library."""
    return f"{forward.name} / {adjoint.name.partition(' ')[2]}"


P = TypeVar("P", bound=Pair)


def tight_enough(pair: P, level: float, measured: Callable[[P], P]) -> P | None:
    """The pair with its numbers; both tolerances are halved, thrice at most, until the error is below ``level``."""
    for shrink in (1, 2, 4, 8):
        found = measured(replace(pair, tol=pair.tol / shrink, adjoint_tol=pair.adjoint_tol / shrink))
        if found.error <= level:
            return found
    return None


@dataclass(frozen=True)
class Setting(Pair):
    """A pair on a :class:`Problem`. ``evaluations`` are those of the forward solve."""

    def measured(self, problem: Problem, reference: Gradient, max_steps: int) -> Setting:
        """The same with the numbers of one pass."""
        f = Counting(problem.f)
        z = self.equilibrium_of(f, problem, (max_steps, max_steps))
        evaluations = f.evaluations - 1  # the last one is recorded for the gradient
        error = relative_error(_gradient(problem, z), reference)
        return replace(self, error=error, evaluations=evaluations, products=f.products)

    def run(self, problem: Problem) -> Gradient:
        """One pass of a setting that was measured. The solves may take just the steps that they need, since TorchDEQ's
        Broyden pays for those that it may take.
        """
        return _gradient(problem, self.equilibrium_of(problem.f, problem, (self.evaluations, self.products)))


def exact_gradient(problem: Problem, z: Tensor, tol: float = 1e-10) -> Gradient:
    """dL/dtheta as if ``z`` were z*, with u to a tight tolerance."""
    at_z = replace(problem, z0=z)
    return _gradient(problem, ANDERSON.equilibrium(problem.f, at_z, math.inf, TIGHT, tol))


def relative_error(found: Gradient, reference: Gradient) -> float:
    """||found - reference|| / ||reference|| over all tensors together."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, reference, strict=True))
    return math.sqrt(difference / sum(float(b.square().sum()) for b in reference))


def loosest(error: Callable[[float], float], levels: Sequence[float]) -> dict[float, float]:
    """For each level, the first tolerance of ``TOLERANCES`` whose error is below; none where that is never so."""
    found: dict[float, float] = {}
    for tol in TOLERANCES:
        reached = error(tol)
        found |= {level: tol for level in levels if level not in found and reached <= level}
        if len(found) == len(levels):
            break
    return found


def forward_tolerances(
    s: Contestant, problem: Problem, reference: Gradient, levels: Sequence[float], max_steps: int
) -> dict[float, float]:
    """The loosest forward tolerance for each level of error, when u is exact."""

    def error(tol: float) -> float:
        z = s.solve(problem.f, problem, tol, max_steps)
        return relative_error(exact_gradient(problem, z, tol=1e-5), reference)

    return loosest(error, levels)


def adjoint_tolerances(
    forward: Contestant,
    s: Contestant,
    problem: Problem,
    z: Tensor,
    reference: Gradient,
    levels: Sequence[float],
    max_steps: int,
) -> dict[float, float]:
    """The loosest adjoint tolerance for each level of error, when the forward solve starts at z*."""
    solved = replace(problem, z0=z)
    return loosest(lambda tol: Setting(forward, s, 1e-9, tol).measured(solved, reference, max_steps).error, levels)


def settings(
    pairs: Sequence[tuple[Contestant, Contestant]],
    problem: Problem,
    levels: Sequence[float],
    max_steps: int,
) -> dict[float, list[Setting]]:
    """For each level of error, the pairs that reach it, at tolerances that are just tight enough.

    Half of the error is granted to the forward solve, and half to the adjoint. Where that is not enough for the two
    together, both tolerances are halved until it is.
    """
    z = problem.solution()
    reference = exact_gradient(problem, z)
    halves = [level / 2 for level in levels]
    first = {s.name: s for s, _ in pairs}
    second = {s.name: (forward, s) for forward, s in pairs}
    tols = {name: forward_tolerances(s, problem, reference, halves, max_steps) for name, s in first.items()}
    adjoint_tols = {
        name: adjoint_tolerances(forward, s, problem, z, reference, halves, max_steps)
        for name, (forward, s) in second.items()
    }
    found: dict[float, list[Setting]] = {level: [] for level in levels}
    for level, half in zip(levels, halves, strict=True):
        for a, b in pairs:
            tol, adjoint_tol = tols[a.name].get(half), adjoint_tols[b.name].get(half)
            if tol is None or adjoint_tol is None:
                continue
            setting = tight_enough(
                Setting(a, b, tol, adjoint_tol), level, lambda s: s.measured(problem, reference, max_steps)
            )
            if setting is not None:
                found[level].append(setting)
    return found


def _gradient(problem: Problem, z: Tensor) -> Gradient:
    return torch.autograd.grad(problem.loss(z), tuple(problem.f.parameters()))

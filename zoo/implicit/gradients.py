"""How an equilibrium is differentiated. The value is z* in every case; only the graph behind it differs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .collectives import current_agreement, in_agreement
from .driver import solve
from .implicit_function import attach_implicit, attach_straight_through
from .maps import AdjointMap, FlatMap
from .report import SolverReport
from .solvers import Anderson, Solver
from .solvers.base import _is_number, is_count

OnAdjoint = Callable[[SolverReport], None]


@dataclass(frozen=True)
class Gradient(ABC):
    """A rule that gives z* a gradient.

    Attributes:
        through_solver: whether the iterations themselves are recorded.
    """

    through_solver: ClassVar[bool] = False

    @abstractmethod
    def attach(self, f: FlatMap, z: Tensor, on_adjoint: OnAdjoint) -> Tensor:
        """``z`` with a gradient: the same ``(B, N)`` values, with a graph if anything behind f requires one.

        Args:
            f: the map whose fixed point ``z`` is.
            z: ``(B, N)``.
            on_adjoint: called with the report of each adjoint solve, in the backward pass.
        """


@dataclass(frozen=True)
class ImplicitGradient(Gradient):
    """The implicit function theorem: dL/dtheta = u^T df/dtheta, where u = J^T u + g, g = dL/dz* and J = df/dz at z*.

    Bai, Kolter and Koltun, "Deep Equilibrium Models" (NeurIPS 2019), equations 10 and 11. Memory does not grow with
    the solver's steps: one evaluation of f at z* is recorded, and both the adjoint solve and the gradients of
    parameters and inputs read that one graph.

    Args:
        solver: solves for u from u = g. With ``norm="relative"``, to a residual relative to ||g||, so that scaling the
            loss changes nothing.
    """

    solver: Solver = field(default_factory=Anderson)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(
                f"ImplicitGradient(solver=...) takes a solver, like Anderson(tol=1e-4); given: {self.solver!r}"
            )
        if self.solver.compact or self.solver.bfloat16_until is not None:
            raise ValueError(
                "ImplicitGradient(solver=...) takes a solver with compact=False and bfloat16_until=None: all products "
                f"read the graph of one evaluation, which has all rows, in one precision; given: {self.solver!r}"
            )

    def attach(self, f: FlatMap, z: Tensor, on_adjoint: OnAdjoint) -> Tensor:
        agreement = current_agreement()

        def solve_adjoint(f: AdjointMap) -> Tensor:
            with in_agreement(agreement):
                u, report, _ = solve(f, f.offset, self.solver, scale=torch.linalg.vector_norm(f.offset, dim=1))
            on_adjoint(report)
            return u

        with torch.no_grad():
            J = f.jacobian(z) if self.solver.needs_jacobian else None
        unit = self.solver.norm == "relative"  # an absolute tolerance is one for g as it is
        return attach_implicit(f.with_inputs, z, f.visible(), J, solve_adjoint, unit=unit)


@dataclass(frozen=True)
class NeumannGradient(Gradient):
    """The implicit gradient with (I - J^T)^-1 cut after ``steps`` terms: u = g + J^T g + ... + (J^T)^steps g.

    Memory does not grow with ``steps``: all products read the graph of one evaluation. The error falls as the spectral
    radius of J to the power ``steps``, if that is below 1; second derivatives are those of the equilibrium,
    with an error of the same kind. ``steps=0`` is the one-step gradient. Geng, Zhang, Bai, Wang and Lin, "On Training
    Implicit Models" (NeurIPS 2021), section 3.2.

    Args:
        steps: vector-Jacobian products, at least 0.
    """

    steps: int = 5

    def __post_init__(self) -> None:
        if not is_count(self.steps, at_least=0):
            raise ValueError(f"NeumannGradient(steps=...) takes an integer >= 0; given: {self.steps!r}")

    def attach(self, f: FlatMap, z: Tensor, on_adjoint: OnAdjoint) -> Tensor:
        def sum_series(f: AdjointMap) -> Tensor:
            u = f.offset
            for _ in range(self.steps):
                u = f(u)
            return u

        return attach_implicit(f.with_inputs, z, f.visible(), None, sum_series)


@dataclass(frozen=True)
class PhantomGradient(Gradient):
    """Backpropagation through ``steps`` damped iterations from z*: z <- (1 - damping) z + damping f(z).

    Geng, Zhang, Bai, Wang and Lin, "On Training Implicit Models" (NeurIPS 2021). No adjoint solve; a biased gradient
    whose error falls with ``steps``. ``steps=1, damping=1`` is the one-step, or Jacobian-free, gradient (u = g) of Fung
    et al., "JFB" (AAAI 2022). Memory grows with ``steps``. Second derivatives are those of the recorded steps,
    biased too.

    Args:
        steps: iterations that are recorded, at least 1.
        damping: in (0, 1]. A stabiliser for f that is not contractive, not an accelerator.
        advance: return the state after the recorded iterations, as the published code does, instead of z* itself. The
            report tells of z*; evaluation (under ``no_grad``) records nothing, and returns z* in any case.
    """

    steps: int = 1
    damping: float = 1.0
    advance: bool = False

    def __post_init__(self) -> None:
        if not is_count(self.steps, at_least=1):
            raise ValueError(f"PhantomGradient(steps=...) takes an integer >= 1; given: {self.steps!r}")
        if not (_is_number(self.damping) and 0 < self.damping <= 1):
            raise ValueError(f"PhantomGradient(damping=...) takes a number in (0, 1]; given: {self.damping!r}")
        if not isinstance(self.advance, bool):
            raise ValueError(f"PhantomGradient(advance=...) takes true or false; given: {self.advance!r}")

    def attach(self, f: FlatMap, z: Tensor, on_adjoint: OnAdjoint) -> Tensor:
        with torch.enable_grad():
            phantom = z.detach()
            for _ in range(self.steps):
                fz = f(phantom)
                phantom = fz if self.damping == 1 else torch.lerp(phantom, fz, self.damping)
        if not phantom.requires_grad:
            return z
        return phantom if self.advance else attach_straight_through(phantom, z)


@dataclass(frozen=True)
class UnrolledGradient(Gradient):
    """Backpropagation through the solver's own iterations, whichever they were. Memory grows with them.

    A sample that starts at its solution has no iterations; it gets the gradient of one step (unless z0 itself requires
    a gradient, which it then receives).
    """

    through_solver: ClassVar[bool] = True

    def attach(self, f: FlatMap, z: Tensor, on_adjoint: OnAdjoint) -> Tensor:
        return z

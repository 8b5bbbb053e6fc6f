"""How an equilibrium is differentiated. The value is z* in every case; only the graph behind it differs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .driver import solve
from .maps import AdjointMap, FlatMap, full_precision
from .report import SolverReport
from .solvers import Anderson, Solver
from .solvers.base import _is_count, _is_number

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
        solver: solves for u from u = g, to a residual relative to ||g||, so that scaling the loss changes nothing.
    """

    solver: Solver = field(default_factory=Anderson)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(
                f"ImplicitGradient(solver=...) takes a solver, like Anderson(tol=1e-4); given: {self.solver!r}"
            )

    def attach(self, f: FlatMap, z: Tensor, on_adjoint: OnAdjoint) -> Tensor:
        with torch.enable_grad():
            z_in = z.detach().requires_grad_()
            fz = f(z_in)
        if not _reaches_another_leaf(fz, z_in):
            return z
        with torch.no_grad():
            J = f.jacobian(z.detach()) if self.solver.needs_jacobian else None
        # The backward pass through fz reaches z_in too; nobody reads what is left there.
        z_in.register_post_accumulate_grad_hook(_drop_grad)

        def adjoint(g: Tensor) -> Tensor:
            with torch.no_grad(), full_precision(g.device):
                # u is linear in g, so solve for a g of size 1: the squares of a tiny one would underflow.
                peak = g.abs().amax(dim=1, keepdim=True) if g.numel() else g[:, :1]
                unit = g / peak.clamp_min(torch.finfo(g.dtype).tiny)
                scale = torch.linalg.vector_norm(unit, dim=1)
                u, report = solve(AdjointMap(z_in, fz, unit, J), unit, self.solver, scale=scale)
                u = u * peak
            on_adjoint(report)
            return _RefuseSecondDerivative.apply(u, fz, g) if torch.is_grad_enabled() else u

        attached: Tensor = _Attach.apply(fz, z, adjoint)
        return attached


@dataclass(frozen=True)
class PhantomGradient(Gradient):
    """Backpropagation through ``steps`` damped iterations from z*: z <- (1 - damping) z + damping f(z).

    Geng, Zhang, Bai, Wang and Lin, "On Training Implicit Models" (NeurIPS 2021). No adjoint solve; a biased gradient
    whose error falls with ``steps``. ``steps=1, damping=1`` is the one-step, or Jacobian-free, gradient (u = g) of Fung
    et al., "JFB" (AAAI 2022). Memory grows with ``steps``. The value stays z* itself.

    Args:
        steps: iterations that are recorded, at least 1.
        damping: in (0, 1]. A stabiliser for f that is not contractive, not an accelerator.
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        if not _is_count(self.steps, at_least=1):
            raise ValueError(f"PhantomGradient(steps=...) takes an integer >= 1; given: {self.steps!r}")
        if not (_is_number(self.damping) and 0 < self.damping <= 1):
            raise ValueError(f"PhantomGradient(damping=...) takes a number in (0, 1]; given: {self.damping!r}")

    def attach(self, f: FlatMap, z: Tensor, on_adjoint: OnAdjoint) -> Tensor:
        with torch.enable_grad():
            phantom = z.detach()
            for _ in range(self.steps):
                fz = f(phantom)
                phantom = fz if self.damping == 1 else torch.lerp(phantom, fz, self.damping)
        if not phantom.requires_grad:
            return z
        attached: Tensor = _Attach.apply(phantom, z, None)
        return attached


@dataclass(frozen=True)
class UnrolledGradient(Gradient):
    """Backpropagation through the solver's own iterations, whichever they were. Memory grows with them."""

    through_solver: ClassVar[bool] = True

    def attach(self, f: FlatMap, z: Tensor, on_adjoint: OnAdjoint) -> Tensor:
        return z


class _Attach(torch.autograd.Function):
    """The value of ``z`` with the graph of ``fz``; gradients pass through ``adjoint`` on their way, if there is one."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, adjoint: Callable[[Tensor], Tensor] | None) -> Tensor:
        ctx.adjoint = adjoint
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return (g if ctx.adjoint is None else ctx.adjoint(g)), None, None


class _RefuseSecondDerivative(torch.autograd.Function):
    """u, which raises when it is differentiated: how it depends on z*, f and g is not recorded.

    ``fz`` and ``g`` are there for their graphs: whoever differentiates with respect to anything behind them comes by.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise NotImplementedError(
            "ImplicitGradient has no second derivative: the first one was taken with create_graph=True, and now it is "
            "differentiated. Use PhantomGradient(steps=...) or UnrolledGradient() where second derivatives are needed."
        )


def _drop_grad(leaf: Tensor) -> None:
    leaf.grad = None


def _reaches_another_leaf(output: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of ``output`` ends in anything that requires a gradient besides ``leaf``."""
    if output.grad_fn is None:
        return False
    stack, seen = [output.grad_fn], {output.grad_fn}
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)  # only AccumulateGrad nodes have one
        if variable is not None and variable is not leaf:
            return True
        for upstream, _ in node.next_functions:
            if upstream is not None and upstream not in seen:
                seen.add(upstream)
                stack.append(upstream)
    return False

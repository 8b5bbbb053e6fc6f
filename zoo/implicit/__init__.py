"""Deep equilibrium layers: what is solved (a cell), how it is solved (a solver), how it is differentiated (a gradient).

>>> z, report = fixed_point(f, z0, x, solver=Anderson(tol=1e-4), gradient=ImplicitGradient())
"""

from .choices import describe, from_description
from .equilibrium import DEQ, Cell, fixed_point
from .gradients import Gradient, ImplicitGradient, PhantomGradient, UnrolledGradient
from .parametrizations import SpectralBound
from .regularization import jacobian_penalty
from .report import ConvergenceError, ConvergenceWarning, SolverReport, SolverStatus
from .solvers import Anderson, FixedPointIteration, Newton, Solver

__all__ = [
    "DEQ",
    "Anderson",
    "Cell",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPointIteration",
    "Gradient",
    "ImplicitGradient",
    "Newton",
    "PhantomGradient",
    "Solver",
    "SolverReport",
    "SolverStatus",
    "SpectralBound",
    "UnrolledGradient",
    "describe",
    "fixed_point",
    "from_description",
    "jacobian_penalty",
]

"""Deep equilibrium layers: what is solved (a cell), how it is solved (a solver), how it is differentiated (a gradient).

>>> z, report = fixed_point(f, z0, x, solver=Anderson(tol=1e-4), gradient=ImplicitGradient())
"""

from .choices import describe, from_description
from .collectives import agreeing
from .diagnostics import PathIndependence, path_independence, spectral_radius
from .dropout import VariationalDropout, one_draw
from .equilibrium import DEQ, Cell, fixed_point
from .gradients import Gradient, ImplicitGradient, NeumannGradient, PhantomGradient, UnrolledGradient
from .parametrizations import ConvolutionBound, SpectralBound, normalize_weights
from .plots import convergence_plot
from .regularization import jacobian_penalty
from .report import ConvergenceError, ConvergenceWarning, SolverReport, SolverStatus
from .solvers import GMRES, Anderson, BiCGSTAB, Broyden, FixedPointIteration, Newton, Solver
from .trajectory import Trajectory, correction_weights, fixed_point_correction
from .unroll import unroll

__all__ = [
    "DEQ",
    "GMRES",
    "Anderson",
    "BiCGSTAB",
    "Broyden",
    "Cell",
    "ConvergenceError",
    "ConvergenceWarning",
    "ConvolutionBound",
    "FixedPointIteration",
    "Gradient",
    "ImplicitGradient",
    "NeumannGradient",
    "Newton",
    "PathIndependence",
    "PhantomGradient",
    "Solver",
    "SolverReport",
    "SolverStatus",
    "SpectralBound",
    "Trajectory",
    "UnrolledGradient",
    "VariationalDropout",
    "agreeing",
    "convergence_plot",
    "correction_weights",
    "describe",
    "fixed_point",
    "fixed_point_correction",
    "from_description",
    "jacobian_penalty",
    "normalize_weights",
    "one_draw",
    "path_independence",
    "spectral_radius",
    "unroll",
]

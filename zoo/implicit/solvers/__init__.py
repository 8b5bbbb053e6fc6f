"""Root solvers: each is one file with ``init`` and ``step``."""

from .anderson import Anderson
from .base import Map, Norm, Solver
from .fixed_point_iteration import FixedPointIteration
from .newton import Newton

__all__ = ["Anderson", "FixedPointIteration", "Map", "Newton", "Norm", "Solver"]

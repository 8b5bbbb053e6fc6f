"""Root solvers: each is one file with ``init`` and ``step``."""

from .anderson import Anderson
from .base import AffineMap, Map, Norm, Solver
from .bicgstab import BiCGSTAB
from .broyden import Broyden
from .fixed_point_iteration import FixedPointIteration
from .gmres import GMRES
from .newton import Newton

__all__ = [
    "GMRES",
    "AffineMap",
    "Anderson",
    "BiCGSTAB",
    "Broyden",
    "FixedPointIteration",
    "Map",
    "Newton",
    "Norm",
    "Solver",
]

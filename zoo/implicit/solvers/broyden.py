"""Broyden's method, with a bounded memory that slides."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Map, Solver, is_count
from .secants import Secants


@dataclass(frozen=True)
class Broyden(Solver):
    """z <- z - B^-1 r for r = f(z) - z, where B is the "good" Broyden approximation of dr/dz.

    Broyden, "A class of methods for solving nonlinear simultaneous equations" (Math. Comp. 19, 1965). B starts as -I,
    and each pair s, y of changes of z and r changes it by rank one. It is not kept as a sum of such changes, which goes
    wrong when the oldest is dropped, but in the compact form of Byrd, Nocedal and Schnabel, "Representations of
    quasi-Newton matrices" (Math. Program. 63, 1994), section 5: with L the part of S S^T below the diagonal,

        B^-1 = -I + (S + Y)^T (S Y^T + L)^-1 S

    is right for whichever pairs are kept. For maps that do not contract, where Anderson stagnates.

    Args:
        memory: how many pairs are kept.
    """

    memory: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(is_count(self.memory, at_least=1), "memory", "an integer >= 1")

    def init(self, f: Map, z0: Tensor) -> Secants:
        return Secants.empty(z0, min(self.memory, max(self.max_steps, 1)))

    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: Secants) -> tuple[Tensor, Secants]:
        secants = memory.push(k, z, fz - z)
        return secants.quasi_newton(secants.SY + secants.SS, min(k, secants.S.shape[1])), secants

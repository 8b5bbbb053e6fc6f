"""BiCGSTAB, for adjoint solves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from .base import AffineMap, Map, Solver


class Probe(Enum):
    """What the next evaluation is of."""

    ITERATE = 0
    DIRECTION = 1
    HALFWAY = 2


class Memory(NamedTuple):
    """The letters of van der Vorst's paper, in which the system is (I - A) x = g."""

    x: Tensor  # (B, N)
    r: Tensor  # (B, N) the residual, by recursion; s in the second half of a step
    shadow: Tensor  # (B, N) r hat
    p: Tensor  # (B, N) the direction
    v: Tensor  # (B, N) (I - A) p
    rho: Tensor  # (B,)
    alpha: Tensor  # (B,)
    probe: Probe


@dataclass(frozen=True)
class BiCGSTAB(Solver):
    """Solves u = A u + g for a linear A, in little memory: seven vectors a sample, however many steps.

    Van der Vorst (SIAM J. Sci. Stat. Comput. 13, 1992), for each sample by itself. One iteration is two products, that
    is two steps. The recursive residual drifts away from the true one, so when all samples are within tolerance by the
    former, the latter is computed, and only that one is believed; where it is too large, the iteration starts anew from
    there.
    """

    needs_affine: ClassVar[bool] = True

    def looks(self, k: int, memory: Memory) -> bool:
        return memory.probe is Probe.ITERATE

    def init(self, f: Map, z0: Tensor) -> Memory:
        zeros = z0.new_zeros(z0.shape[0])
        return Memory(z0, z0, z0, z0, z0, zeros, zeros, Probe.ITERATE)

    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        g = cast(AffineMap, f).offset
        target = 0.99 * self.tol * (1 if self.norm == "absolute" else torch.linalg.vector_norm(g, dim=1))
        last = k + 1 == self.max_steps
        if memory.probe is Probe.ITERATE:
            r = fz - z
            memory = Memory(z, r, r, r, r, _dot(r, r), memory.alpha, Probe.DIRECTION)
            return (z, memory) if last else (r, memory)
        if memory.probe is Probe.DIRECTION:
            memory = self._first_half(memory, memory.p - (fz - g), target)
        else:
            memory = self._second_half(memory, memory.r - (fz - g), target)
        if last or not (torch.linalg.vector_norm(memory.r, dim=1) > target).any():
            return memory.x, memory._replace(probe=Probe.ITERATE)
        return (memory.r if memory.probe is Probe.HALFWAY else memory.p), memory

    def _first_half(self, memory: Memory, v: Tensor, target: Any) -> Memory:
        """Make x <- x + alpha p, r <- s = r - alpha v. Samples within tolerance stay where they are."""
        x, r, shadow, p, _, rho, _, _ = memory
        alpha = torch.where(torch.linalg.vector_norm(r, dim=1) > target, _quotient(rho, _dot(shadow, v)), 0)
        step = alpha.unsqueeze(1)
        return Memory(x + step * p, r - step * v, shadow, p, v, rho, alpha, Probe.HALFWAY)

    def _second_half(self, memory: Memory, t: Tensor, target: Any) -> Memory:
        """Make x <- x + omega s, r <- s - omega t, and the next direction."""
        x, s, shadow, p, v, rho, alpha, _ = memory
        omega = torch.where(torch.linalg.vector_norm(s, dim=1) > target, _quotient(_dot(t, s), _dot(t, t)), 0)
        step = omega.unsqueeze(1)
        x, r = x + step * s, s - step * t
        new_rho = _dot(shadow, r)
        beta = _quotient(new_rho, rho) * _quotient(alpha, omega)
        direction = r + beta.unsqueeze(1) * (p - step * v)
        # Where the shadow has become orthogonal to r, or a step was zero, the next would be too: start anew from r.
        lengths = torch.linalg.vector_norm(shadow, dim=1) * torch.linalg.vector_norm(r, dim=1)
        stuck = (new_rho.abs() <= torch.finfo(r.dtype).eps * lengths) | (beta == 0)
        column = stuck.unsqueeze(1)
        return Memory(
            x,
            r,
            torch.where(column, r, shadow),
            torch.where(column, r, direction),
            v,
            torch.where(stuck, _dot(r, r), new_rho),
            alpha,
            Probe.DIRECTION,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """``(B, N), (B, N)`` -> ``(B,)``."""
    return (a * b).sum(dim=1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """The quotient a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))

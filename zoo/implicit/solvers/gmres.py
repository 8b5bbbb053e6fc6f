"""GMRES, for adjoint solves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from .base import AffineMap, Map, Solver, is_count
from .krylov import orthogonalized


class Memory(NamedTuple):
    """One cycle: an orthonormal basis V of the Krylov space, and H with (I - A) V_k = V_(k+1) H."""

    x: Tensor  # (B, N) the iterate that the cycle started from
    V: Tensor  # (B, m + 1, N)
    H: Tensor  # (B, m + 1, m) upper Hessenberg
    left: Tensor  # (B, m + 1) the unit vector with left^T H = 0
    estimate: Tensor  # (B,) ||r|| of the best x + V^T y
    size: int  # vectors multiplied in this cycle; -1 where the next evaluation is that of an iterate


@dataclass(frozen=True)
class GMRES(Solver):
    """Solves u = A u + g for a linear A: x + V^T y with the smallest residual over the Krylov space of (I - A) and r.

    Saad and Schultz (SIAM J. Sci. Stat. Comput. 7, 1986), for each sample by itself. The norm of the residual comes
    with the left null vector of H (Ayachour, J. Comput. Appl. Math. 159, 2003), y by back substitution. When all
    samples are within tolerance by that estimate the iterate is formed and its residual is computed anew; only that one
    is believed. The right tool where the Jacobian has a spectral radius above 1; for contractions Anderson takes about
    as many products.

    Args:
        restart: vectors of a cycle; memory grows with it. A product is a step.
    """

    restart: int = 20

    needs_affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(is_count(self.restart, at_least=1), "restart", "an integer >= 1")

    def looks(self, k: int, memory: Memory) -> bool:
        return memory.size < 0

    def init(self, f: Map, z0: Tensor) -> Memory:
        batch, n = z0.shape
        m = min(self.restart, max(self.max_steps, 1))
        return Memory(
            x=z0,
            V=z0.new_zeros(batch, m + 1, n),
            H=z0.new_zeros(batch, m + 1, m),
            left=z0.new_zeros(batch, m + 1),
            estimate=z0.new_zeros(batch),
            size=-1,
        )

    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        g = cast(AffineMap, f).offset
        target = self._target(g)
        memory = self._start(z, fz - z, memory) if memory.size < 0 else self._extend(g, fz, memory, target)
        full = memory.size == memory.H.shape[2] or k + 1 == self.max_steps
        if full or not (memory.estimate > target).any():
            return self._iterate(memory), memory._replace(size=-1)
        return memory.V[:, memory.size], memory

    def _target(self, g: Tensor) -> Tensor:
        """``(B,)`` what the estimate is to reach: a little less than ``tol``, being one, and at least rounding."""
        size = torch.linalg.vector_norm(g, dim=1)
        tol = torch.full_like(size, self.tol) if self.norm == "absolute" else self.tol * size
        return torch.maximum(0.99 * tol, torch.finfo(g.dtype).eps * size)

    def _start(self, x: Tensor, r: Tensor, memory: Memory) -> Memory:
        estimate = torch.linalg.vector_norm(r, dim=1)
        memory.V[:, 0] = r / estimate.clamp_min(torch.finfo(r.dtype).tiny).unsqueeze(1)
        memory.left.zero_()[:, 0] = 1
        return memory._replace(x=x, estimate=estimate, size=0)

    def _extend(self, g: Tensor, fv: Tensor, memory: Memory, target: Tensor) -> Memory:
        """One step of Arnoldi's process, with f(v) = A v + g at the last basis vector v.

        Samples within tolerance get a vector of zeros, with which nothing of them changes in the rest of the cycle:
        what came after an exhausted Krylov space would be made of rounding.
        """
        _, V, H, left, estimate, j = memory
        w = V[:, j] - (fv - g)
        size = torch.linalg.vector_norm(w, dim=1)
        basis = V[:, : j + 1]
        w, h = orthogonalized(w, basis)
        rounding = torch.finfo(w.dtype).eps * size.clamp_min(torch.finfo(w.dtype).tiny ** 0.5)
        length = torch.linalg.vector_norm(w, dim=1).clamp_min(rounding)
        H[:, : j + 1, j] = h
        H[:, j + 1, j] = length
        entry = -(left[:, : j + 1] * h).sum(dim=1) / length
        growth = torch.hypot(entry, torch.ones_like(entry))
        left[:, j + 1] = entry
        left[:, : j + 2] /= growth.unsqueeze(1)
        estimate = estimate / growth
        V[:, j + 1] = torch.where((estimate > target).unsqueeze(1), w / length.unsqueeze(1), 0)
        return memory._replace(estimate=estimate, size=j + 1)

    def _iterate(self, memory: Memory) -> Tensor:
        """The iterate x + V^T y with the y that minimises the residual."""
        x, V, H, left, estimate, j = memory
        # That residual is estimate * V^T left; the rows of H below the first say which y makes it.
        right = -(estimate.unsqueeze(1) * left[:, 1 : j + 1]).unsqueeze(2)
        y = torch.linalg.solve_triangular(H[:, 1 : j + 1, :j], right, upper=True)
        return x + torch.bmm(y.mT, V[:, :j]).squeeze(1)

"""Anderson acceleration, with a ridge that does not depend on the scale of the residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .base import Map, Solver, _is_number, is_count
from .secants import Secants


class Memory(NamedTuple):
    """The last ``memory`` evaluations of each sample, in a ring."""

    values: Tensor  # (B, m, N) F_i = f(z_i)
    residuals: Tensor  # (B, m, N) r_i = f(z_i) - z_i
    gram: Tensor  # (B, m, m) r_i . r_j


@dataclass(frozen=True)
class Anderson(Solver):
    """z <- sum_i a_i (z_i + damping r_i), where the a_i minimise ||sum_i a_i r_i|| subject to sum_i a_i = 1.

    Walker and Ni, "Anderson acceleration for fixed-point iterations" (SIAM J. Numer. Anal. 49, 2011). Each sample
    has its own a. With unit rows u_i = r_i / ||r_i|| and d_i = 1 / ||r_i||, the minimum is a_i = d_i b_i / sum(d b),
    where (U U^T + ridge I) b = d: the ridge is relative, so scaling the state changes nothing, and float32 with a
    Cholesky factorisation is enough. The Gram matrix is kept, and only the rows of new residuals are computed.

    With ``kind=1`` the a_i are such that sum_i a_i r_i is orthogonal to all differences of iterates instead of all
    differences of residuals (type I; Fang and Saad, Numer. Linear Algebra Appl. 16, 2009). It takes twice the products,
    about as many evaluations where f contracts, and solves some maps that do not, on which type II stagnates.

    Mixing every second evaluation, with a plain step between ("alternating Anderson-Picard", Banerjee, Suryanarayana
    and Pask, Chem. Phys. Lett. 647, 2016), takes about as many evaluations as mixing at each, at half the overhead.

    Args:
        memory: how many evaluations are kept; a multiple of ``mix_every``.
        mix_every: mix, and look at the residual, at every so many evaluations.
        ridge: Tikhonov term, relative to residual rows of unit norm.
        damping: how much of the mixed residual is added, in (0, 1].
        kind: 2 or 1.
    """

    memory: int = 10
    mix_every: int = 2
    ridge: float = 1e-6
    damping: float = 1.0
    kind: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(is_count(self.mix_every, at_least=1), "mix_every", "an integer >= 1")
        self._require(
            is_count(self.memory, at_least=1) and self.memory % self.mix_every == 0,
            "memory",
            f"a positive multiple of mix_every={self.mix_every}",
        )
        self._require(_is_number(self.ridge) and self.ridge > 0, "ridge", "a number > 0")
        self._require(is_count(self.kind, at_least=1) and self.kind <= 2, "kind", "1 or 2")
        self._require(_is_number(self.damping) and 0 < self.damping <= 1, "damping", "a number in (0, 1]")

    def looks(self, k: int, memory: Memory | Secants) -> bool:
        return (k + 1) % self.mix_every == 0

    def init(self, f: Map, z0: Tensor) -> Memory | Secants:
        if self.kind == 1:
            return Secants.empty(z0, self.memory - 1)
        batch, size = z0.shape
        return Memory(
            values=z0.new_empty(batch, self.memory, size),
            residuals=z0.new_empty(batch, self.memory, size),
            gram=z0.new_zeros(batch, self.memory, self.memory),
        )

    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: Memory | Secants) -> tuple[Tensor, Memory | Secants]:
        if isinstance(memory, Secants):
            secants = memory.push(k, z, fz - z)
            if (k + 1) % self.mix_every:
                return torch.lerp(z, fz, self.damping), secants
            # Like -I, the inverse step at the start, the ridge keeps S Y^T on the side of contractions.
            K = secants.SY - self.ridge * torch.eye(self.memory - 1, dtype=z.dtype, device=z.device)
            return secants.quasi_newton(K, min(k, self.memory - 1), self.damping), secants
        return self._mix(k, z, fz, memory)

    def _mix(self, k: int, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        if torch.is_grad_enabled():  # unrolled: autograd keeps the old buffers, so write into new ones
            memory = Memory(*(buffer.clone() for buffer in memory))
        values, residuals, gram = memory
        slot = k % self.memory
        values[:, slot] = fz
        residuals[:, slot] = fz - z

        if (k + 1) % self.mix_every:
            return (fz if self.damping == 1 else torch.lerp(z, fz, self.damping)), memory

        count = min(k + 1, self.memory)
        new = slice(slot + 1 - self.mix_every, slot + 1)
        block = torch.bmm(residuals[:, new], residuals[:, :count].mT)
        gram[:, new, :count] = block
        gram[:, :count, new] = block.mT
        a = self._weights(gram[:, :count, :count], slot).unsqueeze(1)  # (B, 1, count)
        mixed = torch.bmm(a, values[:, :count])
        if self.damping != 1:
            mixed = mixed - (1 - self.damping) * torch.bmm(a, residuals[:, :count])
        return mixed.squeeze(1), memory

    def _weights(self, gram: Tensor, latest: int) -> Tensor:
        """``(B, n, n)`` Gram matrices of residuals -> ``(B, n)`` weights a that sum to 1."""
        tiny = torch.finfo(gram.dtype).tiny
        norms = gram.diagonal(dim1=1, dim2=2).clamp_min(tiny).sqrt()
        d = norms.amin(dim=1, keepdim=True) / norms
        unit_gram = gram / (norms.unsqueeze(2) * norms.unsqueeze(1))
        unit_gram.diagonal(dim1=1, dim2=2).add_(self.ridge)
        factor, info = torch.linalg.cholesky_ex(unit_gram)
        a = d * torch.cholesky_solve(d.unsqueeze(2), factor).squeeze(2)
        a = a / a.sum(dim=1, keepdim=True)
        # A sample whose Gram matrix is numerically indefinite takes a plain step.
        plain = torch.zeros_like(a)
        plain[:, latest] = 1
        return torch.where((info == 0).unsqueeze(1), a, plain)

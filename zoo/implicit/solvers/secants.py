"""Differences of successive iterates and residuals, which quasi-Newton steps are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Secants(NamedTuple):
    """The last m pairs s = z_i - z_(i-1), y = r_i - r_(i-1) of each sample, in a ring, both divided by ||s||."""

    z: Tensor  # (B, N) the last iterate
    r: Tensor  # (B, N) its residual f(z) - z
    S: Tensor  # (B, m, N) unit rows
    Y: Tensor  # (B, m, N)
    SY: Tensor  # (B, m, m) s_i . y_j
    SS: Tensor  # (B, m, m) s_i . s_j where pair i is younger than pair j, else 0
    Sr: Tensor  # (B, m) s_i . r, with the last residual

    @staticmethod
    def empty(z0: Tensor, size: int) -> Secants:
        batch, n = z0.shape
        return Secants(
            z=z0,
            r=z0,
            S=z0.new_zeros(batch, size, n),
            Y=z0.new_zeros(batch, size, n),
            SY=z0.new_zeros(batch, size, size),
            SS=z0.new_zeros(batch, size, size),
            Sr=z0.new_zeros(batch, size),
        )

    def push(self, k: int, z: Tensor, r: Tensor) -> Secants:
        """Take in evaluation k: the pair that leads to it replaces the oldest one."""
        size = self.S.shape[1]
        if k == 0 or size == 0:
            return self._replace(z=z, r=r)
        secants = self
        if torch.is_grad_enabled():  # unrolled: autograd keeps the old buffers, so write into new ones
            secants = Secants(*(buffer.clone() for buffer in self))
        S, Y, SY, SS = secants.S, secants.Y, secants.SY, secants.SS
        s, y = z - self.z, r - self.r
        moved = (s != 0).any(dim=1, keepdim=True)  # a sample that sits at its solution does not
        length = torch.linalg.vector_norm(torch.where(moved, s, 1), dim=1, keepdim=True)
        s, y = s / length, y / length
        slot, count = (k - 1) % size, min(k, size)
        S[:, slot], Y[:, slot] = s, y
        products = torch.bmm(torch.stack((y, s, r), dim=1), S[:, :count].mT)  # (B, 3, count)
        SY[:, slot, :count] = torch.bmm(s.unsqueeze(1), Y[:, :count].mT).squeeze(1)
        SY[:, :count, slot] = products[:, 0]
        SS[:, :, slot] = 0
        SS[:, slot, :count] = products[:, 1]
        SS[:, slot, slot] = 0
        secants.Sr[:, :count] = products[:, 2]
        return secants._replace(z=z, r=r)

    def quasi_newton(self, K: Tensor, count: int, damping: float = 1.0) -> Tensor:
        """The step to z + damping r - (S + damping Y)^T gamma with K gamma = S r; a plain step where K is singular.

        K = SY makes a type-I Anderson step, K = SY + SS a step of Broyden's method.
        """
        plain = self.z + damping * self.r
        if count == 0:
            return plain
        K, right = K[:, :count, :count], self.Sr[:, :count].unsqueeze(2)
        with torch.no_grad():
            gamma, info = torch.linalg.solve_ex(K, right)
            usable = ((info == 0) & gamma.isfinite().all(dim=1).squeeze(1))[:, None, None]
        if torch.is_grad_enabled():  # where K is singular, not even its gradient may be looked at
            identity = torch.eye(count, dtype=K.dtype, device=K.device)
            gamma = torch.linalg.solve(torch.where(usable, K, identity), right)
        gamma = torch.where(usable, gamma, 0).mT  # (B, 1, count)
        correction = torch.bmm(gamma, self.S[:, :count]) + damping * torch.bmm(gamma, self.Y[:, :count])
        return plain - correction.squeeze(1)

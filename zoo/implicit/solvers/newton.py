"""Newton's method with a dense Jacobian, for small states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Map, Solver


@dataclass(frozen=True)
class Newton(Solver):
    """z <- z + (I - J)^-1 (f(z) - z), with J = df/dz of shape (N, N) for each sample.

    Converges quadratically near a solution, contractive or not. The Jacobian comes from the cell if it has a method
    ``jacobian(z, *inputs) -> (B, N, N)``, else from ``torch.func``, at the price of N vector-Jacobian products; the
    solve costs N^3. On the (linear) adjoint equation one step is exact.

    A sample with a singular I - J is reported as non-finite; its batch mates go on.
    """

    needs_jacobian: ClassVar[bool] = True

    def init(self, f: Map, z0: Tensor) -> None:
        return None

    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: None) -> tuple[Tensor, None]:
        J = f.jacobian(z)
        identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        update, info = torch.linalg.solve_ex(identity - J, (fz - z).unsqueeze(2))
        update = torch.where((info == 0)[:, None], update.squeeze(2), torch.nan)
        return z + update, None

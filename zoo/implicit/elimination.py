"""Small systems of linear equations in plain tensor operations, for graphs: ONNX has no decompositions."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_definite(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The x with A x = b for symmetric positive definite A, by elimination without pivoting.

    Shape:
        A ``(B, m, m)``, b ``(B, m)`` -> x ``(B, m)``, and whether all pivots were positive, ``(B,)``, as those of a
        Cholesky factorisation have to be. Where they were not, x has values without meaning.
    """
    m = A.shape[1]
    rows = torch.cat([A, b.unsqueeze(2)], dim=2)  # (B, m, m + 1)
    places = torch.arange(m, device=A.device)
    pivots = []
    for j in range(m):
        pivots.append(rows[:, j, j])
        rows = _eliminated(rows, rows[:, j], j, (places == j).to(A.dtype))
    return rows[:, :, m], (torch.stack(pivots, dim=1) > 0).all(dim=1)


def solve_pivoting(A: Tensor, b: Tensor) -> Tensor:
    """The x with A x = b by Gauss-Jordan elimination with partial pivoting; not finite where A is singular.

    Shape:
        A ``(B, m, m)``, b ``(B, m)`` -> ``(B, m)``.
    """
    m = A.shape[1]
    rows = torch.cat([A, b.unsqueeze(2)], dim=2)  # (B, m, m + 1)
    places = torch.arange(m, device=A.device)
    free = torch.ones_like(b, dtype=torch.bool)  # rows that were no pivot yet
    found = []
    for j in range(m):
        size = torch.where(free, rows[:, :, j].abs(), -1)
        at = places == size.argmax(dim=1, keepdim=True)  # (B, m)
        free = free & ~at
        at = at.to(A.dtype)
        rows = _eliminated(rows, torch.bmm(at.unsqueeze(1), rows).squeeze(1), j, at)
        found.append(at)
    # Row i solves for the unknown j at which it was the pivot.
    return torch.bmm(torch.stack(found, dim=1), rows[:, :, m:]).squeeze(2)


def _eliminated(rows: Tensor, pivot: Tensor, j: int, at: Tensor) -> Tensor:
    """``(B, m, n)`` rows with a 1 in column j of the ``pivot`` row ``(B, n)``, which stands at ``at``, and 0 elsewhere."""
    unit = pivot / pivot[:, j : j + 1]
    factor = rows[:, :, j] - at  # of the pivot row itself: p - 1, so that it becomes p u - (p - 1) u = u
    return rows - factor.unsqueeze(2) * unit.unsqueeze(1)

"""Small systems of linear equations in plain tensor operations, for graphs: ONNX has no decompositions."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_definite(A: Tensor, b: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The x with A x = b for symmetric positive definite A, by elimination without pivoting.

    Args:
        A: ``(B, m, m)``; from row and column ``count`` on those of the identity.
        b: ``(B, m)``; 0 there.
        count: how many unknowns there are, a number.

    Returns:
        x ``(B, m)``, and whether all pivots were positive, ``(B,)``, as those of a Cholesky factorisation have to be.
        Where they were not, x has values without meaning.
    """

    def goes_on(j: Tensor, *_: Tensor) -> Tensor:
        return j < count

    def eliminate(j: Tensor, rows: Tensor, definite: Tensor) -> tuple[Tensor, ...]:
        row = rows.index_select(1, j.view(1)).squeeze(1)
        pivot = row.index_select(1, j.view(1)).squeeze(1)
        here = torch.arange(rows.shape[1], device=rows.device) == j
        return j + 1, _eliminated(rows, row, j, here), definite & (pivot > 0)

    start = torch.zeros_like(count), torch.cat([A, b.unsqueeze(2)], dim=2), torch.ones_like(b[:, 0], dtype=torch.bool)
    _, rows, definite = torch.while_loop(goes_on, eliminate, start)
    return rows[:, :, -1], definite


def solve_pivoting(A: Tensor, b: Tensor, count: Tensor) -> Tensor:
    """The x with A x = b by Gauss-Jordan elimination with partial pivoting; not finite where A is singular.

    Args:
        A, b, count: see :func:`solve_definite`; A need be neither symmetric nor definite.

    Returns:
        ``(B, m)``.
    """

    def goes_on(j: Tensor, *_: Tensor) -> Tensor:
        return j < count

    def eliminate(j: Tensor, rows: Tensor, free: Tensor, x_row: Tensor) -> tuple[Tensor, ...]:
        places = torch.arange(rows.shape[1], device=rows.device)
        column = rows.index_select(2, j.view(1)).squeeze(2)
        largest = torch.where(free, column.abs(), -1).argmax(dim=1, keepdim=True)
        here = places == largest  # (B, m)
        row = torch.bmm(here.to(rows.dtype).unsqueeze(1), rows).squeeze(1)
        rows = _eliminated(rows, row, j, here)
        return j + 1, rows, free & ~here, torch.where(places == j, largest, x_row)

    m = A.shape[1]
    start = (
        torch.zeros_like(count),
        torch.cat([A, b.unsqueeze(2)], dim=2),  # (B, m, m + 1)
        torch.ones_like(b, dtype=torch.bool),  # rows that were no pivot yet
        torch.arange(m, device=A.device).expand_as(b).clone(),  # which row has come to say what x_j is
    )
    _, rows, _, x_row = torch.while_loop(goes_on, eliminate, start)
    x = rows[:, :, m].gather(1, x_row)
    return torch.where(torch.arange(m, device=A.device) < count, x, 0)


def _eliminated(rows: Tensor, pivot: Tensor, j: Tensor, here: Tensor) -> Tensor:
    """Rows ``(B, m, n)``: that of the pivot with a 1 in column j, the others with a 0.

    Args:
        rows: of the system.
        pivot: one of them, ``(B, n)``.
        j: the column.
        here: which row it is, a mask that broadcasts to ``(B, m)``.
    """
    unit = (pivot / pivot.index_select(1, j.view(1))).unsqueeze(1)
    others = rows - rows.index_select(2, j.view(1)) * unit
    return torch.where(here.unsqueeze(-1), unit, others)

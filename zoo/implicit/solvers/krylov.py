"""What methods that build an orthonormal basis of a Krylov space share."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalized(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, N)`` w without its components along the orthonormal rows of ``(B, k, N)`` basis, and these, ``(B, k)``.

    Classical Gram-Schmidt, twice: the second pass takes what rounding left.
    """
    h = w.new_zeros(w.shape[0], basis.shape[1])
    for _ in range(2):
        part = torch.bmm(w.unsqueeze(1), basis.mT)  # (B, 1, k): as rows, since bmm is slow with columns on a CPU
        w = w - torch.bmm(part, basis).squeeze(1)
        h = h + part.squeeze(1)
    return w, h

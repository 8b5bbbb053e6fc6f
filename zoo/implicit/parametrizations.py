"""Weights with a guarantee, by ``torch.nn.utils.parametrize``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .maps import full_precision


class SpectralBound(nn.Module):
    """W = V min(1, bound / ||V||_2), so that ||W||_2 <= bound, exactly.

    With ``bound < 1`` and a cell z -> phi(Wz + x) whose phi has slopes in [-1, 1], the cell is a contraction: its
    equilibrium exists, is unique, and plain iteration finds it. The norm is the largest singular value itself, not a
    power-iteration estimate, at the price of one eigenvalue decomposition of V V^T a solve.

    Args:
        bound: a positive number.

    Example:
        >>> torch.nn.utils.parametrize.register_parametrization(linear, "weight", SpectralBound(0.9))
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"SpectralBound(bound=...) takes a positive number; given: {bound!r}")
        self.bound = bound

    def forward(self, V: Tensor) -> Tensor:
        """``(m, n)`` -> ``(m, n)``."""
        if V.dim() != 2:
            raise ValueError(f"SpectralBound takes a matrix of shape (m, n); given: shape {tuple(V.shape)}")
        with full_precision(V.device):
            wide = V.to(torch.promote_types(V.dtype, torch.float32))
            gram = wide @ wide.mT if V.shape[0] <= V.shape[1] else wide.mT @ wide
            squared_norm = torch.linalg.eigvalsh(gram)[-1]
            scale: Tensor = (self.bound**2 / squared_norm.clamp_min(self.bound**2)).sqrt()
            return V * scale.to(V.dtype)

    def right_inverse(self, W: Tensor) -> Tensor:
        """The parameter that an assignment ``module.weight = W`` stores."""
        return W

    def extra_repr(self) -> str:
        return f"bound={self.bound}"

"""Plain (Picard) iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Map, Solver, _is_number


@dataclass(frozen=True)
class FixedPointIteration(Solver):
    """z <- (1 - damping) z + damping f(z).

    Converges when f is contractive, at the rate of the spectral radius of its Jacobian. The cheapest step there
    is; Anderson needs fewer of them. ``damping < 1`` helps where the Jacobian has large negative eigenvalues.

    Args:
        damping: step length in (0, 1].
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(_is_number(self.damping) and 0 < self.damping <= 1, "damping", "a number in (0, 1]")

    def init(self, f: Map, z0: Tensor) -> None:
        return None

    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: None) -> tuple[Tensor, None]:
        return (fz if self.damping == 1 else torch.lerp(z, fz, self.damping)), None

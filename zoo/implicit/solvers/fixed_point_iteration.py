"""Plain (Picard) iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Map, Solver, _is_number, is_count


@dataclass(frozen=True)
class FixedPointIteration(Solver):
    """z <- (1 - damping) z + damping f(z).

    Converges when f is contractive, at the rate of the spectral radius of its Jacobian. The cheapest step there
    is; Anderson needs fewer of them. ``damping < 1`` helps where the Jacobian has large negative eigenvalues.

    Args:
        damping: step length in (0, 1].
        check_every: look at the residual at every so many evaluations. Looking costs about as much as evaluating a
            very small f.
    """

    damping: float = 1.0
    check_every: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(_is_number(self.damping) and 0 < self.damping <= 1, "damping", "a number in (0, 1]")
        self._require(is_count(self.check_every, at_least=1), "check_every", "an integer >= 1")

    def looks(self, k: int, memory: None) -> bool:
        return (k + 1) % self.check_every == 0

    def init(self, f: Map, z0: Tensor) -> None:
        return None

    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: None) -> tuple[Tensor, None]:
        return (fz if self.damping == 1 else torch.lerp(z, fz, self.damping)), None

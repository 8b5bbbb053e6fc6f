"""What a solver is: frozen hyper-parameters with ``init`` and ``step``. The loop stands once, in the driver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

from torch import Tensor

Norm = Literal["relative", "absolute"]


class Map(Protocol):
    """The map z -> f(z) on ``(B, N)`` matrices whose rows are independent samples."""

    def __call__(self, z: Tensor, /) -> Tensor:
        """``(B, N)`` -> ``(B, N)``."""
        ...

    def jacobian(self, z: Tensor, /) -> Tensor:
        """``(B, N)`` -> ``(B, N, N)``, entry ``[b, i, j]`` = d f(z)_bi / d z_bj."""
        ...


@dataclass(frozen=True)
class Solver(ABC):
    """A method that makes z = f(z) true, sample by sample.

    Args:
        tol: a sample has converged when its residual ``||f(z) - z||`` is at most ``tol`` (times ``||f(z)||``, or
            ``||g||`` in an adjoint solve, when ``norm`` is relative). Euclidean norms over all entries of a sample.
        norm: ``"relative"`` or ``"absolute"``.
        max_steps: updates made at most; f is evaluated at most ``max_steps + 1`` times.

    Raises:
        ValueError: an argument is out of its range.
    """

    tol: float = 1e-4
    norm: Norm = "relative"
    max_steps: int = 50

    needs_jacobian: ClassVar[bool] = False  # whether ``step`` calls ``f.jacobian``

    def __post_init__(self) -> None:
        self._require(_is_number(self.tol) and self.tol >= 0, "tol", "a number >= 0")
        self._require(self.norm in get_args(Norm), "norm", "'relative' or 'absolute'")
        self._require(_is_count(self.max_steps, at_least=0), "max_steps", "an integer >= 0")

    @property
    def check_every(self) -> int:
        """The driver looks at residuals at the start and at every so many evaluations."""
        return 1

    @abstractmethod
    def init(self, f: Map, z0: Tensor) -> Any:
        """The solver's memory before the first step."""

    @abstractmethod
    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """One update. What the solver itself holds never changes; ``memory`` is passed on, and may be written in place.

        Args:
            f: the map, for solvers that need more of it than ``fz``.
            k: how many updates were made before.
            z: ``(B, N)`` the current iterate.
            fz: ``(B, N)`` f(z).
            memory: what ``init`` or the last step returned.

        Returns:
            the next iterate ``(B, N)`` and the memory after it.
        """

    def _require(self, holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}({field}=...) takes {expected}; given: {getattr(self, field)!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least

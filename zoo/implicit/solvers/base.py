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

    def project(self, z: Tensor, /) -> Tensor:
        """``z`` as f will see it: a state that is narrower than solver arithmetic is rounded."""
        ...

    def select(self, index: Tensor, /) -> Map:
        """The same map on the samples ``index`` only."""
        ...


class AffineMap(Map, Protocol):
    """A map z -> A z + offset."""

    @property
    def offset(self) -> Tensor:
        """``(B, N)``."""
        ...


@dataclass(frozen=True)
class Solver(ABC):
    """A method that makes z = f(z) true, sample by sample.

    Args:
        tol: a sample has converged when its residual ``||f(z) - z||`` is at most ``tol`` (times ``||f(z)||``, or
            ``||g||`` in an adjoint solve, when ``norm`` is relative). Euclidean norms over all entries of a sample.
        norm: ``"relative"`` or ``"absolute"``.
        max_steps: updates made at most; f is evaluated at most ``max_steps + 1`` times.
        compact: take samples that have stopped out of the batch, so that f is evaluated on the others only. For f that
            is slow and batches of mixed difficulty. f must reach everything that has one row a sample through its
            arguments. Not for adjoint solves: the graph that they read has all rows.
        bfloat16_until: evaluate f under bfloat16 autocast until the relative residual is at most this, and then without
            autocast, in the dtype of the state, to ``tol``. The floor of the former is about 1e-3, so 5e-3 is a good
            value. Not for adjoint solves.

    Raises:
        ValueError: an argument is out of its range.
    """

    tol: float = 1e-4
    norm: Norm = "relative"
    max_steps: int = 50
    compact: bool = False
    bfloat16_until: float | None = None

    needs_jacobian: ClassVar[bool] = False  # whether ``step`` calls ``f.jacobian``
    needs_affine: ClassVar[bool] = False  # whether f must be an ``AffineMap``, as that of an adjoint solve is

    def __post_init__(self) -> None:
        self._require(_is_number(self.tol) and self.tol >= 0, "tol", "a number >= 0")
        self._require(self.norm in get_args(Norm), "norm", "'relative' or 'absolute'")
        self._require(is_count(self.max_steps, at_least=0), "max_steps", "an integer >= 0")
        self._require(isinstance(self.compact, bool), "compact", "true or false")
        until = self.bfloat16_until
        self._require(until is None or (_is_number(until) and until > 0), "bfloat16_until", "a number > 0, or None")

    def looks(self, k: int, memory: Any) -> bool:
        """Whether the driver looks at the residual of evaluation k (it always does at the first and the last)."""
        return True

    @abstractmethod
    def init(self, f: Map, z0: Tensor) -> Any:
        """The solver's memory before the first step."""

    @abstractmethod
    def step(self, f: Map, k: int, z: Tensor, fz: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """One update.

        What the solver itself holds never changes; ``memory`` is passed on, and may be written in place.

        Args:
            f: the map, for solvers that need more of it than ``fz``.
            k: how many updates were made before.
            z: ``(B, N)`` the current iterate.
            fz: ``(B, N)`` f(z).
            memory: what ``init`` or the last step returned.

        Returns:
            where f is evaluated next, ``(B, N)``, and the memory after it. That is the next iterate, unless ``looks``
            will say otherwise.
        """

    def _require(self, holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}({field}=...) takes {expected}; given: {getattr(self, field)!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least

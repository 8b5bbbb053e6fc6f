"""Losses on states on the way to the equilibrium."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .gradients import Gradient, PhantomGradient, UnrolledGradient
from .state import State

Weights = Literal["exponential", "linear", "constant"]


@dataclass(frozen=True)
class Trajectory:
    """Which states of a solve are returned besides z*, and how they are differentiated.

    Bai, Geng, Savani and Kolter, "Deep Equilibrium Optical Flow Estimation" (CVPR 2022), section 3.3.

    Args:
        steps: after how many updates, increasing, from 1 to the solver's ``max_steps``.
        gradient: of these states; :class:`PhantomGradient` with its defaults if not given. z* has its own.
        sliced: False takes the states from one solve, which they do not change. True cuts the solve there: each slice
            starts from the state that the last one returned (which ``PhantomGradient(advance=True)`` has moved on),
            with an empty memory.

    A sample that has converged before a step is returned there in the state in which it stopped.
    """

    steps: Sequence[int]
    gradient: Gradient = field(default_factory=PhantomGradient)
    sliced: bool = False

    def __post_init__(self) -> None:
        steps = tuple(self.steps)
        counts = all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in steps)
        if not (steps and counts and all(a < b for a, b in itertools.pairwise(steps))):
            raise ValueError(f"Trajectory(steps=...) takes increasing integers >= 1; given: {self.steps!r}")
        if not isinstance(self.gradient, Gradient) or isinstance(self.gradient, UnrolledGradient):
            raise TypeError(
                "Trajectory(gradient=...) takes PhantomGradient(...), NeumannGradient(...) or ImplicitGradient(...); "
                f"given: {self.gradient!r}"
            )
        object.__setattr__(self, "steps", steps)


def as_trajectory(steps: Trajectory | Iterable[int]) -> Trajectory:
    """What was given, or ``Trajectory(steps)``, with an error that tells what may be given."""
    if isinstance(steps, Trajectory):
        return steps
    if not isinstance(steps, Iterable):
        raise TypeError(f"trajectory= takes numbers of updates, like [4, 8], or a Trajectory; given: {steps!r}")
    return Trajectory(tuple(steps))


def correction_weights(count: int, kind: Weights = "exponential", gamma: float = 0.8) -> list[float]:
    """The weights of ``count`` states, the last of which is z* and has weight 1.

    ``"exponential"``: gamma^(count - 1 - k). ``"linear"``: 1 - gamma (count - 1 - k) / count. ``"constant"``: 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    if count < 1:
        raise ValueError(f"correction_weights(count=...) takes an integer >= 1; given: {count!r}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"correction_weights(gamma=...) takes a number in [0, 1]; given: {gamma!r}")
    before_last = range(count - 1, -1, -1)
    if kind == "exponential":
        return [float(gamma**k) for k in before_last]
    if kind == "linear":
        return [1 - gamma * k / count for k in before_last]
    if kind == "constant":
        return [1.0] * count
    raise ValueError(f"correction_weights(kind=...) takes one of {', '.join(get_args(Weights))}; given: {kind!r}")


def fixed_point_correction(
    loss: Callable[[State], Tensor], states: Sequence[State], kind: Weights = "exponential", gamma: float = 0.8
) -> Tensor:
    """sum_k weight_k loss(state_k), the fixed-point correction loss.

    Args:
        loss: of one state, a scalar or one entry a sample.
        states: in the order of the solve, z* last.
        kind, gamma: see :func:`correction_weights`.

    Returns:
        what ``loss`` returns.

    Example:
        >>> z, report, states = deq(x, trajectory=[4, 8])
        >>> fixed_point_correction(lambda z: criterion(head(z), y), [*states, z]).backward()
    """
    weights = correction_weights(len(states), kind, gamma)
    terms = [weight * loss(state) for weight, state in zip(weights, states, strict=True)]
    return torch.stack(terms).sum(dim=0)

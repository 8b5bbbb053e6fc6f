"""Timing on a machine that drifts: everything that is compared takes turns in the same rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Times:
    """Seconds that one action took, round by round; shorter than the others' where its budget ran out."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: Times) -> float:
        """The median over rounds of this action's time over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=False))


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    budget: float = float("inf"),
    warm_up: bool = True,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Times]:
    """Time each action once a round. Each round starts with another action.

    Args:
        actions: what is timed.
        rounds: at most.
        budget: seconds for each action. One that has spent it sits out after ``MIN_ROUNDS`` rounds, and one that is so
            slow that it has spent five times as much sits out at once.
        warm_up: do each action once before, uncounted.
        clock: seconds; those of the processor in this process, which on one thread are those of the clock on the wall
            but for what other processes take.
    """
    for action in actions.values() if warm_up else ():
        action()
    names = list(actions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    try:
        for k in range(rounds):
            gc.collect()
            gc.disable()  # as timeit does: a collection would fall on whoever's turn it is
            for name in (*names[k % len(names) :], *names[: k % len(names)]):
                if sum(seconds[name]) > (budget if k >= MIN_ROUNDS else 5 * budget):
                    continue
                start = clock()
                actions[name]()
                seconds[name].append(clock() - start)
            gc.enable()
    finally:
        if enabled:
            gc.enable()
        else:
            gc.disable()
    return {name: Times(values) for name, values in seconds.items()}

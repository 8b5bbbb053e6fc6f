"""A training step of a DEQ flow, differentiated in several ways, and of RAFT: its peak of memory, and its time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_large

import zoo
from lightning_modules.memory import peak_bytes
from zoo.flow import DEQFlow, FlowCell
from zoo.implicit import (
    Anderson,
    FixedPointIteration,
    Gradient,
    ImplicitGradient,
    PhantomGradient,
    Trajectory,
    fixed_point_correction,
)

from .clock import interleaved
from .command import Data

IMPLICIT, PHANTOM = "implicit gradient", "phantom gradient"
CORRECTED, AGAIN = "phantom gradient, trajectory", "phantom gradient, trajectory, recompute"
UNROLLED, RAFT = "unrolled, as RAFT trains", "torchvision's raft_large"
BUDGET = 8.0
"""Seconds for the rounds of each way, after the first three."""


@dataclass(frozen=True)
class Images:
    """How many pairs of images of which size."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.height} x {self.width}"

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Two images ``(B, 3, H, W)`` of noise: what is measured does not depend on what they show."""
        generator = torch.Generator().manual_seed(0)
        one, two = torch.rand(2, self.batch, 3, self.height, self.width, generator=generator)
        return one, two


@dataclass(frozen=True)
class Training:
    """A training step that is measured.

    Attributes:
        model: a registered one, as it is initialised.
        images: one batch.
        depths: at how many solver steps, or applications of the cell, memory is measured.
        compared: at which of these the ways are compared.
        timed: at how many time is measured.
        losses: states with a loss, where there is a trajectory.
    """

    model: str
    images: Images
    depths: Sequence[int] = (6, 12, 24, 48)
    compared: int = 24
    timed: int = 12
    losses: int = 6


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        flows: those that have a loss, the last one last, after so many solver steps or applications.
        model: whose parameters are trained.
    """

    flows: Callable[[int], list[Tensor]]
    model: nn.Module

    def step(self, depth: int) -> None:
        """The gradient of all parameters."""
        loss = fixed_point_correction(lambda flow: (flow - 1).abs().mean(), self.flows(depth))
        torch.autograd.grad(loss, tuple(self.model.parameters()))


def training(plan: Training, rounds: int) -> Data:
    """Bytes ``[way][depth]`` at the peak of a training step, and its seconds.

    Every solve makes all its steps. So does the adjoint one of the implicit gradient, with a memory of 10.
    """
    one, two = plan.images.drawn()
    model = created(plan.model).train()
    ways = _ways(model, one, two, plan.losses)
    if plan.model == "deq_flow_base":  # whose update is that of raft_large
        raft = raft_large().train()
        ways[RAFT] = Way(lambda count: list(raft(2 * one - 1, 2 * two - 1, num_flow_updates=count)), raft)
    times = interleaved({name: partial(way.step, plan.timed) for name, way in ways.items()}, rounds, BUDGET)
    peaks = {name: [peak_bytes(partial(way.step, n)) for n in plan.depths] for name, way in ways.items()}
    at = list(plan.depths).index(plan.compared)
    return {
        "images": str(plan.images),
        "losses": plan.losses,
        "depths": list(plan.depths),
        "encoders": peak_bytes(lambda: _encoders(model, one, two)),
        "bytes": peaks,
        "compared": plan.compared,
        "ratio": {name: peaks[UNROLLED][at] / sizes[at] for name, sizes in peaks.items()},
        "timed": plan.timed,
        "seconds": {name: item.median for name, item in times.items()},
        "time_ratio": {name: item.ratio(times[UNROLLED]) for name, item in times.items()},
    }


def created(name: str) -> DEQFlow:
    """A registered DEQ flow, initialised in the same way each time. Its solves may end anywhere."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = cast(DEQFlow, zoo.create_model(name))
    model.deq.on_failure = "ignore"
    return model


def spread(count: int, steps: int) -> list[int]:
    """After which of so many steps the first ``count - 1`` of equally spaced states are; the last one is the end."""
    return sorted({max(1, round(steps * k / count)) for k in range(1, count)} - {steps})


def _ways(model: DEQFlow, one: Tensor, two: Tensor, losses: int) -> dict[str, Way]:
    unrolled = copy.deepcopy(model)
    cast(FlowCell, unrolled.deq.cell).all_grad = False  # RAFT does not differentiate a look-up by where it is
    phantom = PhantomGradient(steps=1, advance=True)

    def solved(steps: int, gradient: Gradient) -> list[Tensor]:
        model.deq.solver, model.deq.gradient = FixedPointIteration(tol=0, max_steps=steps), gradient
        return [model(one, two)]

    def implicit(steps: int) -> list[Tensor]:
        return solved(steps, ImplicitGradient(Anderson(tol=0, max_steps=steps)))

    def corrected(steps: int, *, recompute: bool) -> list[Tensor]:
        model.deq.solver, model.deq.gradient = FixedPointIteration(tol=0, max_steps=steps), phantom
        model.deq.recompute = recompute
        try:
            return list(model(one, two, trajectory=Trajectory(spread(losses, steps), phantom, sliced=True)))
        finally:
            model.deq.recompute = False

    def applied(count: int) -> list[Tensor]:
        unrolled.deq.unrolled = count
        return list(unrolled(one, two, trajectory=range(1, count)))

    return {
        IMPLICIT: Way(implicit, model),
        PHANTOM: Way(partial(solved, gradient=phantom), model),
        CORRECTED: Way(partial(corrected, recompute=False), model),
        AGAIN: Way(partial(corrected, recompute=True), model),
        UNROLLED: Way(applied, unrolled),
    }


def _encoders(model: DEQFlow, one: Tensor, two: Tensor) -> None:
    """What all ways share: both encoders, forward and backward."""
    total = model.features(torch.cat([one, two])).mean() + model.context(one).mean()
    weights = (*model.feature_encoder.parameters(), *model.context_encoder.parameters())
    torch.autograd.grad(total, weights)

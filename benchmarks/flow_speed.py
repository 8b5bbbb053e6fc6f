"""Time of an iteration of DEQ flow's solve, beside RAFT's loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models import optical_flow
from torchvision.models.optical_flow import raft

from zoo.flow import DEQFlow, FlowCell
from zoo.implicit import FixedPointIteration

from .clock import Times, interleaved
from .command import Data
from .flow_steps import Images, created

OURS = "DEQ flow"
BARE = "its cell, in torchvision's loop"


@dataclass(frozen=True)
class Inference:
    """Calls that are timed.

    Attributes:
        model: a registered DEQ flow.
        peer: the model of torchvision's that it is compared with.
        images: one batch.
        iterations: of the shorter calls; the longer ones make twice as many.
    """

    model: str
    peer: str
    images: Images
    iterations: int = 12


class TorchvisionLoop:
    """RAFT's loop on the weights of a DEQ flow: torchvision's look-up and update, and one upsampling at the end.

    Args:
        model: whose weights these are. Normalised ones are computed once a call.
    """

    def __init__(self, model: DEQFlow) -> None:
        self.model = model
        self.cell = cast(FlowCell, model.deq.cell)
        self.correlation = raft.CorrBlock(num_levels=model.corr_levels, radius=self.cell.corr_radius)

    @torch.no_grad()
    def __call__(self, image1: Tensor, image2: Tensor, iterations: int) -> Tensor:
        """``(B, 2, H, W)`` after so many iterations; the images are floating in [0, 1], of multiples of 8 pixels."""
        model = self.model
        F1, F2 = model.features(torch.cat([image1, image2])).chunk(2)
        context = model.context(image1)
        self.correlation.build_pyramid(F1, F2)
        grid = raft.make_coords_grid(len(F1), *F1.shape[2:])
        h, c = torch.zeros_like(context), grid
        with parametrize.cached():
            for _ in range(iterations):
                h, delta = self.cell.update_block(h, context, self.correlation.index_pyramid(c), c - grid)
                c = c + delta
        flow: Tensor = raft.upsample_flow(c - grid, model.mask_predictor(h))
        return flow


def inference(plan: Inference, rounds: int) -> Data:
    """Seconds of a call and of an iteration, ``[who]``, and their ratios to torchvision's model.

    An iteration is what a call of twice as many takes longer, divided by the difference.
    """
    one, two = plan.images.drawn()
    model = created(plan.model).eval()
    peer: nn.Module = getattr(optical_flow, plan.peer)().eval()

    @torch.no_grad()
    def ours(iterations: int) -> Tensor:
        return solved(model, one, two, iterations)

    @torch.no_grad()
    def theirs(iterations: int) -> Tensor:
        flow: Tensor = peer(2 * one - 1, 2 * two - 1, num_flow_updates=iterations)[-1]
        return flow

    calls: dict[str, Callable[[int], Tensor]] = {
        OURS: ours,
        f"torchvision's {plan.peer}": theirs,
        BARE: partial(TorchvisionLoop(model), one, two),
    }
    short, long = plan.iterations, 2 * plan.iterations
    times = interleaved(
        {f"{name} {n}": partial(call, n) for name, call in calls.items() for n in (short, long)}, rounds
    )
    whole = {name: times[f"{name} {short}"] for name in calls}
    each = {name: _difference(times[f"{name} {long}"], whole[name], long - short) for name in calls}
    return {
        "images": str(plan.images),
        "iterations": short,
        "ways": {
            name: {
                "iteration": each[name].median,
                "iteration_ratio": each[OURS].ratio(each[name]),
                "call": whole[name].median,
                "call_ratio": whole[OURS].ratio(whole[name]),
            }
            for name in calls
        },
    }


def solved(model: DEQFlow, image1: Tensor, image2: Tensor, iterations: int) -> Tensor:
    """The flow after so many plain iterations from rest; nothing stops early."""
    model.deq.solver = FixedPointIteration(tol=0, max_steps=iterations)
    flow: Tensor = model(image1, image2)
    return flow


def _difference(long: Times, short: Times, count: int) -> Times:
    return Times([(a - b) / count for a, b in zip(long.seconds, short.seconds, strict=True)])

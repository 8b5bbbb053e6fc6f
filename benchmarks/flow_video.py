"""Video: how far each solve has to go, from rest and from the frame before, and by which solver."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoo.flow import DEQFlow
from zoo.implicit import Anderson, Broyden, FixedPointIteration, Solver

from .command import Data
from .flow_weights import Loaded

STARTS = {"cold": False, "warm": True}
SOLVERS: Mapping[str, Solver] = {
    "FixedPointIteration": FixedPointIteration(check_every=1),
    "Anderson": Anderson(),
    "Broyden": Broyden(),
}


@dataclass(frozen=True)
class Video:
    """How far the solves of a video go.

    Attributes:
        depths: solves of so many steps.
        tolerances: and solves to these relative residuals.
        equal: solves by each solver of so many evaluations.
        tol: and to this relative residual.
        most: steps of any solve.
        margin: EPEs count as equal up to this fraction.
    """

    depths: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
    tolerances: Sequence[float] = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
    equal: Sequence[int] = (4, 8, 12, 24)
    tol: float = 1e-3
    most: int = 60
    margin: float = 0.01


@dataclass(frozen=True)
class Played:
    """What came of a video, over all pairs of frames but the first of each.

    Attributes:
        epe: mean distance of flow and truth over all pixels, in pixels.
        evaluations: of the cell, mean over pairs; each as if its sequence were alone.
        solved: fraction of pairs that reached the tolerance.
    """

    epe: float
    evaluations: float
    solved: float


def played(found: Loaded, first: Solver, solver: Solver, *, warm_start: bool) -> Played:
    """The sequences through a stream; ``first`` is the solver of their first pairs, which nothing comes before."""
    model = copy.deepcopy(found.model)
    model.deq.on_failure = "ignore"
    stream = model.stream(warm_start)
    errors: list[Tensor] = []
    evaluations: list[Tensor] = []
    solved: list[Tensor] = []
    for t, frame in enumerate(found.frames.unbind(dim=1)):
        model.deq.solver = first if t < 2 else solver
        flow = stream(frame)
        report = model.deq.report
        if t >= 2 and flow is not None and report is not None:
            errors.append((flow - found.flow[:, t - 1]).norm(dim=1)[found.valid[:, t - 1]])
            evaluations.append(report.steps + 1)
            solved.append(report.converged)
    epe, each, share = (torch.cat(parts).double().mean() for parts in (errors, evaluations, solved))
    return Played(float(epe), float(each), float(share))


def video(plan: Video, found: Loaded) -> Data:
    """Cold and warm starts by the model's own solver: EPE against evaluations, at equal steps and at equal tolerances.

    A solve of k steps takes k + 1 evaluations, the last of which tells its residual.
    """
    own = _looking_always(found.model)
    converged = replace(own, tol=1e-6, norm="relative", max_steps=plan.most)
    reference = played(found, converged, converged, warm_start=False)
    enough = (1 + plan.margin) * reference.epe
    limited = {
        start: [played(found, converged, replace(own, tol=0, max_steps=k), warm_start=warm).epe for k in plan.depths]
        for start, warm in STARTS.items()
    }
    least = {start: _least(plan.depths, epes, enough) for start, epes in limited.items()}
    cold, warm = least["cold"], least["warm"]
    pairs = found.flow.shape[1]
    return {
        "sequences": found.frames.shape[0],
        "frames": found.frames.shape[1],
        "size": list(found.frames.shape[3:]),
        "solver": str(found.model.deq.solver),
        "zero": float(found.flow[:, 1:].norm(dim=2)[found.valid[:, 1:]].mean()),
        "converged": vars(reference),
        "most": plan.most,
        "margin": plan.margin,
        "depths": list(plan.depths),
        "epe": limited,
        "least": least,
        "ratio": None if cold is None or warm is None else cold / warm,
        "ratio_with_first": None if cold is None or warm is None else pairs * cold / (cold + (pairs - 1) * warm),
        "tolerances": [
            {"tol": tol, "norm": norm} | _both(found, converged, replace(own, tol=tol, norm=norm, max_steps=plan.most))
            for tol, norm in [*((tol, "relative") for tol in plan.tolerances), (own.tol, own.norm)]
        ],
    }


def solvers(plan: Video, found: Loaded) -> Data:
    """Each solver from rest and warm: evaluations to a tolerance, and EPE of as many evaluations from rest."""
    converged = replace(_looking_always(found.model), tol=1e-6, norm="relative", max_steps=plan.most)
    return {
        "tol": plan.tol,
        "equal": list(plan.equal),
        "ways": {
            name: _both(found, converged, replace(solver, tol=plan.tol, max_steps=plan.most))
            | {
                "epe": [
                    played(found, converged, replace(solver, tol=0, max_steps=n - 1), warm_start=False).epe
                    for n in plan.equal
                ]
            }
            for name, solver in SOLVERS.items()
        },
    }


def _both(found: Loaded, first: Solver, solver: Solver) -> dict[str, Any]:
    ways = {start: played(found, first, solver, warm_start=warm) for start, warm in STARTS.items()}
    return {
        **{start: vars(way) for start, way in ways.items()},
        "ratio": ways["cold"].evaluations / ways["warm"].evaluations,
    }


def _looking_always(model: DEQFlow) -> Solver:
    """The model's solver; a plain iteration looks at each residual, so that counts are not rounded up."""
    solver = model.deq.solver
    return replace(solver, check_every=1) if isinstance(solver, FixedPointIteration) else solver


def _least(depths: Sequence[int], epes: Sequence[float], enough: float) -> int | None:
    """The fewest evaluations from which on the EPE stays low enough; None if it does not end so."""
    least = None
    for k, epe in reversed(list(zip(depths, epes, strict=True))):
        if epe > enough:
            break
        least = k + 1
    return least

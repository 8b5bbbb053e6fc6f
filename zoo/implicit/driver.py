"""The one loop that all solvers share.

It owns the stopping rule, the count of evaluations, the best state so far, samples that stopped, values that are
not finite, and the report. The result of a sample that has stopped is frozen, though it is evaluated on as long as it
is in the batch: nothing that happens later can change it, so it does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .collectives import current_agreement, everywhere
from .report import SolverReport, SolverStatus, empty_report
from .solvers.base import Map, Solver

_DROP_FROM = 0.25  # rows leave the batch when at least this share of those present has stopped: copying has its price


@dataclass
class _Rows:
    """What is known of each sample that is present; all tensors have one entry, or one row, a sample."""

    best: Tensor  # (B, N) the iterate of the lowest residual so far
    residual: Tensor  # (B,) its residual in the solver's norm; the largest number of its dtype before there is one
    distance: Tensor  # (B,) its ||f(z) - z||
    start_distance: Tensor  # (B,)
    largest_distance: Tensor  # (B,) of those looked at
    improved: Tensor  # (B,) whether an iterate after the start was better than all before
    converged: Tensor  # (B,)
    failed: Tensor  # (B,) whether f was not finite
    steps: Tensor  # (B,)

    def scatter(self, into: _Rows, index: Tensor) -> _Rows:
        """These rows written to the places ``index`` of the whole batch."""
        pairs = ((getattr(into, item.name), getattr(self, item.name)) for item in fields(self))
        return _Rows(*(whole.index_copy(0, index, part) for whole, part in pairs))

    def gather(self, index: Tensor) -> _Rows:
        return _Rows(*(getattr(self, item.name).index_select(0, index) for item in fields(self)))


def solve(
    f: Map,
    z0: Tensor,
    solver: Solver,
    *,
    scale: Tensor | None = None,
    trace: bool = False,
    keep: Collection[int] = (),
) -> tuple[Tensor, SolverReport, dict[int, Tensor]]:
    """Iterate ``solver`` on z = f(z) from ``z0`` until every sample has stopped, in all processes if they agree on it.

    Differentiable by backpropagation through the iterations when grad mode is on.

    Args:
        f: the map on ``(B, N)`` matrices.
        z0: ``(B, N)`` the start.
        solver: what makes the steps.
        scale: ``(B,)`` what a relative residual is relative to; ``||f(z)||`` by default.
        trace: keep the residual of every evaluation.
        keep: numbers of updates after which the iterate is kept.

    Returns:
        ``(B, N)``, for each sample the iterate of the lowest residual that was looked at; the report; and the iterates
        ``(B, N)`` that were asked for. A sample that stopped before is there in the state in which it stopped.
    """
    if z0.shape[0] == 0 and current_agreement() is None:  # f(z0) has a graph, so that unrolled gradients exist
        fz = f(z0)
        return fz, empty_report(z0.device, z0.dtype, trace=trace), dict.fromkeys(keep, fz)
    return _Solve(f, z0, solver, scale, trace=trace).run(keep)


class _Solve:
    """The state of one solve."""

    def __init__(self, f: Map, z0: Tensor, solver: Solver, scale: Tensor | None, *, trace: bool) -> None:
        self.f = f
        self.z0 = z0
        self.solver = solver
        self.scale = scale
        self.trace: list[Tensor] | None = [] if trace else None
        batch = z0.shape[0]
        none = torch.zeros(batch, dtype=torch.bool, device=z0.device)
        lowest = torch.full((batch,), torch.finfo(z0.dtype).max, dtype=z0.dtype, device=z0.device)
        steps = torch.full((batch,), solver.max_steps, device=z0.device)
        self.rows = _Rows(z0, lowest, lowest, lowest, torch.zeros_like(lowest), none, none, none, steps)
        self.all_improved = ~none
        self.stopped: Tensor | None = None  # (B,), None while no sample has stopped
        self.present: Tensor | None = None  # where the rows stand in the whole batch, once some have left it
        self.whole = self.rows  # the rows of the whole batch, up to date for those that have left
        self.some_failed = False
        self.row_evaluations = 0

    def run(self, keep: Collection[int]) -> tuple[Tensor, SolverReport, dict[int, Tensor]]:
        solver = self.solver
        z = self.z0
        memory = solver.init(self.f, z)
        kept: dict[int, Tensor] = {}
        for k in range(solver.max_steps + 1):
            if k in keep:
                kept[k] = self._iterate_of_all(z)
            if self.some_failed:  # f may refuse what is not finite
                z = torch.where(self.rows.failed.unsqueeze(1), self.rows.best, z)
            fz = self.f(z)
            self.row_evaluations += z.shape[0]
            last = k == solver.max_steps
            looking = k == 0 or last or solver.looks(k, memory)
            if looking:
                done = self._look(k, z, fz)
            elif self.trace is not None:
                self.trace.append(torch.full_like(self.whole.residual, torch.nan))
            if last or everywhere(done, z.device):
                break
            if looking and solver.compact and self.stopped is not None:
                z, fz, memory = self._drop(self.stopped, z, fz, memory)
            proposed, memory = solver.step(self.f, k, z, fz, memory)
            z = self.f.project(proposed)
        rows = self._rows_of_all()
        return rows.best, self._report(rows, evaluations=k + 1), {at: kept.get(at, rows.best) for at in keep}

    def _look(self, k: int, z: Tensor, fz: Tensor) -> bool:
        """Judge the iterate ``z``; whether all samples have stopped."""
        rows = self.rows
        with torch.no_grad():
            distance, residual = _residual(z, fz, self.solver, self.scale)
            better = residual <= rows.residual  # also False where it is not finite
            if k == 0:
                rows.start_distance = distance
            rows.largest_distance = torch.maximum(rows.largest_distance, distance)
            if self.stopped is None:
                # The common case: no sample stops, and all have come closer.
                if (better & (residual > self.solver.tol)).all():
                    rows.best, rows.residual, rows.distance = z, residual, distance
                    if k > 0:
                        rows.improved = self.all_improved
                    if self.trace is not None:
                        self.trace.append(self._residual_of_all(residual))
                    return z.shape[0] == 0
                stopped = torch.zeros_like(rows.converged)
            else:
                stopped = self.stopped
                better = better & ~stopped
            rows.residual = torch.where(better, residual, rows.residual)
            rows.distance = torch.where(better, distance, rows.distance)
            within = better & (residual <= self.solver.tol)
            if k > 0 and self.solver.norm == "relative":
                # A relative residual falls also when z merely runs away; f(z) - z itself has to become smaller.
                within &= (distance < 0.99 * rows.largest_distance) | (distance == 0)
            rows.converged = rows.converged | within
            rows.failed = rows.failed | ~(residual.isfinite() | stopped)
            if k > 0:
                rows.improved = rows.improved | better
            now_stopped = rows.converged | rows.failed
            rows.steps = torch.where(now_stopped & ~stopped, k, rows.steps)
            if self.trace is not None:
                self.trace.append(self._residual_of_all(torch.where(stopped, rows.residual, residual)))
            # One transfer to the host for all decisions.
            all_stopped, some_stopped, all_better, self.some_failed = torch.stack(
                (now_stopped.all(), now_stopped.any(), better.all(), rows.failed.any())
            ).tolist()
        rows.best = z if all_better else torch.where(better.unsqueeze(1), z, rows.best)
        self.stopped = now_stopped if some_stopped else None
        return bool(all_stopped)

    def _drop(self, stopped: Tensor, z: Tensor, fz: Tensor, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Take the samples that stopped out of the batch, if they are many enough to be worth it."""
        index = (~stopped).nonzero().squeeze(1)
        if index.numel() > (1 - _DROP_FROM) * z.shape[0]:
            return z, fz, memory
        self.whole = self._rows_of_all()
        self.present = index if self.present is None else self.present[index]
        self.rows = self.rows.gather(index)
        self.all_improved = torch.ones_like(self.rows.converged)
        self.stopped, self.some_failed = None, False
        self.f = self.f.select(index)
        memory = pytree.tree_map_only(Tensor, lambda x: x.index_select(0, index), memory)
        return z.index_select(0, index), fz.index_select(0, index), memory

    def _rows_of_all(self) -> _Rows:
        return self.rows if self.present is None else self.rows.scatter(self.whole, self.present)

    def _iterate_of_all(self, z: Tensor) -> Tensor:
        if self.stopped is not None:
            z = torch.where(self.stopped.unsqueeze(1), self.rows.best, z)
        return z if self.present is None else self.whole.best.index_copy(0, self.present, z)

    def _residual_of_all(self, residual: Tensor) -> Tensor:
        return residual if self.present is None else self.whole.residual.index_copy(0, self.present, residual)

    def _report(self, rows: _Rows, evaluations: int) -> SolverReport:
        # A relative residual falls also when z merely runs away; the distance tells.
        diverged = ~rows.improved | (rows.distance > rows.start_distance)
        status = torch.full_like(rows.steps, SolverStatus.MAX_STEPS)
        if evaluations > 1:
            status.masked_fill_(diverged, SolverStatus.DIVERGED)
        status.masked_fill_(rows.failed, SolverStatus.NON_FINITE).masked_fill_(rows.converged, SolverStatus.CONVERGED)
        never_finite = rows.residual == torch.finfo(rows.residual.dtype).max
        return SolverReport(
            residual=rows.residual.masked_fill(never_finite, torch.inf),
            steps=rows.steps,
            converged=rows.converged,
            status=status,
            evaluations=evaluations,
            row_evaluations=self.row_evaluations,
            trace=None if self.trace is None else torch.stack(self.trace),
        )


def _residual(z: Tensor, fz: Tensor, solver: Solver, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(B,)`` ||f(z) - z||, and the same in the solver's norm."""
    distance: Tensor = torch.linalg.vector_norm(fz - z, dim=1)
    if scale is not None:
        # Where u is huge, g is lost in the rounding of J^T u + g, and the difference says nothing below this.
        rounding = torch.finfo(distance.dtype).eps * torch.linalg.vector_norm(z, dim=1)
        distance = torch.maximum(distance, rounding)
    if solver.norm == "absolute":
        return distance, distance
    if scale is None:
        scale = torch.linalg.vector_norm(fz, dim=1)
    # Where f(z) is about 0 the quotient overflows, and only f itself may say that it is not finite.
    limits = torch.finfo(distance.dtype)
    return distance, (distance / scale.clamp_min(limits.tiny)).clamp_max(limits.max)

"""The one loop that all solvers share.

It owns the stopping rule, the count of evaluations, the best state so far, samples that stopped, values that are
not finite, and the report. A sample that has stopped is frozen: nothing that happens to its batch mates later can
move it, so the result of a sample does not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .report import SolverReport, SolverStatus, empty_report
from .solvers.base import Map, Solver


def solve(
    f: Map,
    z0: Tensor,
    solver: Solver,
    *,
    scale: Tensor | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    trace: bool = False,
) -> tuple[Tensor, SolverReport]:
    """Iterate ``solver`` on z = f(z) from ``z0`` until every sample has stopped.

    Differentiable by backpropagation through the iterations when grad mode is on.

    Args:
        f: the map on ``(B, N)`` matrices.
        z0: ``(B, N)`` the start.
        solver: what makes the steps.
        scale: ``(B,)`` what a relative residual is relative to; ``||f(z)||`` by default.
        project: applied to each iterate before f sees it; for states that are narrower than solver arithmetic.
        trace: keep the residual of every evaluation.

    Returns:
        ``(B, N)``, for each sample the iterate of the lowest residual that was looked at, and the report.
    """
    batch = z0.shape[0]
    if batch == 0:
        return f(z0), empty_report(z0.device, z0.dtype)  # f(z0) has a graph, so that unrolled gradients exist

    z = best = z0
    best_residual = torch.full((batch,), torch.inf, dtype=z0.dtype, device=z0.device)
    start_distance = best_distance = best_residual
    converged = torch.zeros(batch, dtype=torch.bool, device=z0.device)
    failed = torch.zeros_like(converged)
    improved_after_start = torch.zeros_like(converged)
    steps = torch.full((batch,), solver.max_steps, device=z0.device)
    residuals: list[Tensor] = []
    memory = solver.init(f, z0)
    some_stopped = False

    for k in range(solver.max_steps + 1):
        fz = f(z)
        last = k == solver.max_steps
        if k == 0 or last or (k + 1) % solver.check_every == 0:
            distance, residual = _residual(z, fz, solver, scale)
            stopped = converged | failed
            better = (residual <= best_residual) & residual.isfinite() & ~stopped
            best_residual = torch.where(better, residual, best_residual)
            best_distance = torch.where(better, distance, best_distance)
            newly_converged = better & (residual <= solver.tol)
            newly_failed = ~(residual.isfinite() | stopped)
            converged = converged | newly_converged
            failed = failed | newly_failed
            if k == 0:
                start_distance = distance
            else:
                improved_after_start = improved_after_start | better
            now_stopped = converged | failed
            steps = torch.where(now_stopped & ~stopped, k, steps)
            if trace:
                residuals.append(torch.where(stopped, best_residual, residual))
            # One transfer to the host for all decisions.
            done, some_stopped, all_better, some_failed = torch.stack(
                (now_stopped.all(), now_stopped.any(), (better | stopped).all(), newly_failed.any())
            ).tolist()
            best = z if all_better else torch.where(better.unsqueeze(1), z, best)
            if done or last:
                evaluations = k + 1
                break
            if some_failed:
                z = torch.where(failed.unsqueeze(1), best, z)
        elif trace:
            residuals.append(torch.full_like(best_residual, torch.nan))

        proposed, memory = solver.step(f, k, z, fz, memory)
        if project is not None:
            proposed = project(proposed)
        z = torch.where((converged | failed).unsqueeze(1), z, proposed) if some_stopped else proposed

    # A relative residual falls also when z merely runs away; the distance tells.
    diverged = (~improved_after_start | (best_distance > start_distance)) & (evaluations > 1)
    status = torch.full_like(steps, SolverStatus.MAX_STEPS)
    for holds, name in (
        (diverged, SolverStatus.DIVERGED),
        (failed, SolverStatus.NON_FINITE),
        (converged, SolverStatus.CONVERGED),
    ):
        status = torch.where(holds, name, status)
    return best, SolverReport(
        residual=best_residual.detach(),
        steps=steps,
        converged=converged,
        status=status,
        evaluations=evaluations,
        trace=torch.stack(residuals).detach() if trace else None,
    )


def _residual(z: Tensor, fz: Tensor, solver: Solver, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(B,)`` ||f(z) - z||, and the same in the solver's norm."""
    with torch.no_grad():
        distance: Tensor = torch.linalg.vector_norm(fz - z, dim=1)
        if solver.norm == "absolute":
            return distance, distance
        if scale is None:
            scale = torch.linalg.vector_norm(fz, dim=1)
        # Where f(z) is about 0 the quotient would overflow, and only f itself may say that it is not finite.
        tiny = torch.finfo(distance.dtype).tiny
        return distance, distance / torch.maximum(scale, distance * tiny).clamp_min(tiny)

"""A solve that is made of several: coarse and fine precision, slices of a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .collectives import everywhere
from .driver import solve
from .implicit_function import attach_straight_through
from .maps import FlatMap
from .report import SolverReport
from .solvers import Solver


def solve_in_stages(
    f: FlatMap, z0: Tensor, solver: Solver, *, trace: bool = False, keep: Collection[int] = ()
) -> tuple[Tensor, SolverReport, dict[int, Tensor]]:
    """:func:`~zoo.implicit.driver.solve`, in two precisions if the solver says so.

    Raises:
        ValueError: ``bfloat16_until`` is set, and the state itself is not wider than bfloat16.
    """
    if solver.bfloat16_until is None:
        return solve(f, z0, solver, trace=trace, keep=keep)
    if f.view.rounds:
        raise ValueError(
            f"bfloat16_until={solver.bfloat16_until} finishes in the dtype of the state, which is to be float32 or "
            "float64; start from a float32 state (z0), or leave bfloat16_until out"
        )
    only = replace(solver, bfloat16_until=None)
    coarse = replace(only, tol=max(solver.bfloat16_until, solver.tol), norm="relative")
    z, first, kept = solve(f.in_precision(torch.bfloat16), z0, coarse, trace=trace, keep=keep)
    made = first.evaluations - 1
    fine = replace(only, max_steps=solver.max_steps - made)
    later = [k - made for k in keep if k > made]
    z, second, kept_later = solve(f.in_precision(None), z, fine, trace=trace, keep=later)
    kept |= {k + made: state for k, state in kept_later.items()}
    return z, joined([first, second]), kept


def solve_in_slices(
    f: FlatMap,
    z0: Tensor,
    solver: Solver,
    cuts: Sequence[int],
    attach: Callable[[Tensor], Tensor],
    *,
    trace: bool = False,
) -> tuple[Tensor, SolverReport, list[Tensor]]:
    """Solves of ``cuts[0]``, ``cuts[1] - cuts[0]``, ... updates, and of what then remains of ``max_steps``.

    ``attach`` gives the state at each cut its gradient, and may move it on; the next slice starts from there.
    """
    z, states, reports, before = z0, [], [], 0
    for cut in cuts:
        z, report, _ = solve_in_stages(f, z, replace(solver, max_steps=cut - before), trace=trace)
        reports.append(report)
        states.append(attach(z))
        z, before = states[-1].detach(), cut
    z, report, _ = solve_in_stages(f, z, replace(solver, max_steps=solver.max_steps - before), trace=trace)
    return z, joined([*reports, report]), states


def joined(reports: Sequence[SolverReport]) -> SolverReport:
    """The report of solves that each went on where the one before ended."""
    last = reports[-1]
    traces = [report.trace for report in reports if report.trace is not None]
    return replace(
        last,
        steps=torch.stack([report.steps for report in reports]).sum(dim=0),
        evaluations=sum(report.evaluations for report in reports),
        row_evaluations=sum(report.row_evaluations for report in reports),
        trace=torch.cat(traces) if traces else None,
    )


def one_step_where_none_was_made(f: FlatMap, z: Tensor, report: SolverReport) -> Tensor:
    """``z`` with a one-step gradient for samples that an unrolled solve found at their solution.

    No step of theirs was recorded, and their gradient would be 0 without a word.
    """
    at_start = report.converged & (report.steps == 0)
    if everywhere(not at_start.any(), z.device):  # a graph that no other process has is one that it does not wait in
        return z
    return torch.where(at_start.unsqueeze(1), attach_straight_through(f(z.detach()), z.detach()), z)

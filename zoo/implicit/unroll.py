"""The explicit network of tied layers that an equilibrium is the limit of: f applied a given number of times."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext

import torch
from torch import Tensor

from .checks import check_choices, refuse_unfit_cells
from .compiled import buffers_kept
from .computed_weights import computed_once, forget_weights_without_graph
from .driver import _residual
from .dropout import one_draw
from .gradients import UnrolledGradient
from .maps import FlatMap, autocast_dtype, full_precision
from .report import SolverReport, SolverStatus
from .solvers import Anderson, Solver
from .solvers.base import is_count
from .state import State, StateView
from .transforms import refuse_transforms


def unroll(
    f: Callable[..., State],
    z0: State,
    *inputs: State,
    steps: int,
    solver: Solver | None = None,
    trace: bool = False,
    recompute: bool = False,
) -> tuple[State, SolverReport]:
    """The state z = f^steps(z0): f applied ``steps`` times, and backpropagated through as often.

    So begins the training of Bai, Koltun and Kolter, "Multiscale Deep Equilibrium Models" (NeurIPS 2020). Memory grows
    with ``steps``. Gradients follow grad mode, and flow to z0 too. As in a solve, variational dropout keeps its masks,
    and parametrised weights are computed once.

    Args:
        f, z0, inputs, recompute: see :func:`~zoo.implicit.fixed_point`.
        steps: applications of f, at least 1.
        solver: whose ``tol`` and ``norm`` the report judges by; it solves nothing. ``Anderson()`` by default.
        trace: keep the residual of every state in ``report.trace``, ``(steps + 1, B)``.

    Returns:
        z in the structure of ``z0``, and the :class:`SolverReport`. Its residual is that of z, for which f is evaluated
        once more, without a graph; a sample has converged if that happens to be within ``tol``. Nobody asked for it, so
        nothing warns where it is not: the status is ``MAX_STEPS``, or ``NON_FINITE``.

    Raises:
        TypeError, ValueError: z0, f's output or an option is not as described; the message says what was given.
        RuntimeError: f changed its argument z in place.
        NotImplementedError: under ``torch.func.vmap``.
    """
    z, report, _ = unroll_through(f, z0, *inputs, steps=steps, solver=solver, trace=trace, recompute=recompute)
    return z, report


def unroll_through(
    f: Callable[..., State],
    z0: State,
    *inputs: State,
    steps: int,
    keep: Collection[int] = (),
    solver: Solver | None = None,
    trace: bool = False,
    recompute: bool = False,
) -> tuple[State, SolverReport, list[State]]:
    """:func:`unroll`, and the states after ``keep`` applications, each with its graph.

    Raises:
        ValueError: there are fewer ``steps`` than are to be kept; and what :func:`unroll` raises.
    """
    check_steps("unroll(steps=...)", steps)
    solver = Anderson() if solver is None else solver
    check_choices(solver, UnrolledGradient(), "ignore")
    if keep and max(keep) > steps:
        raise ValueError(
            f"the states of a trajectory are among the {steps} applications of an unrolled cell; given: "
            f"steps={tuple(keep)}"
        )
    refuse_unfit_cells(f)
    refuse_transforms(z0, inputs, unrolled=True)
    view = StateView(z0)
    ambient = autocast_dtype(view.device)
    recording = torch.is_grad_enabled()
    if recording:
        forget_weights_without_graph()
    keeping = buffers_kept() if recording else nullcontext()
    with one_draw(), computed_once(f), full_precision(view.device), keeping:
        flat_map = FlatMap(f, view, inputs, recompute=recompute).in_precision(ambient)
        z = view.flatten(z0)
        distances, residuals, kept = [], [], []
        for k in range(steps + 1):
            with torch.set_grad_enabled(recording and k < steps):
                fz = flat_map(z)
            with torch.no_grad():
                distance, residual = _residual(z.detach(), fz.detach(), solver, None)
            distances.append(distance)
            residuals.append(residual)
            if k < steps:
                z = flat_map.project(fz)
                if k + 1 in keep:
                    kept.append(z.clone())
        z = z.clone()  # f may return its input, or what it has saved, and the caller may change z in place
    report = _report(torch.stack(distances), torch.stack(residuals), solver, trace=trace)
    return view.unflatten(z), report, [view.unflatten(state) for state in kept]


def check_steps(what: str, steps: object) -> None:
    """Raise ValueError unless ``steps`` is an integer >= 1."""
    if not is_count(steps, at_least=1):
        raise ValueError(f"{what} takes an integer >= 1, the applications of the cell; given: {steps!r}")


def _report(distances: Tensor, residuals: Tensor, solver: Solver, *, trace: bool) -> SolverReport:
    """What the ``(K, B)`` lengths of f(z) - z, and the residuals, of all states tell of the last one."""
    evaluations, batch = residuals.shape
    residual, finite = residuals[-1], distances[-1].isfinite()
    converged = residual <= solver.tol
    if solver.norm == "relative":
        # A relative residual falls also when z merely runs away; f(z) - z itself has to become smaller.
        converged &= (distances[-1] < 0.99 * distances.amax(dim=0)) | (distances[-1] == 0)
    status = torch.full_like(residual, SolverStatus.MAX_STEPS, dtype=torch.int64)
    status.masked_fill_(~finite, SolverStatus.NON_FINITE).masked_fill_(converged, SolverStatus.CONVERGED)
    return SolverReport(
        residual=residual.masked_fill(~finite, torch.inf),
        steps=torch.full_like(status, evaluations - 1),
        converged=converged,
        status=status,
        evaluations=evaluations,
        row_evaluations=evaluations * batch,
        trace=residuals if trace else None,
    )

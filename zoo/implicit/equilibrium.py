"""The two front doors: ``fixed_point`` for functions and ``DEQ`` for modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Protocol, cast, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .checks import check_cell, check_choices, initial_state, refuse_unfit_cells
from .collectives import current_agreement, in_agreement
from .compiled import buffers_kept
from .computed_weights import computed_once, forget_weights_without_graph
from .dropout import one_draw
from .gradients import Gradient, ImplicitGradient, OnAdjoint
from .maps import FlatMap, autocast_dtype, full_precision
from .report import OnFailure, SolverReport, act_on_failure
from .solvers import Anderson, Solver
from .stages import one_step_where_none_was_made, solve_in_slices, solve_in_stages
from .state import State, StateView
from .trajectory import Trajectory, as_trajectory
from .transforms import current_transform, in_dual_level, refuse_dual, refuse_transforms, unwrapped
from .unroll import check_steps, unroll_through

_SOLVER, _GRADIENT = Anderson(), ImplicitGradient()


class Cell(Protocol):
    """What :class:`DEQ` iterates: a module ``cell(z, *inputs) -> z`` that knows where to start."""

    def __call__(self, z: State, *inputs: State) -> State: ...

    def initial_state(self, *inputs: State) -> State:
        """The state z0 for these inputs, in the dtype in which the cell computes."""
        ...


@overload
def fixed_point(
    f: Callable[..., State],
    z0: State,
    *inputs: State,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    trajectory: None = None,
    recompute: bool = False,
    on_adjoint: OnAdjoint | None = None,
) -> tuple[State, SolverReport]: ...
@overload
def fixed_point(
    f: Callable[..., State],
    z0: State,
    *inputs: State,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    trajectory: Trajectory | Sequence[int],
    recompute: bool = False,
    on_adjoint: OnAdjoint | None = None,
) -> tuple[State, SolverReport, list[State]]: ...
def fixed_point(
    f: Callable[..., State],
    z0: State,
    *inputs: State,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    trajectory: Trajectory | Sequence[int] | None = None,
    recompute: bool = False,
    on_adjoint: OnAdjoint | None = None,
) -> tuple[State, SolverReport] | tuple[State, SolverReport, list[State]]:
    """The equilibrium z* = f(z*, *inputs), differentiable with respect to the inputs and to what f holds.

    Rows are independent samples: f must treat row b of its output as a function of row b of its arguments.
    Gradients follow grad mode (``torch.no_grad`` turns them off), never ``module.training``.

    Args:
        f: ``f(z, *inputs) -> z``, returning a state of the same structure, shapes and dtypes. If it has a method
            ``jacobian(z, *inputs) -> (B, N, N)``, :class:`Newton` uses that.
        z0: the start: a tensor, or a nested tuple, list or dict of real floating tensors, batch first, of any
            shapes that share dimension 0. No gradient flows to it, except with ``UnrolledGradient``.
        inputs: further arguments of f, tensors or pytrees of tensors, batch first.
        solver: how it is solved; ``Anderson()`` by default.
        gradient: how it is differentiated; ``ImplicitGradient()`` by default.
        on_failure: what to do when a sample does not converge, here or in the adjoint solve: ``"ignore"``, ``"warn"``
            (:class:`ConvergenceWarning`) or ``"raise"`` (:class:`ConvergenceError`). In the first two cases the best
            state is returned; the report tells in each.
        trace: keep the residual of every evaluation in ``report.trace``.
        trajectory: also return the states after so many updates, for losses on them: a :class:`Trajectory`, or the
            numbers of updates, which stand for ``Trajectory(numbers)``.
        recompute: keep no activations of recorded evaluations of f; they are computed again in the backward pass, at
            the price of an evaluation a product, under the same autocast state and random draws
            (``torch.utils.checkpoint``).
        on_adjoint: called with the report of each adjoint solve, in the backward pass.

    Returns:
        z* in the structure of ``z0``, and the :class:`SolverReport`, whose residual is that of the z* returned; with
        ``trajectory``, also the list of its states.

    Raises:
        TypeError, ValueError: z0, f's output or an option is not as described; the message says what was given.
        RuntimeError: f changed its argument z in place.
        NotImplementedError: an input carries a forward-mode derivative, and the gradient is not ``UnrolledGradient``.
        ConvergenceError: if ``on_failure="raise"``.
    """
    solver = _SOLVER if solver is None else solver
    gradient = _GRADIENT if gradient is None else gradient
    check_choices(solver, gradient, on_failure)
    refuse_unfit_cells(f)
    refuse_transforms(z0, inputs, unrolled=gradient.through_solver and trajectory is None)
    trajectory = None if trajectory is None else as_trajectory(trajectory)
    if trajectory is not None and max(trajectory.steps) > solver.max_steps:
        raise ValueError(
            f"the states of a trajectory are among the solver's max_steps={solver.max_steps} updates; "
            f"given: steps={trajectory.steps}"
        )
    if trajectory is not None and trajectory.sliced and gradient.through_solver:
        raise ValueError(
            "Trajectory(sliced=True) starts each slice from a detached state, so an unrolled gradient of z* would know "
            "the last slice only; take another gradient than UnrolledGradient(), or sliced=False"
        )
    view = StateView(z0)
    ambient = autocast_dtype(view.device)
    recording = torch.is_grad_enabled()
    unrolling = recording and gradient.through_solver
    agreement = current_agreement()

    def finish_adjoint(report: SolverReport) -> None:
        if on_adjoint is not None:
            on_adjoint(report)
        with in_agreement(agreement):
            act_on_failure(report, on_failure, f"the adjoint solve with {gradient}")

    def attached(z: Tensor, gradient: Gradient) -> Tensor:
        with_graph = z
        if recording:
            forget_weights_without_graph()
            with torch.enable_grad():
                with_graph = gradient.attach(flat_map, z, finish_adjoint)
        # Never the caller's storage (z0, an input) nor what a graph has saved: the caller may change z* in place.
        return z.clone() if with_graph is z else with_graph

    if recording:
        forget_weights_without_graph()
    keeping = buffers_kept() if recording else nullcontext()
    with one_draw(), computed_once(f), full_precision(view.device), keeping:
        flat_map = FlatMap(f, view, inputs, recompute=recompute)
        if solver.bfloat16_until is None:
            flat_map = flat_map.in_precision(ambient)
        with torch.set_grad_enabled(unrolling):
            start = view.flatten(z0) if unrolling else view.flatten(z0).detach()
            if trajectory is not None and trajectory.sliced:
                way = trajectory.gradient
                z, report, states = solve_in_slices(
                    flat_map, start, solver, trajectory.steps, lambda z: attached(z, way), trace=trace
                )
            else:
                keep = () if trajectory is None else trajectory.steps
                z, report, kept = solve_in_stages(flat_map, start, solver, trace=trace, keep=keep)
                # Detached: the graph of an unrolled z* is not that of its states.
                states = [] if trajectory is None else [attached(kept[k].detach(), trajectory.gradient) for k in keep]
            if in_dual_level() and not gradient.through_solver:
                refuse_dual(flat_map(z))  # f may hold a dual tensor
            if unrolling and not start.requires_grad:
                z = one_step_where_none_was_made(flat_map, z, report)
        act_on_failure(report, on_failure, f"the fixed-point solve with {solver}")
        z = attached(z, gradient)
    if trajectory is None:
        return view.unflatten(z), report
    return view.unflatten(z), report, [view.unflatten(state) for state in states]


class DEQ(nn.Module):
    """A layer whose output is the equilibrium z* = cell(z*, *inputs) (Bai, Kolter and Koltun, NeurIPS 2019).

    Args:
        cell: a module with ``cell(z, *inputs) -> z`` and ``cell.initial_state(*inputs) -> z0``.
        solver: how it is solved; ``Anderson()`` by default.
        gradient: how it is differentiated; ``ImplicitGradient()`` by default.
        on_failure, recompute: see :func:`fixed_point`.
        unrolled: if given, nothing is solved: the cell is applied so often, and all that is backpropagated through, as
            :func:`~zoo.implicit.unroll.unroll` says. The attribute may be set, and set to None again, at any time.

    Attributes:
        report: the :class:`SolverReport` of the last call; None before the first.
        adjoint_report: that of the last adjoint solve, written in the backward pass; None after an unrolled call.

    Example:
        >>> deq = DEQ(TanhCell(50), solver=Anderson(tol=1e-5), gradient=ImplicitGradient())
        >>> z, report = deq(x)
        >>> z, report = deq(x, z0=z.detach())  # warm start

    Parametrised weights of the cell (weight norm, spectral bounds) are computed once a call, not once an evaluation.
    """

    def __init__(
        self,
        cell: nn.Module,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        on_failure: OnFailure = "warn",
        recompute: bool = False,
        unrolled: int | None = None,
    ) -> None:
        super().__init__()
        check_cell(cell)
        self.cell = cell
        self.recompute = recompute
        self.unrolled = unrolled
        self.solver = Anderson() if solver is None else solver
        self.gradient = ImplicitGradient() if gradient is None else gradient
        self.on_failure: OnFailure = on_failure
        self.report: SolverReport | None = None
        self.adjoint_report: SolverReport | None = None
        check_choices(self.solver, self.gradient, on_failure)

    @property
    def unrolled(self) -> int | None:
        return self._unrolled

    @unrolled.setter
    def unrolled(self, steps: int | None) -> None:
        if steps is not None:
            check_steps("DEQ(unrolled=...)", steps)
        self._unrolled = steps

    @overload
    def forward(
        self, *inputs: State, z0: State | None = None, trace: bool = False, trajectory: None = None
    ) -> tuple[State, SolverReport]: ...
    @overload
    def forward(
        self, *inputs: State, z0: State | None = None, trace: bool = False, trajectory: Trajectory | Sequence[int]
    ) -> tuple[State, SolverReport, list[State]]: ...
    def forward(
        self,
        *inputs: State,
        z0: State | None = None,
        trace: bool = False,
        trajectory: Trajectory | Sequence[int] | None = None,
    ) -> tuple[State, SolverReport] | tuple[State, SolverReport, list[State]]:
        """z* for these inputs, from ``z0`` or the cell's own initial state, and the report of the solve.

        With ``trajectory`` also the states that it names; see :func:`fixed_point`. Of an unrolled layer they are those
        after so many applications, with the graph of all of them.

        Raises: what :func:`fixed_point` raises.
        """
        if z0 is None:
            z0 = initial_state(self.cell, *inputs)
        if self.unrolled is not None:
            unrolled = self._unroll(self.unrolled, z0, *inputs, trace=trace, trajectory=trajectory)
            return cast(tuple[State, SolverReport], unrolled)
        result = fixed_point(
            self.cell,
            z0,
            *inputs,
            solver=self.solver,
            gradient=self.gradient,
            on_failure=self.on_failure,
            trace=trace,
            trajectory=trajectory,
            recompute=self.recompute,
            on_adjoint=self._keep_adjoint_report,
        )
        self.report = _to_keep(result[1])
        return cast(tuple[State, SolverReport], result)

    def _unroll(
        self, steps: int, z0: State, *inputs: State, trace: bool, trajectory: Trajectory | Sequence[int] | None
    ) -> tuple[State, SolverReport] | tuple[State, SolverReport, list[State]]:
        keep = () if trajectory is None else as_trajectory(trajectory).steps
        z, report, states = unroll_through(
            self.cell, z0, *inputs, steps=steps, keep=keep, solver=self.solver, trace=trace, recompute=self.recompute
        )
        self.report, self.adjoint_report = _to_keep(report), None
        return (z, report) if trajectory is None else (z, report, states)

    def extra_repr(self) -> str:
        steps = "" if self.unrolled is None else f", unrolled={self.unrolled}"
        return f"solver={self.solver}, gradient={self.gradient}{steps}"

    def _keep_adjoint_report(self, report: SolverReport) -> None:
        self.adjoint_report = _to_keep(report)


def _to_keep(report: SolverReport) -> SolverReport:
    """``report`` without what a transform of torch.func, where one is active, wraps its tensors in."""
    if current_transform() is None:
        return report
    values = {item.name: getattr(report, item.name) for item in fields(report)}
    return replace(report, **pytree.tree_map_only(Tensor, unwrapped, values))

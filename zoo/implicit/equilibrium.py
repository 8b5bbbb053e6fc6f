"""The two front doors: ``fixed_point`` for functions and ``DEQ`` for modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from .driver import solve
from .gradients import Gradient, ImplicitGradient, OnAdjoint
from .maps import FlatMap, full_precision
from .report import OnFailure, SolverReport, act_on_failure, check_on_failure
from .solvers import Anderson, Solver
from .state import State, StateView


class Cell(Protocol):
    """What :class:`DEQ` iterates: a module ``cell(z, *inputs) -> z`` that knows where to start."""

    def __call__(self, z: State, *inputs: State) -> State: ...

    def initial_state(self, *inputs: State) -> State:
        """The state z0 for these inputs, in the dtype in which the cell computes."""
        ...


def fixed_point(
    f: Callable[..., State],
    z0: State,
    *inputs: State,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    on_adjoint: OnAdjoint | None = None,
) -> tuple[State, SolverReport]:
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
        on_adjoint: called with the report of each adjoint solve, in the backward pass.

    Returns:
        z* in the structure of ``z0``, and the :class:`SolverReport`, whose residual is that of the z* returned.

    Raises:
        TypeError, ValueError: z0, f's output or an option is not as described; the message says what was given.
        RuntimeError: f changed its argument z in place.
        NotImplementedError: an input carries a forward-mode derivative, and the gradient is not ``UnrolledGradient``.
        ConvergenceError: if ``on_failure="raise"``.
    """
    solver = Anderson() if solver is None else solver
    gradient = ImplicitGradient() if gradient is None else gradient
    _check_choices(solver, gradient, on_failure)
    if not gradient.through_solver:
        _refuse_forward_mode(z0, inputs)
    view = StateView(z0)
    recording = torch.is_grad_enabled()
    unrolling = recording and gradient.through_solver

    def finish_adjoint(report: SolverReport) -> None:
        if on_adjoint is not None:
            on_adjoint(report)
        act_on_failure(report, on_failure, f"the adjoint solve with {gradient}")

    flat_map = FlatMap(f, view, inputs)
    if recording:
        _forget_weights_without_graph()
    with _parametrizations_computed_once(f), full_precision(view.device):
        with torch.set_grad_enabled(unrolling):
            start = view.flatten(z0) if unrolling else view.flatten(z0).detach()
            project = view.round if view.rounds else None
            z, report = solve(flat_map, start, solver, project=project, trace=trace)
        act_on_failure(report, on_failure, f"the fixed-point solve with {solver}")
        if recording:
            _forget_weights_without_graph()
            attached = gradient.attach(flat_map, z, finish_adjoint)
        # Never the caller's storage (z0, an input) nor what a graph has saved: the caller may change z* in place.
        z = attached if recording and attached is not z else z.clone()
    return view.unflatten(z), report


class DEQ(nn.Module):
    """A layer whose output is the equilibrium z* = cell(z*, *inputs) (Bai, Kolter and Koltun, NeurIPS 2019).

    Args:
        cell: a module with ``cell(z, *inputs) -> z`` and ``cell.initial_state(*inputs) -> z0``.
        solver: how it is solved; ``Anderson()`` by default.
        gradient: how it is differentiated; ``ImplicitGradient()`` by default.
        on_failure: see :func:`fixed_point`.

    Attributes:
        report: the :class:`SolverReport` of the last call; None before the first.
        adjoint_report: that of the last adjoint solve, written in the backward pass.

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
    ) -> None:
        super().__init__()
        self.cell = cell
        self.solver = Anderson() if solver is None else solver
        self.gradient = ImplicitGradient() if gradient is None else gradient
        self.on_failure: OnFailure = on_failure
        self.report: SolverReport | None = None
        self.adjoint_report: SolverReport | None = None
        _check_choices(self.solver, self.gradient, on_failure)

    def forward(self, *inputs: State, z0: State | None = None, trace: bool = False) -> tuple[State, SolverReport]:
        """z* for these inputs, from ``z0`` or the cell's own initial state, and the report of the solve."""
        _refuse_batch_statistics(self.cell)
        if z0 is None:
            z0 = cast(Cell, self.cell).initial_state(*inputs)
        z, self.report = fixed_point(
            self.cell,
            z0,
            *inputs,
            solver=self.solver,
            gradient=self.gradient,
            on_failure=self.on_failure,
            trace=trace,
            on_adjoint=self._keep_adjoint_report,
        )
        return z, self.report

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}"

    def _keep_adjoint_report(self, report: SolverReport) -> None:
        self.adjoint_report = report


@contextmanager
def _parametrizations_computed_once(f: object) -> Iterator[None]:
    """Within this context parametrised weights of f are computed once, here and in the ambient grad mode.

    Left to themselves they would be computed, and cached, in the solver's no-grad loop: without a graph.
    """
    modules = f.modules() if isinstance(f, nn.Module) else ()
    parametrized = [m for m in modules if parametrize.is_parametrized(m)]
    if not parametrized:
        yield
        return
    with parametrize.cached():
        for m in parametrized:
            for name in cast(Any, m.parametrizations):
                getattr(m, name)
        yield


def _forget_weights_without_graph() -> None:
    """Drop what was cached under no_grad, so that a recorded evaluation makes its weights anew, with a graph.

    That concerns autocast's low-precision weights, and parametrised ones within ``parametrize.cached()``, the
    caller's or our own, wherever f keeps them.
    """
    torch.clear_autocast_cache()
    cache = parametrize._cache  # noqa: SLF001 - torch has no public way to empty it
    for key in [key for key, weight in cache.items() if weight is not None and not weight.requires_grad]:
        del cache[key]


def _refuse_forward_mode(*states: State) -> None:
    leaves = (x for x in pytree.tree_leaves(states) if isinstance(x, torch.Tensor))
    if any(forward_ad.unpack_dual(x).tangent is not None for x in leaves):
        raise NotImplementedError(
            "forward-mode derivatives of an equilibrium exist with UnrolledGradient() only; "
            "an input is a dual tensor (torch.autograd.forward_ad, torch.func.jvp)"
        )


def _refuse_batch_statistics(cell: nn.Module) -> None:
    for name, module in cell.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                f"the cell holds a {type(module).__name__} that uses batch statistics ({name or 'the cell itself'}): "
                "samples would depend on each other, and its running statistics move at each evaluation of one solve; "
                "use GroupNorm or LayerNorm, or put it in eval mode"
            )


def _check_choices(solver: Solver, gradient: Gradient, on_failure: str) -> None:
    if not isinstance(solver, Solver):
        raise TypeError(f"solver= takes a solver object, like Anderson(tol=1e-4); given: {solver!r}")
    if not isinstance(gradient, Gradient):
        raise TypeError(f"gradient= takes a gradient object, like ImplicitGradient(); given: {gradient!r}")
    check_on_failure(on_failure)

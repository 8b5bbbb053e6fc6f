"""What is refused before a solve, with the reason."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .collectives import current_agreement, refuse_sharded
from .gradients import Gradient
from .maps import module_of
from .report import check_on_failure
from .solvers import Solver
from .state import State


def refuse_unfit_cells(f: object) -> None:
    """Raise for modules (and methods of modules) that are another function at each evaluation, or mix samples.

    Likewise for those whose evaluations wait for other processes: see :func:`refuse_sharded`.
    """
    cell = module_of(f)
    if cell is None:
        return
    refuse_sharded(cell)
    for name, module in cell.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            across = "; processes would wait for each other" if isinstance(module, nn.SyncBatchNorm) else ""
            raise ValueError(
                f"the cell holds a {type(module).__name__} that uses batch statistics ({name or 'the cell itself'}): "
                "samples would depend on each other, and its running statistics move at each evaluation of one solve"
                f"{across}; use GroupNorm or LayerNorm, or put it in eval mode"
            )
        inside = isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0
        dropout = isinstance(module, _DropoutNd) and module.p > 0
        if (dropout or inside) and module.training:
            raise ValueError(
                f"the cell holds a {type(module).__name__} in training mode ({name or 'the cell itself'}): it draws "
                "a new mask at each evaluation, so there is no fixed point; use zoo.implicit.VariationalDropout, "
                "which keeps its mask for a solve"
            )


def check_choices(solver: Solver, gradient: Gradient, on_failure: str) -> None:
    """Raise unless these are a solver for f, a gradient and one of the three words."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver= takes a solver object, like Anderson(tol=1e-4); given: {solver!r}")
    if solver.needs_affine:
        raise ValueError(
            f"{type(solver).__name__} solves linear equations, so it is for adjoint solves: "
            f"gradient=ImplicitGradient({type(solver).__name__}(...)); given: solver={solver!r}"
        )
    if not isinstance(gradient, Gradient):
        raise TypeError(f"gradient= takes a gradient object, like ImplicitGradient(); given: {gradient!r}")
    if solver.compact and current_agreement() is not None:
        raise ValueError(
            "within zoo.implicit.agreeing() all processes evaluate all their rows equally often, so its solvers take "
            f"compact=False; given: {solver!r}"
        )
    check_on_failure(on_failure)


def check_cell(cell: object) -> None:
    """Raise unless it is a module."""
    if not isinstance(cell, nn.Module):
        raise TypeError(
            "DEQ(cell) takes a module with cell(z, *inputs) -> z and cell.initial_state(*inputs) -> z0; "
            f"given: {type(cell).__name__}. For a plain function there is fixed_point(f, z0, *inputs)"
        )


def initial_state(cell: nn.Module, *inputs: State) -> State:
    """The state z0 that the cell starts from; raises if it does not know one."""
    if not hasattr(cell, "initial_state"):
        raise TypeError(
            f"the cell, a {type(cell).__name__}, has no method initial_state(*inputs) -> z0; give it one, or a start: "
            "deq(x, z0=...)"
        )
    return cast(Any, cell).initial_state(*inputs)

"""The solve as one graph whose loop ends early: what ``torch.export`` and ONNX can hold of an equilibrium.

The rules are those of :mod:`~zoo.implicit.driver`: its report, with what a graph can tell, and its results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .checks import initial_state
from .equilibrium import DEQ
from .exported_steps import at_least_tiny, steps_of
from .solvers import Solver
from .state import State, StateView


class GraphReport(NamedTuple):
    """What a graph tells of its solve, as :class:`~zoo.implicit.SolverReport` does; each ``(B,)``."""

    steps: Tensor
    residual: Tensor
    converged: Tensor


class ExportableDEQ(nn.Module):
    """What stands in for a :class:`DEQ` while a model is exported: the same equilibrium, solved in one loop operator.

    Args:
        deq: whose cell, solver and ``unrolled`` are taken. Its cell holds plain weights, none that are computed from
            others: a graph has no place for what is computed once a solve but the solve itself.

    Raises:
        ValueError: the solver, or one of its options, has no form as a graph.
    """

    def __init__(self, deq: DEQ) -> None:
        super().__init__()
        self.cell = deq.cell
        self.solver = deq.solver
        self.unrolled = deq.unrolled
        if self.unrolled is None:
            steps_of(self.solver)

    def forward(self, *inputs: State, z0: State | None = None, trajectory: None = None) -> tuple[State, GraphReport]:
        """z* and the report of the solve; no trajectory, which a graph does not keep.

        Raises:
            ValueError: the state is of a narrower dtype than float32, or of several dtypes.
        """
        if z0 is None:
            z0 = initial_state(self.cell, *inputs)
        flatten, unflatten = _views(z0)
        inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)  # what goes into a loop must not share memory

        def f(z: Tensor) -> Tensor:
            return flatten(self.cell(unflatten(z), *inputs))

        if self.unrolled is not None:
            z, report = apply(f, flatten(z0), self.unrolled, self.solver)
        else:
            z, report = solve(f, flatten(z0), self.solver)
        return unflatten(z), report


def solve(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Solver) -> tuple[Tensor, GraphReport]:
    """What :func:`zoo.implicit.driver.solve` finds, ``(B, N)``, and a report of it, by one loop operator.

    Steps are made for all samples until the last one has stopped; results of those that have are frozen.
    """
    steps_in_graph = steps_of(solver)
    zero = torch.zeros_like(z0[:, 0])
    never = torch.zeros_like(zero, dtype=torch.bool)
    last = torch.full_like(zero, solver.max_steps, dtype=torch.int64)
    k = torch.zeros((), dtype=torch.int64, device=z0.device)
    rows = z0.clone(), z0.clone(), torch.full_like(zero, torch.inf), zero, never, never.clone(), last

    def goes_on(k: Tensor, *state: Tensor) -> Tensor:
        converged, failed = state[4:6]
        return (k <= solver.max_steps) & ~(converged | failed).all()

    def body(
        k: Tensor,
        z: Tensor,
        best: Tensor,
        residual: Tensor,
        largest: Tensor,
        converged: Tensor,
        failed: Tensor,
        steps: Tensor,
        *memory: Tensor,
    ) -> tuple[Tensor, ...]:
        z = torch.where(failed.unsqueeze(1), best, z)  # operators may do anything with the rest
        fz = f(z)
        distance, found = _residual(z, fz, solver)
        looks = (k == 0) | (k == solver.max_steps) | ((k + 1) % steps_in_graph.every == 0)
        open_ = looks & ~(converged | failed)
        fails = open_ & (found.isnan() if solver.norm == "relative" else ~found.isfinite())
        better = open_ & ~fails & (found <= residual)
        largest = torch.where(looks, torch.maximum(largest, distance), largest)
        within = better & (found <= solver.tol)
        if solver.norm == "relative":
            # A relative residual falls also when z merely runs away; f(z) - z itself has to become smaller.
            within = within & ((k == 0) | (distance < 0.99 * largest) | (distance == 0))
        proposed, memory = steps_in_graph.step(k, z, fz, memory)
        return (
            k + 1,
            proposed,
            torch.where(better.unsqueeze(1), z, best),
            torch.where(better, found, residual),
            largest,
            converged | within,
            failed | fails,
            torch.where(within | fails, k, steps),
            *memory,
        )

    state = torch.while_loop(goes_on, body, (k, *rows, *steps_in_graph.init(z0)))
    _, _, best, residual, _, converged, _, steps, *_ = state
    return best, GraphReport(steps, residual, converged)


def apply(f: Callable[[Tensor], Tensor], z: Tensor, times: int, solver: Solver) -> tuple[Tensor, GraphReport]:
    """The state f^times(z), ``(B, N)``, and a report that judges it as :func:`zoo.implicit.unroll` does."""
    largest = torch.zeros_like(z[:, 0])
    for _ in range(times):
        fz = f(z)
        largest = torch.maximum(largest, _residual(z, fz, solver)[0])
        z = fz
    distance, residual = _residual(z, f(z), solver)
    converged = residual <= solver.tol
    if solver.norm == "relative":
        converged = converged & ((distance < 0.99 * torch.maximum(largest, distance)) | (distance == 0))
    steps = torch.full_like(residual, times, dtype=torch.int64)
    return z, GraphReport(steps, torch.where(distance.isfinite(), residual, torch.inf), converged)


def _residual(z: Tensor, fz: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
    """``(B,)`` ||f(z) - z||, and the same in the solver's norm.

    Where f(z) is about 0 the latter may be infinite, and not the largest finite number as in the driver.
    """
    distance: Tensor = torch.linalg.vector_norm(fz - z, dim=1)
    if solver.norm == "absolute":
        return distance, distance
    return distance, distance / at_least_tiny(torch.linalg.vector_norm(fz, dim=1))


def _views(z0: State) -> tuple[Callable[[State], Tensor], Callable[[Tensor], State]]:
    """From states that look like ``z0`` to ``(B, N)``, and back.

    A :class:`StateView` is of one B; that of a graph is a symbol, which its loop cannot take in.
    """
    leaves, spec = pytree.tree_flatten(z0)
    dtypes = {leaf.dtype for leaf in leaves}
    if dtypes != {StateView(z0).dtype}:
        raise ValueError(
            "a graph is solved in the dtype of the state, which is to be float32, or float64; given: "
            f"{', '.join(sorted(map(str, dtypes)))}. Export model.float()"
        )
    shapes = [leaf.shape[1:] for leaf in leaves]
    sizes = [shape.numel() for shape in shapes]

    def flatten(state: State) -> Tensor:
        return torch.cat([leaf.flatten(1) for leaf in pytree.tree_leaves(state)], dim=1)

    def unflatten(z: Tensor) -> State:
        parts = z.split(sizes, dim=1)
        found = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        return pytree.tree_unflatten(found, spec)

    return flatten, unflatten

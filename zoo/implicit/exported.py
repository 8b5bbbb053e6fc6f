"""The solve as one graph whose loop ends early: what ``torch.export`` and ONNX can hold of an equilibrium.

The rules are those of :mod:`~zoo.implicit.driver`, and the steps those of the solvers. But in a graph the number k of
an update is a tensor, so every decision is a mask: memories have their full size from the start, and entries that were
not yet written are left out by masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .checks import initial_state
from .driver import _residual
from .elimination import solve_definite, solve_pivoting
from .equilibrium import DEQ
from .solvers import Anderson, Broyden, FixedPointIteration, Solver
from .state import State, StateView

Memory = tuple[Tensor, ...]


class GraphReport(NamedTuple):
    """What a graph tells of its solve, as :class:`~zoo.implicit.SolverReport` does; each ``(B,)``."""

    steps: Tensor
    residual: Tensor
    converged: Tensor


class ExportableDEQ(nn.Module):
    """What stands in for a :class:`DEQ` while a model is exported: the same equilibrium, solved by one loop operator.

    Args:
        deq: whose cell, solver and ``unrolled`` are taken. Weights of the cell that are computed from others are to be
            computed already (``torch.nn.utils.parametrize.remove_parametrizations``).

    Raises:
        ValueError: the solver, or one of its options, has no form as a graph.
    """

    def __init__(self, deq: DEQ) -> None:
        super().__init__()
        self.cell = deq.cell
        self.solver = deq.solver
        self.unrolled = deq.unrolled
        if self.unrolled is None:
            check_exportable(self.solver)

    def forward(self, *inputs: State, z0: State | None = None, trajectory: None = None) -> tuple[State, GraphReport]:
        """z* and the report of the solve."""
        if z0 is None:
            z0 = initial_state(self.cell, *inputs)
        # What goes into a loop operator must not share memory.
        inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
        flatten, unflatten = _views(z0)

        def f(z: Tensor) -> Tensor:
            return flatten(self.cell(unflatten(z), *inputs))

        if self.unrolled is not None:
            z, report = _apply(f, flatten(z0), self.unrolled, self.solver)
        else:
            z, report = solve(f, flatten(z0), self.solver)
        return unflatten(z), report


def _views(z0: State) -> tuple[Callable[[State], Tensor], Callable[[Tensor], State]]:
    """From states that look like ``z0`` to ``(B, N)`` and back.

    As :class:`StateView` does it, for any B: the sizes of a graph's batch are symbols, which its loop cannot close over.
    """
    if {leaf.dtype for leaf in pytree.tree_leaves(z0)} - {StateView(z0).dtype}:
        raise ValueError(
            "a graph solves in the dtype of the state, which is to be float32 or float64; export model.float()"
        )
    leaves, spec = pytree.tree_flatten(z0)
    shapes = [leaf.shape[1:] for leaf in leaves]
    sizes = [shape.numel() for shape in shapes]

    def flatten(state: State) -> Tensor:
        return torch.cat([x.flatten(1) for x in pytree.tree_leaves(state)], dim=1)

    def unflatten(z: Tensor) -> State:
        parts = z.split(sizes, dim=1)
        return pytree.tree_unflatten([part.reshape(-1, *shape) for part, shape in zip(parts, shapes)], spec)

    return flatten, unflatten


def check_exportable(solver: Solver) -> None:
    """Raise ValueError where a solver has no form as a graph."""
    if type(solver) not in _SOLVERS:
        raise ValueError(
            f"{type(solver).__name__} has no form as a graph: it needs derivatives of f, or decompositions that ONNX "
            f"does not have. Export with another solver: {', '.join(kind.__name__ for kind in _SOLVERS)}"
        )
    if solver.bfloat16_until is not None:
        raise ValueError(
            f"bfloat16_until={solver.bfloat16_until} evaluates f in two precisions, and a graph has one; export with "
            "bfloat16_until=None"
        )


def solve(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Solver) -> tuple[Tensor, GraphReport]:
    """The best iterate ``(B, N)`` and the report, as :func:`zoo.implicit.driver.solve` gives them, in one loop operator.

    Steps are made for all samples as long as there is one that has not stopped; results of those that have are frozen.
    """
    init, step = _SOLVERS[type(solver)]
    limits = torch.finfo(z0.dtype)
    rows = z0[:, 0]
    lowest = torch.full_like(rows, limits.max)
    none = torch.zeros_like(rows, dtype=torch.bool)
    start = (
        torch.zeros((), dtype=torch.int64, device=z0.device),
        z0.clone(),
        z0.clone(),
        lowest,
        torch.zeros_like(rows),
        none,
        none.clone(),
        torch.full_like(rows, solver.max_steps, dtype=torch.int64),
        *init(solver, z0),
    )

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
        z = torch.where(failed.unsqueeze(1), best, z)  # f may refuse what is not finite
        fz = f(z)
        distance, found = _residual(z, fz, solver, None)
        looks = (k == 0) | (k == solver.max_steps) | solver.looks(k, None)
        going = looks & ~(converged | failed)
        better = going & (found <= residual)  # also False where it is not finite
        largest = torch.where(looks, torch.maximum(largest, distance), largest)
        within = better & (found <= solver.tol)
        if solver.norm == "relative":
            # A relative residual falls also when z merely runs away; f(z) - z itself has to become smaller.
            within = within & ((k == 0) | (distance < 0.99 * largest) | (distance == 0))
        fails = going & ~found.isfinite()
        z_next, memory = step(solver, k, z, fz, memory)
        return (
            k + 1,
            z_next,
            torch.where(better.unsqueeze(1), z, best),
            torch.where(better, found, residual),
            largest,
            converged | within,
            failed | fails,
            torch.where(within | fails, k, steps),
            *memory,
        )

    _, _, best, residual, _, converged, _, steps, *_ = torch.while_loop(goes_on, body, start)
    residual = torch.where(residual == limits.max, torch.inf, residual)
    return best, GraphReport(steps, residual, converged)


def _apply(f: Callable[[Tensor], Tensor], z: Tensor, times: int, solver: Solver) -> tuple[Tensor, GraphReport]:
    """The state f^times(z), judged as :func:`zoo.implicit.unroll` judges it."""
    largest = torch.zeros_like(z[:, 0])
    for k in range(times + 1):
        fz = f(z)
        distance, residual = _residual(z, fz, solver, None)
        largest = torch.maximum(largest, distance)
        if k < times:
            z = fz
    converged = residual <= solver.tol
    if solver.norm == "relative":
        converged = converged & ((distance < 0.99 * largest) | (distance == 0))
    steps = torch.full_like(residual, times, dtype=torch.int64)
    return z, GraphReport(steps, torch.where(distance.isfinite(), residual, torch.inf), converged)


# ------------------------------------------------------------------------------------------- the steps of each solver
#
# ``init(solver, z0) -> memory`` and ``step(solver, k, z, fz, memory) -> (z, memory)``, with k a tensor.


def _no_memory(solver: FixedPointIteration, z0: Tensor) -> Memory:
    return ()


def _iterate(solver: FixedPointIteration, k: Tensor, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    return _mixed(z, fz, solver.damping), memory


def _anderson_memory(solver: Anderson, z0: Tensor) -> Memory:
    """Type II: values and residuals ``(B, m, N)``, and the Gram matrix of the residuals ``(B, m, m)``."""
    if solver.kind == 1:
        return _secants(z0, solver.memory - 1)
    m = solver.memory
    return _zeros(z0, m, z0.shape[1]), _zeros(z0, m, z0.shape[1]), _zeros(z0, m, m)


def _anderson(solver: Anderson, k: Tensor, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    plain = _mixed(z, fz, solver.damping)
    if solver.kind == 1:
        memory = _push(k, z, fz - z, memory)
        S, Y, SY, _, Sr = memory[2:]
        identity = torch.eye(solver.memory - 1, dtype=z.dtype, device=z.device)
        mixed = _quasi_newton(k, plain, S, Y, SY - solver.ridge * identity, Sr, solver.damping)
    else:
        values, residuals, gram = memory
        here, written = _ring(k, solver.memory)
        values, residuals = _put(values, here, fz), _put(residuals, here, fz - z)
        row = torch.bmm((fz - z).unsqueeze(1), residuals.mT)  # (B, 1, m)
        gram = torch.where(here.unsqueeze(1), row, torch.where(here, row.mT, gram))
        memory = values, residuals, gram
        a = _weights(solver, gram, here, written).unsqueeze(1)
        mixed = torch.bmm(a, values) - (1 - solver.damping) * torch.bmm(a, residuals)
        mixed = mixed.squeeze(1)
    return torch.where((k + 1) % solver.mix_every == 0, mixed, plain), memory


def _weights(solver: Anderson, gram: Tensor, here: Tensor, written: Tensor) -> Tensor:
    """:class:`Anderson`'s a, ``(B, m)``; 0 for what was not yet written."""
    norms = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    norms = torch.where(written, norms, torch.inf)
    d = norms.amin(dim=1, keepdim=True) / norms
    unit_gram = gram / (norms.unsqueeze(2) * norms.unsqueeze(1))
    ridge = torch.diag(torch.where(written, solver.ridge, 1.0).to(gram.dtype))
    b, definite = solve_definite(unit_gram + ridge, d, written.sum())
    a = d * b
    a = a / a.sum(dim=1, keepdim=True)
    return torch.where(definite.unsqueeze(1), a, here.to(a.dtype))


def _broyden_memory(solver: Broyden, z0: Tensor) -> Memory:
    return _secants(z0, min(solver.memory, max(solver.max_steps, 1)))


def _broyden(solver: Broyden, k: Tensor, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    memory = _push(k, z, fz - z, memory)
    S, Y, SY, SS, Sr = memory[2:]
    return _quasi_newton(k, fz, S, Y, SY + SS, Sr, 1.0), memory


def _secants(z0: Tensor, m: int) -> Memory:
    """The fields of :class:`~zoo.implicit.solvers.secants.Secants`."""
    N = z0.shape[1]
    return (
        z0.clone(), z0.clone(), _zeros(z0, m, N), _zeros(z0, m, N), _zeros(z0, m, m), _zeros(z0, m, m), _zeros(z0, m)
    )  # fmt: skip


def _push(k: Tensor, z: Tensor, r: Tensor, memory: Memory) -> Memory:
    """:meth:`~zoo.implicit.solvers.secants.Secants.push`; rows that were not yet written are 0."""
    last_z, last_r, S, Y, SY, SS, _ = memory
    if S.shape[1] == 0:
        return z.clone(), r, *(x.clone() for x in memory[2:])
    here, _ = _ring(k - 1, S.shape[1])
    here = here & (k > 0)  # the first evaluation has none before it
    s, y = z - last_z, r - last_r
    moved = (s != 0).any(dim=1, keepdim=True)  # a sample that sits at its solution does not
    length = torch.linalg.vector_norm(torch.where(moved, s, 1), dim=1, keepdim=True)
    s, y = s / length, y / length
    S, Y = _put(S, here, s), _put(Y, here, y)
    products = torch.bmm(torch.stack((y, s, r), dim=1), S.mT)  # (B, 3, m)
    column = here.unsqueeze(1)
    SY = torch.where(column, torch.bmm(s.unsqueeze(1), Y.mT), SY)
    SY = torch.where(here, products[:, :1].mT, SY)
    SS = torch.where(here, 0, torch.where(column, products[:, 1:2], SS))
    return z.clone(), r, S, Y, SY, SS, products[:, 2].clone()


def _quasi_newton(k: Tensor, plain: Tensor, S: Tensor, Y: Tensor, K: Tensor, Sr: Tensor, damping: float) -> Tensor:
    """:meth:`~zoo.implicit.solvers.secants.Secants.quasi_newton`."""
    m = S.shape[1]
    if m == 0:
        return plain
    written = torch.arange(m, device=k.device) < k
    gamma = solve_pivoting(K + torch.diag((~written).to(K.dtype)), Sr, written.sum())
    usable = gamma.isfinite().all(dim=1, keepdim=True)
    gamma = torch.where(usable, gamma, 0).unsqueeze(1)
    return plain - (torch.bmm(gamma, S) + damping * torch.bmm(gamma, Y)).squeeze(1)


def _mixed(z: Tensor, fz: Tensor, damping: float) -> Tensor:
    return fz.clone() if damping == 1 else torch.lerp(z, fz, damping)


def _ring(k: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Of m places ``(m,)``: which one number k takes, and which are written by then."""
    places = torch.arange(m, device=k.device)
    return places == k % m, places <= k


def _put(rows: Tensor, here: Tensor, row: Tensor) -> Tensor:
    """``(B, m, N)`` with ``(B, N)`` in one place."""
    return torch.where(here.unsqueeze(1), row.unsqueeze(1), rows)


def _zeros(like: Tensor, *size: int) -> Tensor:
    return like.new_zeros(like.shape[0], *size)


_SOLVERS: dict[type[Solver], tuple[Callable[..., Memory], Callable[..., tuple[Tensor, Memory]]]] = {
    FixedPointIteration: (_no_memory, _iterate),
    Anderson: (_anderson_memory, _anderson),
    Broyden: (_broyden_memory, _broyden),
}

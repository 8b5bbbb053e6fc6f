"""The steps of solvers in a graph, where the number k of an update is a tensor.

The equations are those of the solvers, and so are the results. But memories have their full size from the start, and
what depends on k is a mask: rows that were not yet written are 0, and are left out of systems of equations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .elimination import solve_definite, solve_pivoting
from .solvers import Anderson, Broyden, FixedPointIteration, Solver

Memory = tuple[Tensor, ...]
"""Batch first, of the same shapes and dtypes after each step."""


class GraphSteps(ABC):
    """What a :class:`~zoo.implicit.Solver` is to the driver, this is to :func:`zoo.implicit.exported.solve`."""

    every: int = 1  # the residual is looked at at every so many evaluations

    def init(self, z0: Tensor) -> Memory:
        """The memory before the first step."""
        return ()

    @abstractmethod
    def step(self, k: Tensor, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The next iterate and the memory after it, in tensors of their own; k is a number, an int64 tensor."""


def steps_of(solver: Solver) -> GraphSteps:
    """The steps of this solver.

    Raises:
        ValueError: the solver, or one of its options, has no form as a graph.
    """
    make = _STEPS.get(type(solver))
    if make is None:
        raise ValueError(
            f"{type(solver).__name__} has no form as a graph: it takes derivatives of f, or decompositions that ONNX "
            f"does not have. Export with another solver: {', '.join(kind.__name__ for kind in _STEPS)}"
        )
    if solver.bfloat16_until is not None:
        raise ValueError(
            f"bfloat16_until={solver.bfloat16_until} evaluates f in two precisions, and a graph has one; export with "
            "bfloat16_until=None"
        )
    return make(solver)


class _Iteration(GraphSteps):
    """:class:`FixedPointIteration`."""

    def __init__(self, solver: FixedPointIteration) -> None:
        self.every = solver.check_every
        self.damping = solver.damping

    def step(self, k: Tensor, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return _plain(z, fz, self.damping), memory


class _TypeTwo(GraphSteps):
    """:class:`Anderson` with ``kind=2``. Its memory: F_i and r_i, ``(B, m, N)``, and r_i . r_j, ``(B, m, m)``."""

    def __init__(self, solver: Anderson) -> None:
        self.every = solver.mix_every
        self.solver = solver

    def init(self, z0: Tensor) -> Memory:
        B, N = z0.shape
        m = self.solver.memory
        return z0.new_zeros(B, m, N), z0.new_zeros(B, m, N), z0.new_zeros(B, m, m)

    def step(self, k: Tensor, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        values, residuals, gram = memory
        damping = self.solver.damping
        places = torch.arange(self.solver.memory, device=z.device)
        here, written = places == k % self.solver.memory, places <= k
        values, residuals = _put(values, here, fz), _put(residuals, here, fz - z)
        row = torch.bmm((fz - z).unsqueeze(1), residuals.mT)  # (B, 1, m)
        gram = torch.where(here.unsqueeze(1), row.mT, gram)
        gram = torch.where(here, row.mT, torch.where(here.unsqueeze(1), row, gram))
        a = self._weights(gram, here, written).unsqueeze(1)
        mixed = torch.bmm(a, values)
        if damping != 1:
            mixed = mixed - (1 - damping) * torch.bmm(a, residuals)
        mixes = (k + 1) % self.every == 0
        return torch.where(mixes, mixed.squeeze(1), _plain(z, fz, damping)), (values, residuals, gram)

    def _weights(self, gram: Tensor, latest: Tensor, written: Tensor) -> Tensor:
        """``(B, m, m)`` -> ``(B, m)``: the a of :class:`Anderson`, 0 for what is not written."""
        norms = at_least_tiny(gram.diagonal(dim1=1, dim2=2)).sqrt()
        norms = torch.where(written, norms, torch.inf)
        d = norms.amin(dim=1, keepdim=True) / norms
        unit_gram = gram / (norms.unsqueeze(2) * norms.unsqueeze(1))
        ridge = torch.diag(torch.where(written, self.solver.ridge, 1.0).to(gram.dtype))
        b, definite = solve_definite(unit_gram + ridge, d, written.sum())
        a = d * b
        a = a / a.sum(dim=1, keepdim=True)
        # A sample whose Gram matrix is numerically indefinite takes a plain step.
        return torch.where(definite.unsqueeze(1), a, latest.to(a.dtype))


class _QuasiNewton(GraphSteps):
    """Steps that are made of :class:`~zoo.implicit.solvers.secants.Secants`, whose fields are the memory."""

    def __init__(self, size: int, damping: float) -> None:
        self.size = size
        self.damping = damping

    @abstractmethod
    def matrix(self, SY: Tensor, SS: Tensor) -> Tensor:
        """``(B, m, m)`` K."""

    def init(self, z0: Tensor) -> Memory:
        B, N = z0.shape
        m = self.size
        S, SY = z0.new_zeros(B, m, N), z0.new_zeros(B, m, m)
        return z0.clone(), z0.clone(), S, S.clone(), SY, SY.clone(), z0.new_zeros(B, m)

    def step(self, k: Tensor, z: Tensor, fz: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        memory = self._push(k, z, fz - z, memory)
        _, _, S, Y, SY, SS, Sr = memory
        written = torch.arange(self.size, device=z.device) < k
        K = self.matrix(SY, SS) * written + torch.diag((~written).to(SY.dtype))
        gamma = solve_pivoting(K, Sr, written.sum())
        usable = gamma.isfinite().all(dim=1, keepdim=True)  # a plain step where K is singular
        gamma = torch.where(usable, gamma, 0).unsqueeze(1)
        correction = torch.bmm(gamma, S) + self.damping * torch.bmm(gamma, Y)
        quasi_newton = z + self.damping * (fz - z) - correction.squeeze(1)
        if self.every == 1:
            return quasi_newton, memory
        return torch.where((k + 1) % self.every == 0, quasi_newton, _plain(z, fz, self.damping)), memory

    def _push(self, k: Tensor, z: Tensor, r: Tensor, memory: Memory) -> Memory:
        """Take in evaluation k: the pair that leads to it replaces the oldest one."""
        last_z, last_r, S, Y, SY, SS, _ = memory
        here = (torch.arange(self.size, device=z.device) == (k - 1) % self.size) & (k > 0)  # nothing leads to the first
        s, y = z - last_z, r - last_r
        moved = (s != 0).any(dim=1, keepdim=True)  # a sample that sits at its solution does not
        length = torch.linalg.vector_norm(torch.where(moved, s, 1), dim=1, keepdim=True)
        s, y = s / length, y / length
        S, Y = _put(S, here, s), _put(Y, here, y)
        y_S, s_S, r_S = torch.bmm(torch.stack((y, s, r), dim=1), S.mT).split(1, dim=1)  # (B, 1, m) each
        row = here.unsqueeze(1)
        SY = torch.where(row, torch.bmm(s.unsqueeze(1), Y.mT), SY)
        SY = torch.where(here, y_S.mT, SY)
        SS = torch.where(here, 0, torch.where(row, s_S, SS))
        return z, r, S, Y, SY, SS, r_S.squeeze(1).clone()  # of its own strides


class _TypeOne(_QuasiNewton):
    """:class:`Anderson` with ``kind=1`` and at least one pair."""

    def __init__(self, solver: Anderson) -> None:
        super().__init__(solver.memory - 1, solver.damping)
        self.every = solver.mix_every
        self.ridge = solver.ridge

    def matrix(self, SY: Tensor, SS: Tensor) -> Tensor:
        return SY - self.ridge * torch.eye(self.size, dtype=SY.dtype, device=SY.device)


class _Broyden(_QuasiNewton):
    """:class:`Broyden`."""

    def __init__(self, solver: Broyden) -> None:
        super().__init__(min(solver.memory, max(solver.max_steps, 1)), damping=1.0)

    def matrix(self, SY: Tensor, SS: Tensor) -> Tensor:
        return SY + SS


def _anderson(solver: Anderson) -> GraphSteps:
    if solver.kind == 2:
        return _TypeTwo(solver)
    if solver.memory == 1:  # no pair, so every step is a plain one
        return _Iteration(FixedPointIteration(damping=solver.damping, check_every=solver.mix_every))
    return _TypeOne(solver)


_STEPS: dict[type[Solver], Callable[[Any], GraphSteps]] = {
    FixedPointIteration: _Iteration,
    Anderson: _anderson,
    Broyden: _Broyden,
}


def at_least_tiny(x: Tensor) -> Tensor:
    """``x.clamp_min(finfo.tiny)``: in ONNX constants are of float32, and what is clamped is finite."""
    exponent = round(math.log2(torch.finfo(x.dtype).tiny))  # -126 or -1022, multiples of 14
    tiny = torch.full_like(x, 2.0 ** (exponent // 14)) ** 14
    return torch.where(x < tiny, tiny, x)


def _plain(z: Tensor, fz: Tensor, damping: float) -> Tensor:
    return fz if damping == 1 else torch.lerp(z, fz, damping)


def _put(rows: Tensor, here: Tensor, row: Tensor) -> Tensor:
    """``(B, m, N)`` with ``(B, N)`` in one of its places, ``(m,)``."""
    return torch.where(here.unsqueeze(1), row.unsqueeze(1), rows)

"""One training step of an MDEQ by the zoo and by TorchDEQ, both with the same cell: its settings at equal error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zoo.implicit import GMRES, ImplicitGradient, fixed_point
from zoo.implicit.computed_weights import computed_once
from zoo.mdeq import State

from . import contestants as c
from .contestants import Contestant, TorchDEQ, Zoo, torchdeq
from .end_to_end import relative_error
from .train_mdeq import Gradient, TrainingStep

MAX_STEPS = 60
TOLERANCES = tuple(0.5**k for k in range(7, 15))

ZOO_GMRES = Zoo("zoo gmres", GMRES())
PAIRS: tuple[tuple[Contestant, Contestant], ...] = (
    (c.ANDERSON, c.ANDERSON),
    (c.BROYDEN, c.BROYDEN),
    (c.ALWAYS, ZOO_GMRES),
    (c.T_ITERATION, c.T_ITERATION),
    (c.T_ANDERSON, c.T_ANDERSON),
    (c.T_BROYDEN, c.T_BROYDEN),
    (c.T_ANDERSON, c.T_BROYDEN),
    (c.T_ANDERSON_SMALL, c.T_ANDERSON_SMALL),
)
"""The zoo's, with the default of its MDEQs first, and TorchDEQ's, with the default of that library first."""


class CountingCell(nn.Module):
    """The cell, and the number of its evaluations and of products with its Jacobian's transpose."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.evaluations = 0
        self.products = 0

    def forward(self, z: State, x: Tensor) -> State:
        self.evaluations += 1
        if z[0].requires_grad:
            z = (z[0].view_as(z[0]), *z[1:])
            z[0].register_hook(self._count)  # called when a gradient with respect to z is computed
        value: State = self.cell(z, x)
        return value

    def _count(self, _: Tensor) -> None:
        self.products += 1


@dataclass(frozen=True)
class Setting:
    """A pair of solvers of one library with their tolerances, and what one step with them took and gave.

    Attributes:
        tol: of the forward solve, relative to ||f(z)||.
        adjoint_tol: relative to ||g|| in the zoo, to ||u|| in TorchDEQ.
        max_steps: of each solve; TorchDEQ's Broyden pays for those that it may take.
        error: ||dL/dtheta - reference|| / ||reference||.
        evaluations: of the cell, those with a graph included.
        products: with J^T in the adjoint solve.
    """

    forward: Contestant
    adjoint: Contestant
    tol: float
    adjoint_tol: float
    max_steps: tuple[int, int] = (MAX_STEPS, MAX_STEPS)
    error: float = math.nan
    evaluations: int = 0
    products: int = 0

    @property
    def name(self) -> str:
        return f"{self.forward.name} / {self.adjoint.name.partition(' ')[2]}"

    def run(self, step: TrainingStep, z0: State | None = None) -> Gradient:
        """The gradient dL/dtheta, by one forward and backward pass."""
        return self._run(step, step.cell, z0)

    def equilibrium(self, step: TrainingStep) -> State:
        """z* as this library returns it, without its graph."""
        with torch.no_grad():
            x = step.injection()
        with computed_once(step.cell):
            return tuple(z_i.detach() for z_i in self._equilibrium(step.cell, step.cell.initial_state(x), x))

    def measured(self, step: TrainingStep, z0: State | None = None) -> Setting:
        """The same with the numbers of one pass, and with no more steps than it took."""
        cell = CountingCell(step.cell)
        error = relative_error([g.double() for g in self._run(step, cell, z0)], step.reference[1])
        return replace(
            self,
            error=error,
            evaluations=cell.evaluations,
            products=cell.products,
            max_steps=(cell.evaluations, cell.products),
        )

    def _run(self, step: TrainingStep, cell: nn.Module, z0: State | None) -> Gradient:
        x = step.injection()
        # The zoo computes normalised weights once a solve by itself; TorchDEQ is given the same.
        with computed_once(step.cell):
            return step.gradient(self._equilibrium(cell, step.cell.initial_state(x) if z0 is None else z0, x))

    def _equilibrium(self, cell: nn.Module, z0: State, x: Tensor) -> State:
        steps, adjoint_steps = self.max_steps
        if isinstance(self.forward, Zoo) and isinstance(self.adjoint, Zoo):
            gradient = ImplicitGradient(replace(self.adjoint.solver, tol=self.adjoint_tol, max_steps=adjoint_steps))
            solver = replace(self.forward.solver, tol=self.tol, max_steps=steps)
            z: State = fixed_point(cell, z0, x, solver=solver, gradient=gradient, on_failure="ignore")[0]
            return z
        if not (isinstance(self.forward, TorchDEQ) and isinstance(self.adjoint, TorchDEQ)):
            raise TypeError(f"a pair is of one library; given: {self.forward.name}, {self.adjoint.name}")
        deq = torchdeq().get_deq(
            ift=True,
            f_solver=self.forward.registered(),
            f_tol=self.tol,
            f_stop_mode=self.forward.stop_mode,
            f_max_iter=steps,
            b_solver=self.adjoint.registered(),
            b_tol=self.adjoint_tol,
            b_stop_mode=self.adjoint.stop_mode,
            b_max_iter=adjoint_steps,
        )
        states = deq(lambda *z: cell(z, x), z0)[0]
        return tuple(states[-1])


def loosest(error: Callable[[float], float], level: float) -> float | None:
    """The loosest of ``TOLERANCES`` whose error is at most ``level``, by bisection; None if the tightest is not."""
    low, high = 0, len(TOLERANCES)
    while low < high:
        middle = (low + high) // 2
        if error(TOLERANCES[middle]) <= level:
            high = middle
        else:
            low = middle + 1
    return TOLERANCES[low] if low < len(TOLERANCES) else None


def settings(step: TrainingStep, level: float, pairs: Sequence[tuple[Contestant, Contestant]]) -> list[Setting]:
    """The pairs that reach this error of the gradient, at tolerances that are just tight enough.

    Half of the error is granted to the forward solve, when the adjoint is tight, and half to the adjoint, when the
    forward solve starts at z*. Where that is not enough for the two together, both tolerances are halved until it is.
    """
    tols = {s.name: _forward_tolerance(s, step, level) for s in {s.name: s for s, _ in pairs}.values()}
    adjoint_tols = {s.name: _adjoint_tolerance(s, step, level) for s in {s.name: s for _, s in pairs}.values()}
    found = []
    for forward, adjoint in pairs:
        tol, adjoint_tol = tols[forward.name], adjoint_tols[adjoint.name]
        if tol is None or adjoint_tol is None:
            continue
        for shrink in (1, 2, 4):
            setting = Setting(forward, adjoint, tol / shrink, adjoint_tol / shrink).measured(step)
            if setting.error <= level:
                found.append(setting)
                break
    return found


def _forward_tolerance(s: Contestant, step: TrainingStep, level: float) -> float | None:
    tight = ZOO_GMRES if isinstance(s, Zoo) else c.T_BROYDEN
    return loosest(lambda tol: Setting(s, tight, tol, level / 50).measured(step).error, level / 2)


def _adjoint_tolerance(s: Contestant, step: TrainingStep, level: float) -> float | None:
    first = c.BROYDEN if isinstance(s, Zoo) else c.T_BROYDEN
    z_star = tuple(z_i.to(step.images.dtype) for z_i in step.reference[0])
    return loosest(lambda tol: Setting(first, s, level / 50, tol).measured(step, z_star).error, level / 2)

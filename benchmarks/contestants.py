"""The solvers that are compared, the zoo's and TorchDEQ's, behind the same two methods."""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.implicit import (
    GMRES,
    Anderson,
    BiCGSTAB,
    Broyden,
    FixedPointIteration,
    ImplicitGradient,
    Solver,
    fixed_point,
)

Map = Callable[..., Any]
Steps = tuple[int, int] | None


class Equation(Protocol):
    """z = f(z, *inputs), from z0, a tensor or a tuple of tensors, with what solvers may take if they are not told."""

    @property
    def z0(self) -> Any: ...
    @property
    def inputs(self) -> tuple[Any, ...]: ...
    @property
    def max_steps(self) -> int: ...


class Contestant(ABC):
    """One way to solve z = f(z, *inputs), forward or, for a solve of the same library, as its adjoint.

    Each method takes the map by itself, which stands for f and may count or trace besides. Tolerances are
    relative: forward to ||f(z)||. ``max_steps=None`` is the problem's.
    """

    name: str

    @abstractmethod
    def solve(self, f: Map, problem: Equation, tol: float, max_steps: int | None = None) -> Tensor:
        """z* without a graph."""

    @abstractmethod
    def equilibrium(
        self, f: Map, problem: Equation, tol: float, adjoint: Any, adjoint_tol: float, max_steps: Steps = None
    ) -> Any:
        """z* with the implicit gradient, whose equation ``adjoint`` solves; ``max_steps`` are (forward, adjoint)."""


@dataclass(frozen=True)
class Zoo(Contestant):
    """A solver of ``zoo.implicit``. As an adjoint its tolerance is relative to ||g||."""

    name: str
    solver: Solver

    def configured(self, problem: Equation, tol: float, max_steps: int | None) -> Solver:
        return replace(self.solver, tol=tol, max_steps=problem.max_steps if max_steps is None else max_steps)

    def solve(self, f: Map, problem: Equation, tol: float, max_steps: int | None = None) -> Tensor:
        solver = self.configured(problem, tol, max_steps)
        with torch.no_grad():
            z: Tensor = fixed_point(f, problem.z0, *problem.inputs, solver=solver, on_failure="ignore")[0]
        return z

    def equilibrium(
        self, f: Map, problem: Equation, tol: float, adjoint: Zoo, adjoint_tol: float, max_steps: Steps = None
    ) -> Any:
        steps, adjoint_steps = max_steps or (None, None)
        gradient = ImplicitGradient(adjoint.configured(problem, adjoint_tol, adjoint_steps))
        solver = self.configured(problem, tol, steps)
        found = fixed_point(f, problem.z0, *problem.inputs, solver=solver, gradient=gradient, on_failure="ignore")
        return found[0]


@dataclass(frozen=True)
class TorchDEQ(Contestant):
    """A solver of TorchDEQ, with the implicit gradient (``ift=True``), which is not its default.

    As an adjoint its tolerance is relative to the norm of its iterate (``stop_mode="rel"``) or absolute (``"abs"``).
    """

    name: str
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stop_mode: str = "rel"

    def solve(self, f: Map, problem: Equation, tol: float, max_steps: int | None = None) -> Tensor:
        solver = torchdeq().solver.get_solver(self.solver)

        def function(z: Tensor, **_: float) -> Tensor:  # simple_fixed_point_iter hands its damping to the map
            fz: Tensor = f(z, *problem.inputs)
            return fz

        with torch.no_grad():
            z: Tensor = solver(
                function,
                problem.z0,
                max_iter=problem.max_steps if max_steps is None else max_steps,
                tol=tol,
                stop_mode=self.stop_mode,
                **self.options,
            )[0]
        return z

    def equilibrium(
        self, f: Map, problem: Equation, tol: float, adjoint: TorchDEQ, adjoint_tol: float, max_steps: Steps = None
    ) -> Any:
        steps, adjoint_steps = max_steps or (problem.max_steps, problem.max_steps)
        deq = torchdeq().get_deq(
            ift=True,
            f_solver=self.solver,
            f_tol=tol,
            f_stop_mode=self.stop_mode,
            f_max_iter=steps,
            b_solver=adjoint.registered(),
            b_tol=adjoint_tol,
            b_stop_mode=adjoint.stop_mode,
            b_max_iter=adjoint_steps,
        )
        several = isinstance(problem.z0, tuple)

        def function(*z: Tensor) -> Any:
            return f(z if several else z[0], *problem.inputs)

        (state,) = deq(function, problem.z0, solver_kwargs=dict(self.options))[0]
        return tuple(state) if several else state

    def registered(self) -> str:
        """A name under which TorchDEQ finds this solver with its options, which it does not take for the adjoint."""
        if not self.options:
            return self.solver
        solvers = torchdeq().solver
        solvers.register_solver(self.name, partial(solvers.get_solver(self.solver), **self.options))
        return self.name


def torchdeq() -> Any:
    """The package, at its first use: only the comparison needs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its docstrings hold escapes that Python warns of
        try:
            return importlib.import_module("torchdeq")
        except ImportError as error:
            raise ImportError("TorchDEQ is missing: pip install -r requirements-benchmarks.txt") from error


ANDERSON = Zoo("zoo anderson", Anderson())
ALWAYS = Zoo("zoo anderson, mixing always", Anderson(mix_every=1))
RARELY = Zoo("zoo anderson, mixing every 3", Anderson(memory=12, mix_every=3))
ITERATION = Zoo("zoo iteration", FixedPointIteration())
BROYDEN = Zoo("zoo broyden", Broyden())
BROYDEN_10 = Zoo("zoo broyden, memory 10", Broyden(memory=10))
BICGSTAB = Zoo("zoo bicgstab", BiCGSTAB())
ZOO_FORWARD = (
    ANDERSON,
    ALWAYS,
    RARELY,
    Zoo("zoo anderson, type I", Anderson(kind=1)),
    ITERATION,
    BROYDEN,
)
ZOO_ADJOINT = (
    *ZOO_FORWARD,
    Zoo("zoo gmres", GMRES()),
    Zoo("zoo gmres, restart 60", GMRES(restart=60)),
    BICGSTAB,
)

T_ITERATION = TorchDEQ("torchdeq fixed_point_iter", "fixed_point_iter")
T_ANDERSON = TorchDEQ("torchdeq anderson", "anderson")
T_ANDERSON_SMALL = TorchDEQ("torchdeq anderson lam=1e-12", "anderson", {"lam": 1e-12})  # a small ridge
T_BROYDEN = TorchDEQ("torchdeq broyden", "broyden")
TORCHDEQ = (T_ITERATION, T_ANDERSON, T_ANDERSON_SMALL, T_BROYDEN)
# Never looks at a residual, so it stops at max_steps only; TorchDEQ does not take it as an adjoint.
T_BLIND = TorchDEQ("torchdeq simple_fixed_point_iter", "simple_fixed_point_iter")

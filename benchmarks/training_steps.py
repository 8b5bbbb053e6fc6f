"""One training step of a model by the zoo and by TorchDEQ, both with the same cell, at equal error of the gradient."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_modules.memory import peak_bytes
from zoo.implicit import DEQ, GMRES, Broyden, ImplicitGradient, fixed_point, spectral_radius
from zoo.implicit.computed_weights import computed_once

from . import contestants as c
from .clock import Times, interleaved
from .command import Data
from .contestants import Contestant, Zoo
from .counts import Counting
from .end_to_end import TOLERANCES, Pair, pair_name, relative_error, tight_enough
from .report import table

MAX_STEPS = 60

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
"""The zoo's, with the default of its models first, and TorchDEQ's, with the default of that library first."""

_TIGHT = Broyden(tol=1e-5, max_steps=200)

State = Any  # a tensor, or a tuple of tensors
Gradient = tuple[Tensor, ...]
S = TypeVar("S", bound="Step")


class Reference(NamedTuple):
    """z* and the gradient in float64."""

    z: State
    gradient: Gradient


class Start(NamedTuple):
    """Where a solve begins."""

    z0: State
    inputs: tuple[Any, ...]
    max_steps: int = MAX_STEPS


@dataclass(frozen=True)
class Step(ABC):
    """What a training step computes: dL/dtheta for one batch, in float32."""

    @property
    @abstractmethod
    def deq(self) -> DEQ: ...

    @property
    @abstractmethod
    def parameters(self) -> tuple[Tensor, ...]:
        """Theta."""

    @abstractmethod
    def inputs(self) -> tuple[Any, ...]:
        """Those of f(z, *inputs), with their graph."""

    @abstractmethod
    def loss(self, z: State) -> Tensor:
        """Of the equilibrium."""

    @abstractmethod
    def whole_loss(self) -> Tensor:
        """The same, by the model's own forward pass."""

    @abstractmethod
    def double(self: S) -> S:
        """The same in float64, with weights of its own."""

    @property
    def cell(self) -> nn.Module:
        return self.deq.cell

    def start(self) -> Start:
        """The model's own start, and the inputs with their graph."""
        inputs = self.inputs()
        return Start(self.cell.initial_state(*inputs), inputs)  # type: ignore[operator]

    def gradient(self, z: State) -> Gradient:
        return torch.autograd.grad(self.loss(z), self.parameters)

    @cached_property
    @torch.enable_grad()
    def reference(self) -> Reference:
        """z* and the gradient, where both solves have relative residuals of at most 1e-9.

        Raises:
            ConvergenceError: the model has no equilibrium that is found.
        """
        with torch.no_grad():
            z0, inputs, _ = self.start()
            near, _ = fixed_point(self.cell, z0, *inputs, solver=_TIGHT)
        step = self.double()
        solver, adjoint = replace(_TIGHT, tol=1e-9), ImplicitGradient(GMRES(tol=1e-9, restart=60, max_steps=200))
        z0 = pytree.tree_map(Tensor.double, near)
        z, _ = fixed_point(step.cell, z0, *step.inputs(), solver=solver, gradient=adjoint, on_failure="raise")
        return Reference(pytree.tree_map(Tensor.detach, z), step.gradient(z))

    @cached_property
    def solution(self) -> State:
        """The reference's z* in float32."""
        return pytree.tree_map(Tensor.float, self.reference.z)

    def spectral_radii(self) -> Tensor:
        """``(B,)`` of df/dz at z*."""
        with torch.no_grad():
            inputs = self.inputs()
        generator = torch.Generator().manual_seed(0)
        return spectral_radius(self.cell, self.solution, *inputs, products=15, generator=generator)

    def peak(self, unrolled: int | None = None, recompute: bool = False) -> int:
        """Bytes of one forward and backward pass of the whole model, solved or unrolled, above the model's own."""
        step = copy.deepcopy(self)
        step.deq.unrolled, step.deq.recompute, step.deq.on_failure = unrolled, recompute, "ignore"
        return peak_bytes(lambda: step.whole_loss().backward())


@dataclass(frozen=True)
class Setting(Pair):
    """A pair on a training step. ``evaluations`` are all of the cell's, those with a graph included.

    Attributes:
        max_steps: of each solve; TorchDEQ's Broyden pays for those that it may take.
    """

    max_steps: tuple[int, int] = (MAX_STEPS, MAX_STEPS)

    def run(self, step: Step, z0: State | None = None) -> Gradient:
        """The gradient dL/dtheta, by one forward and backward pass."""
        return self._run(step, step.cell, z0)

    def equilibrium(self, step: Step) -> State:
        """z* as this library returns it, without its graph."""
        with computed_once(step.cell):
            return pytree.tree_map(Tensor.detach, self.equilibrium_of(step.cell, step.start(), self.max_steps))

    def measured(self, step: Step, z0: State | None = None) -> Setting:
        """The same with the numbers of one pass, and with no more steps than it took."""
        cell = Counting(step.cell)
        error = relative_error([g.double() for g in self._run(step, cell, z0)], step.reference.gradient)
        return replace(
            self,
            error=error,
            evaluations=cell.evaluations,
            products=cell.products,
            max_steps=(cell.evaluations, cell.products),
        )

    def _run(self, step: Step, cell: nn.Module, z0: State | None) -> Gradient:
        # The zoo computes normalised weights once a solve by itself; TorchDEQ is given the same.
        with computed_once(step.cell):
            start = step.start()
            if z0 is not None:
                start = start._replace(z0=z0)
            return step.gradient(self.equilibrium_of(cell, start, self.max_steps))


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


def settings(step: Step, level: float, pairs: Sequence[tuple[Contestant, Contestant]]) -> list[Setting]:
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
        setting = tight_enough(Setting(forward, adjoint, tol, adjoint_tol), level, lambda s: s.measured(step))
        if setting is not None:
            found.append(setting)
    return found


def _forward_tolerance(s: Contestant, step: Step, level: float) -> float | None:
    tight = ZOO_GMRES if isinstance(s, Zoo) else c.T_BROYDEN
    return loosest(lambda tol: Setting(s, tight, tol, level / 50).measured(step).error, level / 2)


def _adjoint_tolerance(s: Contestant, step: Step, level: float) -> float | None:
    first = c.BROYDEN if isinstance(s, Zoo) else c.T_BROYDEN
    return loosest(lambda tol: Setting(first, s, level / 50, tol).measured(step, step.solution).error, level / 2)


# -------------------------------------------------------------------------------------------------------------- results


def costs_of(step: Step, rounds: int) -> Data:
    """Seconds of what every step is made of, whoever makes it."""
    z = pytree.tree_map(lambda z_i: z_i.clone().requires_grad_(), step.solution)
    with computed_once(step.cell):
        inputs = step.inputs()
        leaves = tuple(x for x in pytree.tree_leaves(inputs) if x.requires_grad)
        states = tuple(pytree.tree_leaves(z))
        fz = pytree.tree_leaves(step.cell(z, *inputs))
        u = [torch.ones_like(z_i) for z_i in states]
        weights = tuple(step.cell.parameters())

        def evaluation() -> None:
            with torch.no_grad():
                step.cell(z, *inputs)

        def around() -> None:
            ends = [x for x in pytree.tree_leaves(step.inputs()) if x.requires_grad]
            torch.autograd.grad(step.loss(z), states)
            ones = [torch.ones_like(x) for x in ends]
            torch.autograd.grad(ends, step.parameters, ones, retain_graph=True, allow_unused=True)  # weights are shared

        actions = {
            "evaluation": evaluation,
            "recorded evaluation": lambda: step.cell(z, *inputs),
            "product with J^T": lambda: torch.autograd.grad(fz, states, u, retain_graph=True),
            "product with (df/dtheta)^T": lambda: torch.autograd.grad(
                fz, (*states, *weights, *leaves), u, retain_graph=True, allow_unused=True
            ),
            "inputs and loss, both ways": around,
        }
        return {name: item.median for name, item in interleaved(actions, rounds).items()}


def costs_table(found: Data) -> str:
    """What :func:`costs_of` found, as a section of a page."""
    rows = [[name, f"{1e3 * seconds:.1f}"] for name, seconds in found.items()]
    return "## What a step is made of\n\nThe same for both libraries.\n\n" + table(["", "ms"], rows)


def compared(
    step: Step,
    level: float,
    pairs: Sequence[tuple[Contestant, Contestant]],
    rounds: int,
    others: Mapping[str, Step] | None = None,
) -> Data:
    """Time of one step at equal error of the gradient: ``[forward / adjoint] -> seconds, ratios, counts``.

    Args:
        others: the same step with other cells of the same function, by what is said of them: TorchDEQ's pairs run
            with these too.
    """
    found = settings(step, level, pairs)
    if not any(isinstance(s.forward, Zoo) for s in found):
        raise RuntimeError(f"no pair of the zoo's solvers reaches an error of {level:g} of the gradient")
    taken = {s.name: (s, step) for s in found}
    for words, other in (others or {}).items():
        theirs = [s.measured(other) for s in found if not isinstance(s.forward, Zoo)]
        taken |= {f"{s.name}, {words}": (s, other) for s in theirs}
    times = interleaved({name: _running(*who) for name, who in taken.items()}, rounds, warm_up=False)  # it was measured
    ours = [s.name for s in found if isinstance(s.forward, Zoo)]
    default, fastest = ours[0], min(ours, key=lambda name: times[name].median)
    return {
        "level": level,
        "default": default,
        "fastest": fastest,
        "not_reached": [pair_name(*pair) for pair in pairs if pair not in [(s.forward, s.adjoint) for s in found]],
        "pairs": {name: _numbers(s, times[name], times[default], times[fastest]) for name, (s, _) in taken.items()},
    }


def _running(setting: Setting, step: Step) -> Callable[[], object]:
    return lambda: setting.run(step)


def _numbers(setting: Setting, own: Times, default: Times, fastest: Times) -> Data:
    return {
        "seconds": own.median,
        "ratio": own.ratio(default),
        "ratio_to_fastest": own.ratio(fastest),
        "error": setting.error,
        "tol": setting.tol,
        "adjoint_tol": setting.adjoint_tol,
        "evaluations": setting.evaluations,
        "products": setting.products,
    }


def comparison(found: Data, of: str, remark: str = "") -> str:
    """What :func:`compared` found, as a section of a page."""
    rows = [
        [
            name,
            f"{item['seconds']:.2f}",
            f"{item['ratio']:.2f}",
            f"{item['ratio_to_fastest']:.2f}",
            f"{item['error']:.1e}",
            f"{item['tol']:.1e}, {item['adjoint_tol']:.1e}",
            f"{item['evaluations']} + {item['products']}",
        ]
        for name, item in found["pairs"].items()
    ]
    header = ["forward / adjoint", "s", "to first", "to fastest", "error", "tolerances", "evaluations + products"]
    return (
        "## One step, at equal error of the gradient\n\n"
        "Each pair of solvers has tolerances that are just tight enough (in powers of 2, half of the error for each "
        f"solve) for the relative error of the gradient of {of} to be below {found['level']:g}. The reference "
        "is in float64, with residuals below 1e-9. TorchDEQ runs with `ift=True` and relative residuals; its first "
        "pair is its default, and `lam=1e-12` is a ridge that its adjoint takes by registering a solver only. "
        "Normalised weights are computed once a step for both, and no solve may take more steps than it needs. "
        f"{remark}{_left_out(found['not_reached'])}Ratios are to the first of the zoo's pairs ({found['default']}) and "
        f"to the fastest of the zoo ({found['fastest']}).\n\n{table(header, rows)}"
    )


def _left_out(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"Not below that error within {MAX_STEPS} steps of a solve, whatever the tolerances: {'; '.join(names)}. "

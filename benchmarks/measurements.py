"""The measurements of ``benchmarks.solvers``: each is a function of a plan that returns plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_modules.memory import peak_bytes
from zoo.implicit import Anderson, fixed_point

from . import contestants as c
from . import problems as p
from .clock import interleaved
from .contestants import Contestant, Zoo
from .counts import Count, Counting, backward_count, forward_count, residual_trace, sample_evaluations
from .end_to_end import Setting
from .end_to_end import settings as settings_of

Data = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a run measures."""

    solved: Sequence[str] = tuple(p.SOLVED)
    tolerances: Sequence[float] = (1e-3, 1e-5, 1e-6, 1e-8)
    adjoint_tolerances: Sequence[float] = (1e-3, 1e-5, 1e-6)
    scales: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
    traced: Sequence[str] = ("tanh", "outliers", "conv")
    overhead: Sequence[tuple[str, torch.dtype]] = tuple(
        (n, d) for n in p.OVERHEAD for d in (torch.float64, torch.float32)
    )
    overhead_steps: int = 30
    gradients: Sequence[str] = ("tanh", "symmetric", "outliers", "conv")
    errors: Sequence[float] = (1e-2, 1e-3)
    peers: Sequence[Contestant] = c.TORCHDEQ  # whose pairs are tried
    memory_steps: Sequence[int] = (10, 20, 40, 80, 160)
    mixed_tolerances: Sequence[float] = (1e-3, 1e-5)
    compact_shape: tuple[int, int] = (256, 400)
    rounds: int = 11
    seconds: float = 0.7  # of timing, for each action


QUICK = Plan(
    solved=("tanh", "symmetric"),
    tolerances=(1e-3, 1e-6),
    adjoint_tolerances=(1e-3, 1e-6),
    scales=(1e-2, 1e2),
    traced=("tanh",),
    overhead=(("tanh 100", torch.float64),),
    gradients=("tanh",),
    errors=(1e-2,),
    peers=(c.T_ITERATION, c.T_ANDERSON),
    memory_steps=(10, 20),
    compact_shape=(64, 100),
    rounds=3,
    seconds=0.3,
)


def described(plan: Plan) -> Data:
    """The size of each problem, and the spectral radii of its Jacobian at z*."""
    found: Data = {}
    for name in plan.solved:
        problem = p.SOLVED[name]()
        radii = p.spectral_radii(problem)
        found[name] = {"shape": list(problem.z0.shape), "radius": [float(radii.min()), float(radii.max())]}
    return found


def forward_counts(plan: Plan) -> Data:
    """Evaluations of f to relative residuals of the worst sample: ``[problem][solver] -> counts``."""
    found: Data = {}
    for name in plan.solved:
        problem = p.SOLVED[name]()
        found[name] = {
            s.name: [_count(forward_count(s, problem, tol)) for tol in plan.tolerances]
            for s in (*c.ZOO_FORWARD, *c.TORCHDEQ)
        }
    return {"tolerances": list(plan.tolerances), "counts": found}


def backward_counts(plan: Plan) -> Data:
    """Vector-Jacobian products to residuals relative to ||g||: ``[problem][solver] -> counts``."""
    found: Data = {}
    for name in plan.solved:
        problem = p.SOLVED[name]()
        z = problem.solution()
        found[name] = {
            s.name: [_count(backward_count(forward, s, problem, z, tol)) for tol in plan.adjoint_tolerances]
            for forward, s in _adjoints()
        }
    return {"tolerances": list(plan.adjoint_tolerances), "counts": found}


def scale_counts(plan: Plan, tol: float = 1e-5) -> Data:
    """The counts to one tolerance on ``tanh``, in other units of z, and of the loss."""
    problem = p.SOLVED["tanh"]()
    z = problem.solution()
    forward = (c.ANDERSON, *c.TORCHDEQ)
    return {
        "scales": list(plan.scales),
        "tol": tol,
        "state": {s.name: [_count(forward_count(s, problem.scaled(x), tol)) for x in plan.scales] for s in forward},
        "loss": {
            s.name: [_count(backward_count(first, s, problem, z, tol, size=x)) for x in plan.scales]
            for first, s in _adjoints()
            if s.name in {item.name for item in forward}
        },
    }


def traces(plan: Plan, tol: float = 1e-8, max_steps: int = 200) -> Data:
    """The worst sample's residual after each evaluation: ``[problem][solver] -> residuals``."""
    found: Data = {}
    for name in plan.traced:
        problem = p.SOLVED[name]()
        solvers = (c.ANDERSON, c.BROYDEN, *c.TORCHDEQ)
        residuals = {s.name: residual_trace(s, problem, tol, max_steps) for s in solvers}
        found[name] = {s: [float(f"{value:.3g}") for value in values] for s, values in residuals.items()}
    return found


def overheads(plan: Plan) -> Data:
    """T(solve) / (evaluations x T(f)) for a fixed number of steps: ``[problem][solver] -> ratio, evaluations``."""
    found: Data = {}
    steps = plan.overhead_steps
    for name, dtype in plan.overhead:
        problem = p.OVERHEAD[name](dtype)
        contestants = [c.ANDERSON, c.ITERATION, c.BROYDEN, c.T_ITERATION, c.T_BLIND, c.T_ANDERSON, c.T_BROYDEN]
        evaluations = {s.name: _evaluations(s, problem, steps) for s in contestants}
        actions: dict[str, Callable[[], object]] = {s.name: _solving(s, problem, steps) for s in contestants}
        actions["f"] = _evaluating(problem, steps)
        times = interleaved(actions, plan.rounds, plan.seconds, warm_up=False)  # counting has warmed up
        found[f"{name}, {str(dtype).removeprefix('torch.')}"] = {
            "f_seconds": times["f"].median / steps,
            "ratios": {s: times[s].ratio(times["f"]) * steps / count for s, count in evaluations.items()},
            "evaluations": evaluations,
        }
    return found


def gradients(plan: Plan) -> Data:
    """Time of one forward and backward pass at equal error of the parameters' gradient, for each problem and level.

    One round singles out the fastest three pairs of TorchDEQ's solvers, and the fastest one as shipped. They are timed
    at length, in the same rounds as its Anderson pair and the zoo's pairs. So is TorchDEQ's plain iteration that never
    looks at a residual, told how many steps suffice: the price of looking.
    """
    ours = [(c.ANDERSON, c.ANDERSON), (c.RARELY, c.RARELY), (c.ALWAYS, c.ALWAYS), (c.ANDERSON, c.BICGSTAB)]
    theirs = [(a, b) for a in plan.peers for b in plan.peers]
    found: Data = {}
    for name in plan.gradients:
        problem = p.SOLVED[name]()
        for level, settings in settings_of([*ours, *theirs], problem, plan.errors, min(problem.max_steps, 400)).items():
            zoo = [s for s in settings if isinstance(s.forward, Zoo)]
            peers = [s for s in settings if not isinstance(s.forward, Zoo)]
            once = interleaved({s.name: _passing(s, problem) for s in peers}, 1, warm_up=False)
            peers.sort(key=lambda s: once[s.name].median)
            shipped = next((s for s in peers if "lam=" not in s.name), None)
            kept = [
                s
                for i, s in enumerate(peers)
                if i < 3 or s is shipped or (s.forward, s.adjoint) == (c.T_ANDERSON, c.T_ANDERSON)
            ]
            kept += [replace(s, forward=c.T_BLIND) for s in peers if s.forward == c.T_ITERATION][:1]
            actions = {s.name: _passing(s, problem) for s in (*zoo, *kept)}
            times = interleaved(actions, plan.rounds, plan.seconds, warm_up=False)
            found[f"{name}, error {level:g}"] = {
                s.name: {
                    "milliseconds": 1e3 * times[s.name].median,
                    "ratio": times[s.name].ratio(times[zoo[0].name]),
                    "tol": s.tol,
                    "adjoint_tol": s.adjoint_tol,
                    "error": s.error,
                    "evaluations": s.evaluations,
                    "products": s.products,
                }
                for s in (*zoo, *kept)
            }
    return found


def memory(plan: Plan) -> Data:
    """Peak of live tensor bytes of a forward and backward pass, in states: ``[solver] -> one for each max_steps``."""
    problem = p.memory_problem()
    state = problem.z0.numel() * problem.z0.element_size()

    def peak(s: Contestant, steps: int) -> float:
        def action() -> None:
            z = s.equilibrium(problem.f, problem, 0.0, s, 0.0, (steps, steps))
            torch.autograd.grad(problem.loss(z), tuple(problem.f.parameters()))

        return peak_bytes(action) / state

    solvers = (c.ANDERSON, c.ITERATION, c.BROYDEN, c.BROYDEN_10, c.T_ITERATION, c.T_ANDERSON, c.T_BROYDEN)
    return {
        "steps": list(plan.memory_steps),
        "states": {s.name: [peak(s, steps) for steps in plan.memory_steps] for s in solvers},
    }


def mixed(plan: Plan) -> Data:
    """Rows evaluated for a batch of mixed difficulty, with and without per-sample stopping."""
    problem = p.mixed()
    found: Data = {}
    for tol in plan.mixed_tolerances:
        rows: Data = {}
        for s in (c.ANDERSON, c.ITERATION, c.BROYDEN):
            with torch.no_grad():
                _, report = fixed_point(
                    problem.f, problem.z0, *problem.inputs, solver=s.configured(problem, tol, None), on_failure="ignore"
                )
            rows[s.name] = dataclasses.asdict(sample_evaluations(report.steps.tolist(), report.evaluations))
        for t in c.TORCHDEQ:
            rows[t.name] = {"whole_batch": len(problem.z0) * forward_count(t, problem, tol).number}
        found[f"{tol:g}"] = rows
    return found


def compaction(plan: Plan) -> Data:
    """Time of a solve in which 6 % of the rows are hard, over that of Anderson with ``compact=True``.

    Of the solvers that get there in 200 steps.
    """
    problem = p.few_hard(*plan.compact_shape)
    compact = Zoo("zoo anderson, compact", Anderson(compact=True))
    contestants: list[Contestant] = [compact, c.ANDERSON, c.T_ANDERSON, c.T_ANDERSON_SMALL]
    found: Data = {}
    for tol in plan.mixed_tolerances:
        counts = [(s, forward_count(s, problem, tol)) for s in contestants]
        reached = {s.name: _solving(s, problem, count.number, tol) for s, count in counts if count.reached}
        times = interleaved(reached, plan.rounds, plan.seconds)
        found[f"{tol:g}"] = {
            s: {"milliseconds": 1e3 * taken.median, "ratio": taken.ratio(times[compact.name])}
            for s, taken in times.items()
        }
    return found


MEASUREMENTS: dict[str, Callable[[Plan], Data]] = {
    "problems": described,
    "forward": forward_counts,
    "backward": backward_counts,
    "scale": scale_counts,
    "traces": traces,
    "overhead": overheads,
    "gradient": gradients,
    "memory": memory,
    "mixed": mixed,
    "compaction": compaction,
}


def _adjoints() -> list[tuple[Contestant, Contestant]]:
    """Each adjoint contestant behind a forward one of its library, TorchDEQ's with an absolute tolerance."""
    theirs = [replace(s, stop_mode="abs") for s in c.TORCHDEQ]
    return [*((c.ANDERSON, s) for s in c.ZOO_ADJOINT), *((c.T_ITERATION, s) for s in theirs)]


def _count(count: Count) -> Data:
    return {**dataclasses.asdict(count), "reached": count.reached}


def _evaluations(s: Contestant, problem: p.Problem, steps: int) -> int:
    f = Counting(problem.f)
    s.solve(f, problem, 0.0, steps)
    return f.evaluations


def _solving(s: Contestant, problem: p.Problem, steps: int | None, tol: float = 0.0) -> Callable[[], Tensor]:
    return lambda: s.solve(problem.f, problem, tol, steps)


def _passing(setting: Setting, problem: p.Problem) -> Callable[[], object]:
    return lambda: setting.run(problem)


def _evaluating(problem: p.Problem, steps: int) -> Callable[[], None]:
    def evaluate() -> None:
        with torch.no_grad():
            z = problem.z0
            for _ in range(steps):
                z = problem.f(z, *problem.inputs)

    return evaluate


def plain(plan: Plan) -> Data:
    """The plan as JSON can hold it."""

    def plain_value(value: object) -> object:
        if isinstance(value, tuple):
            return [plain_value(item) for item in value]
        if isinstance(value, Contestant):
            return value.name
        return value if isinstance(value, str | int | float) else str(value)

    return {item.name: plain_value(getattr(plan, item.name)) for item in dataclasses.fields(plan)}

"""What a solve costs beside the evaluations of f, and how often the host waits for a device, in training steps.

Of ``python -m benchmarks.solvers --device cuda`` (or ``cpu``): the zoo's models, and the zoo alone.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import parametrize

import zoo
from zoo.implicit import DEQ, Anderson, Broyden, ConvergenceWarning, ImplicitGradient, Solver, one_draw

from .command import Data, machine, made_by
from .report import table
from .scaling_worker import TASKS, Loss

READS = ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy")
"""Methods of tensors that wait for a device, if the tensor is on one."""

SOLVERS: dict[str, Solver] = {"anderson": Anderson(tol=1e-3), "broyden": Broyden(tol=1e-3)}


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        column: which of the sizes of ``TASKS`` a batch has.
        names: of models.
        rounds: of timing.
    """

    device: str
    column: int
    names: Sequence[str] = tuple(TASKS)
    rounds: int = 7


@contextmanager
def waits(device: str) -> Iterator[Callable[[], int]]:
    """How often the host waited for the device in this context: as CUDA says, or as it would from a CPU's tensors."""
    if device == "cpu":
        seen: list[str] = []
        with ExitStack() as patches:
            for name in READS:
                patches.enter_context(mock.patch.object(Tensor, name, _noting(name, seen)))
            yield lambda: len(seen)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in said)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _noting(name: str, seen: list[str]) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return method(*args, **kwargs)

    return noted


def costs(plan: Plan) -> Data:
    """Of each model and solver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of random weights
        return {name: {key: _one(plan, name, solver) for key, solver in SOLVERS.items()} for name in plan.names}


def _one(plan: Plan, name: str, solver: Solver) -> Data:
    device, task = torch.device(plan.device), TASKS[name]
    torch.manual_seed(0)
    model = zoo.create_model(name, solver=solver, gradient=ImplicitGradient(solver))
    loss = Loss(model, task).to(device)
    batch = tuple(x.to(device) for x in task.batch(task.sizes[plan.column], torch.Generator().manual_seed(1)))
    deq = next(module for module in model.modules() if isinstance(module, DEQ))
    calls: list[tuple[Any, ...]] = []
    handle = deq.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output[0])))
    loss(*batch).backward()  # warms up
    handle.remove()
    with waits(plan.device) as count:
        value = loss(*batch)
        forward = count()
        value.backward()
        backward = count() - forward
    report, adjoint = deq.report, deq.adjoint_report
    assert report is not None  # noqa: S101 - for the type checker
    inputs, z = calls[0]
    with torch.no_grad():

        def solve() -> None:
            deq(*inputs)

        def evaluate() -> None:
            with one_draw(), parametrize.cached():  # as within a solve
                for _ in range(report.evaluations):
                    deq.cell(z, *inputs)

        seconds = [[_seconds(action, device) for action in (solve, evaluate)] for _ in range(plan.rounds + 1)][1:]
    return {
        "evaluations": report.evaluations,
        "products": 0 if adjoint is None else adjoint.evaluations,
        "waits forward": forward,
        "waits backward": backward,
        "f seconds": statistics.median(f for _, f in seconds) / report.evaluations,
        "outside seconds": statistics.median(solve - f for solve, f in seconds),
        "ratio": statistics.median(solve / f for solve, f in seconds),
    }


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()  # one thread: but for what other processes take, that of the clock on the wall
        action()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def markdown(data: Data) -> str:
    """All that ``data`` holds, as one page."""
    rows = [
        [
            f"`{name}`",
            solver,
            f"{item['evaluations']} + {item['products']}",
            f"{item['waits forward']} + {item['waits backward']}",
            f"{1e3 * item['f seconds']:.3g}",
            f"{1e3 * item['outside seconds']:.3g}",
            f"{item['ratio']:.2f}",
        ]
        for name, solvers in data["costs"].items()
        for solver, item in solvers.items()
    ]
    header = ["model", "solver", "evaluations + products", "waits, forward + backward", "f, ms", "outside of f, ms"]
    return (
        f"# What solves cost beside f, and how often the host waits: {data['gpu'] or 'CPU'}\n\n"
        f"{made_by('solvers --device ' + data['device'], data['machine'])} Training steps of random samples and "
        "weights. A wait is a transfer to the host, at which it waits for all that the device has to do; on a CPU, "
        "what would be one. Outside of f is the time of a solve less that of its evaluations of f alone, in the same "
        f"rounds, and the ratio that of the two.\n\n{table([*header, 'ratio'], rows)}\n"
    )


def run(plan: Plan) -> Data:
    """The measurement, as plain data."""
    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else None
    return {"machine": machine(), "device": plan.device, "gpu": gpu, "costs": costs(plan)}

"""Cells in which processes wait for each other: refused, or agreed on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.command_line import same
from zoo.implicit import (
    DEQ,
    GMRES,
    Anderson,
    BiCGSTAB,
    Broyden,
    ConvergenceError,
    FixedPointIteration,
    ImplicitGradient,
    NeumannGradient,
    Newton,
    PhantomGradient,
    SolverReport,
    UnrolledGradient,
    agreeing,
)

# From Python 3.12 a fork of a process with threads is warned of.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

N = 4
TOL = 1e-10
Found = dict[str, Any]


def in_processes(action: Callable[[int], Found], folder: Path, seconds: int = 60, count: int = 2) -> list[Found]:
    """What ``action(rank)`` returns in each of some processes that meet by gloo."""
    folder.mkdir()
    torch.multiprocessing.start_processes(
        _process, args=(action, str(folder), seconds, count), nprocs=count, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _process(rank: int, action: Callable[[int], Found], folder: str, seconds: int, count: int) -> None:
    torch.set_num_threads(1)
    meet, timeout = f"file://{folder}/meet", timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count, timeout=timeout)
    try:
        torch.save(action(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


class _Meet(torch.autograd.Function):
    """The identity, for which all processes meet, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * _one()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * _one()


def _one() -> Tensor:
    ones = torch.ones((), dtype=torch.float64)
    dist.all_reduce(ones)
    return ones / dist.get_world_size()


class Cell(nn.Module):
    """f(z, x) = x * sin(z + b) + 0.1: a small x is an easy one. It counts how often it is evaluated."""

    def __init__(self, meets: bool) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.arange(N, dtype=torch.float64) / N)
        self.meets = meets
        self.evaluations = 0

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        if self.meets and dist.is_initialized():
            z = _Meet.apply(z)
        return x * torch.sin(z + self.b) + 0.1

    def jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        one = _one() if self.meets and dist.is_initialized() else 1
        return torch.diag_embed(x * torch.cos(z + self.b)) * one


def inputs(rank: int) -> Tensor:
    """Process 0 has easy samples, process 1 hard ones."""
    g = torch.Generator().manual_seed(rank)
    return (0.05, 0.8)[rank] * torch.rand(3 - rank, N, dtype=torch.float64, generator=g)


def differentiated(deq: DEQ, z: Tensor, report: SolverReport) -> Found:
    z.square().sum().backward()
    adjoint = deq.adjoint_report
    return {
        "z": z.detach(),
        "gradient": deq.cell.b.grad,
        "steps": report.steps,
        "evaluations": report.evaluations,
        "of adjoint": 0 if adjoint is None else adjoint.evaluations,
        "counted": deq.cell.evaluations,
    }


def deqs(meets: bool) -> dict[str, DEQ]:
    exact = Anderson(tol=TOL, max_steps=300)
    forward = [exact, FixedPointIteration(tol=TOL, max_steps=300, check_every=3), Broyden(tol=TOL), Newton(tol=TOL)]
    adjoint = [exact, GMRES(tol=TOL), BiCGSTAB(tol=TOL), Broyden(tol=TOL), Newton(tol=TOL)]
    others = [NeumannGradient(3), PhantomGradient(2, 0.5), UnrolledGradient()]
    choices = [*((each, ImplicitGradient()) for each in forward), *((exact, ImplicitGradient(a)) for a in adjoint)]
    choices += [(exact, gradient) for gradient in others]
    return {f"{solver} {gradient}": DEQ(Cell(meets), solver, gradient) for solver, gradient in choices}


def agreed(rank: int) -> Found:
    """With the backward pass outside of the context."""
    found = {}
    for name, deq in deqs(meets=True).items():
        with agreeing():
            z, report = deq(inputs(rank))
        found[name] = differentiated(deq, z, report)
    return found


def test_processes_that_agree_evaluate_equally_often_and_get_what_they_get_alone(tmp_path: Path) -> None:
    first, second = in_processes(agreed, tmp_path / "agreed")
    for name, deq in deqs(meets=False).items():
        alone = []
        for rank in range(2):
            deq.zero_grad()
            alone.append(differentiated(deq, *deq(inputs(rank))))
        if not isinstance(deq.solver, Newton):
            assert alone[0]["evaluations"] < alone[1]["evaluations"], f"one would have waited for the other: {name}"
        for key in ("evaluations", "of adjoint", "counted"):
            assert first[name][key] == second[name][key], f"{key} of {name}"
        for found, expected in zip((first[name], second[name]), alone, strict=True):
            assert same(found["steps"], expected["steps"])
            torch.testing.assert_close(found["z"], expected["z"], rtol=0, atol=0)
            torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=0, atol=1e-12)


def without_agreement(folder: Path, rank: int) -> Found:
    (folder / f"met{rank}").touch()
    exact = Anderson(tol=TOL, max_steps=300)
    return differentiated(deq := DEQ(Cell(meets=True), exact), *deq(inputs(rank)))


def test_processes_that_do_not_agree_wait_for_each_other(tmp_path: Path) -> None:
    """What the others are about: if this passed, they would show nothing. They meet first, within the same time."""
    message = r"(?i)timed out|closed by peer|reset by peer"
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=message):
        in_processes(partial(without_agreement, tmp_path), tmp_path / "apart", seconds=10)
    assert {path.name for path in tmp_path.glob("met*")} == {"met0", "met1"}


def failing(rank: int) -> Found:
    """Process 0 converges in so few steps, process 1 does not; then the same of their adjoint solves."""
    found = {}
    for name, solver, gradient in (
        ("forward", Anderson(tol=TOL, max_steps=8), ImplicitGradient()),
        ("adjoint", Anderson(tol=TOL, max_steps=300), ImplicitGradient(FixedPointIteration(tol=TOL, max_steps=12))),
    ):
        deq = DEQ(Cell(meets=True), solver, gradient, on_failure="raise")
        try:
            with agreeing():
                z, _ = deq(inputs(rank))
            z.square().sum().backward()
        except ConvergenceError as error:
            found[name] = str(error)
            found[f"{name} converged"] = bool(error.report.converged.all())
    return found


def test_processes_that_agree_all_raise_where_one_fails(tmp_path: Path) -> None:
    first, second = in_processes(failing, tmp_path / "failing")
    for solve, of in (("forward", "the fixed-point solve"), ("adjoint", "the adjoint solve")):
        assert (first[f"{solve} converged"], second[f"{solve} converged"]) == (True, False)
        for found in (first, second):
            assert found[solve].startswith(of)
        assert first[solve].endswith("in this process, and some samples of another one failed")
        assert "x MAX_STEPS" in second[solve]


def one_has_none(rank: int) -> Found:
    found = {}
    for name, deq in deqs(meets=True).items():
        with agreeing():
            z, report = deq(inputs(1)[: 2 * rank])
        found[name] = differentiated(deq, z, report)
    return found


def test_a_process_without_samples_takes_part(tmp_path: Path) -> None:
    first, second = in_processes(one_has_none, tmp_path / "none")
    for name, deq in deqs(meets=False).items():
        alone = differentiated(deq, *deq(inputs(1)))
        assert (first[name]["counted"], first[name]["evaluations"]) == (alone["counted"], alone["evaluations"]), name
        assert first[name]["z"].shape == (0, N)
        torch.testing.assert_close(second[name]["z"], alone["z"], rtol=0, atol=0)
        torch.testing.assert_close(second[name]["gradient"], alone["gradient"], rtol=0, atol=1e-12)


def reduced(rank: int) -> Found:
    """Where DDP reduces gradients at the same time."""
    deq = DEQ(Cell(meets=True), Anderson(tol=TOL), ImplicitGradient(GMRES(tol=TOL)))
    model = DistributedDataParallel(nn.ModuleDict({"deq": deq, "head": nn.Linear(N, 1).double()})["deq"])
    for _ in range(2):
        with agreeing():
            z, _ = model(inputs(rank))
        model.zero_grad()
        z.square().sum().backward()
    return {"gradient": deq.cell.b.grad}


def test_gradients_are_averaged_where_processes_agree(tmp_path: Path) -> None:
    first, second = in_processes(reduced, tmp_path / "reduced")
    deq = DEQ(Cell(meets=False), Anderson(tol=TOL), ImplicitGradient(GMRES(tol=TOL)))
    for rank in range(2):
        z, _ = deq(inputs(rank))
        (z.square().sum() / 2).backward()
    assert same(first, second)
    torch.testing.assert_close(first["gradient"], deq.cell.b.grad, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::zoo.implicit.ConvergenceWarning")
def test_an_agreement_of_one_process_changes_nothing_and_compaction_is_refused_among_several(tmp_path: Path) -> None:
    with agreeing():
        z, _ = DEQ(Cell(meets=False), Anderson(compact=True))(inputs(1))
    torch.testing.assert_close(z, DEQ(Cell(meets=False), Anderson(compact=True))(inputs(1))[0], rtol=0, atol=0)
    for found in in_processes(compacted, tmp_path / "compacted"):
        assert "take compact=False; given: Anderson(" in found["error"]


def compacted(rank: int) -> Found:
    deq = DEQ(Cell(meets=True), Anderson(compact=True))
    with agreeing():
        return {"error": error_of(deq, inputs(rank))}


def error_of(module: nn.Module, x: Tensor) -> str:
    try:
        module(x)
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


class Model(nn.Module):
    """An equilibrium, and nothing else."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.deq = DEQ(cell, Anderson(tol=TOL))

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(x)[0]


class Within(Cell):
    """A cell with a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(meets=False)
        self.part = part

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, x) + 0 * self.part(z)


def refused(rank: int) -> Found:
    mesh = init_device_mesh("cpu", (1,))

    def linear() -> nn.Module:
        return nn.Linear(N, N).double()

    cells = {
        "ddp": Within(DistributedDataParallel(linear())),
        "fsdp1": Within(_fsdp1()),
        "part": Within(fully_shard(linear(), mesh=mesh)),
        "cell": fully_shard(Cell(meets=False), mesh=mesh),
    }
    found: Found = {name: error_of(Model(cell), inputs(1)) for name, cell in cells.items()}
    whole = fully_shard(Model(Within(linear())), mesh=mesh)
    found["whole"] = whole(inputs(1)).detach()
    whole.reshard()
    found["around"] = error_of(whole.deq, inputs(1))
    return found


def _fsdp1() -> nn.Module:
    """One that does nothing: to make one takes a GPU."""
    made = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(made)
    return made


def test_cells_whose_parts_wait_for_other_processes_are_refused(tmp_path: Path) -> None:
    (found,) = in_processes(refused, tmp_path / "refused", count=1)
    assert "(part, a DistributedDataParallel) is a unit of its own of DDP" in found["ddp"]
    assert "(part, a FullyShardedDataParallel) is a unit of its own of FSDP" in found["fsdp1"]
    assert "(part, a FSDPLinear) is a unit of its own of FSDP" in found["part"]
    assert "(the cell itself, a FSDPCell) is a unit of its own of FSDP" in found["cell"]
    assert "a weight of the cell is sharded over processes (b, a DTensor)" in found["around"]
    torch.testing.assert_close(found["whole"], Model(Cell(meets=False))(inputs(1)).detach())

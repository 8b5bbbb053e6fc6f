"""What each process of the data-parallel test of ``test_known_defects.py`` runs; a new process imports only this."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.problems import InjectedTanhCell, contraction, generator
from zoo.implicit import DEQ, Anderson, ImplicitGradient

WORLD = 2


def deq_and_input() -> tuple[DEQ, Tensor]:
    """The same in every process; the rows of the first half are easier than those of the second."""
    g = generator(0)
    U = torch.randn(6, 3, dtype=torch.float64, generator=g)
    cell = InjectedTanhCell(contraction(6, 0.9), U, torch.zeros(6, dtype=torch.float64))
    x = torch.randn(4 * WORLD, 3, dtype=torch.float64, generator=g)
    x[: len(x) // 2] *= 10  # where tanh saturates, J is small
    tight = Anderson(tol=1e-12)
    return DEQ(cell, tight, ImplicitGradient(tight)), x


def gradients(deq: DEQ, model: torch.nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """Of the mean over the rows, by parameter; and how often f was evaluated."""
    z, report = model(x)
    z.square().sum(dim=1).mean().backward()
    return [p.grad for p in deq.parameters() if p.grad is not None], report.evaluations


def process(rank: int, folder: str) -> None:
    """Solve the rank's rows, and leave averaged gradients and the count of evaluations in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        deq, x = deq_and_input()
        found = gradients(deq, DistributedDataParallel(deq), x.chunk(WORLD)[rank])
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()

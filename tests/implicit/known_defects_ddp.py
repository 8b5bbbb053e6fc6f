"""What both processes of the data-parallel test of ``test_known_defects.py`` run; the new one imports only this."""

from __future__ import annotations

import sys
from datetime import timedelta

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


def in_process(rank: int, folder: str) -> tuple[list[Tensor], int]:
    """What :func:`gradients` returns for the rows of this rank, where processes average their gradients."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    try:
        deq, x = deq_and_input()
        return gradients(deq, DistributedDataParallel(deq), x.chunk(WORLD)[rank])
    finally:
        dist.destroy_process_group()


def main(rank: str, folder: str) -> None:
    """Leave what :func:`in_process` returns in ``folder``."""
    torch.set_num_threads(1)
    torch.save(in_process(int(rank), folder), f"{folder}/rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What each process of the benchmark of scaling runs, started by torchrun."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import zoo
from zoo.implicit import DEQ, ConvergenceWarning

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """A model that is trained.

    Attributes:
        batch: so many random samples.
        loss: of the model on them.
        sizes: samples of a process on a CPU, in a quick run, and on a GPU.
    """

    batch: Callable[[int, torch.Generator], Batch]
    loss: Callable[[Any, Batch], Tensor]
    sizes: tuple[int, int, int]


def _images(count: int, draws: torch.Generator) -> Batch:
    return torch.rand(count, 1, 8, 8, generator=draws), torch.randint(10, (count,), generator=draws)


def _tokens(count: int, draws: torch.Generator) -> Batch:
    text = torch.randint(256, (count, 65), generator=draws)
    return text[:, :-1], text[:, 1:]


def _frames(count: int, draws: torch.Generator) -> Batch:
    image1, image2 = torch.rand(2, count, 3, 64, 96, generator=draws)
    return image1, image2, torch.randn(count, 2, 64, 96, generator=draws)


def _classified(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _read(model: Any, batch: Batch) -> Tensor:
    h, _ = model(batch[0], None)
    loss: Tensor = model.vocabulary.nll(h, batch[1]).mean()
    return loss


def _moved(model: Any, batch: Batch) -> Tensor:
    flow: Tensor = model(batch[0], batch[1])
    return (flow - batch[2]).abs().mean()


TASKS = {
    "tanh_deq": Task(_images, _classified, (64, 8, 1024)),
    "mdeq_nano": Task(_images, _classified, (16, 4, 512)),
    "deq_transformer_nano": Task(_tokens, _read, (4, 2, 256)),
    "deq_flow_nano": Task(_frames, _moved, (2, 2, 16)),
}


class Loss(nn.Module):
    """All of a step that has weights, in one forward, as DDP needs it."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, *batch: Tensor) -> Tensor:
        return self.task.loss(self.model, batch)


class Training:
    """Training steps of one model at one size of the batch; alone, or with gradients averaged by DDP.

    The learning rate is 0: each step is the same work, whether or not the gradients were averaged.
    """

    def __init__(self, name: str, size: int, device: torch.device) -> None:
        task, rank = TASKS[name], dist.get_rank()
        torch.manual_seed(0)
        self.loss = Loss(zoo.create_model(name), task).to(device)
        self.deqs = [module for module in self.loss.modules() if isinstance(module, DEQ)]
        self.step_module: nn.Module = self.loss
        if dist.get_world_size() > 1:
            self.step_module = DistributedDataParallel(self.loss)
        self.batch = tuple(x.to(device) for x in task.batch(size, torch.Generator().manual_seed(1 + rank)))
        self.optimizer = torch.optim.SGD(self.loss.parameters(), lr=0.0)
        self.device = device

    def step(self, *, averaging: bool) -> float:
        """Seconds of a step, of the slowest process."""
        apart: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if not averaging and isinstance(self.step_module, DistributedDataParallel):
            apart = self.step_module.no_sync()
        self.optimizer.zero_grad()
        dist.barrier()
        self._wait()
        start = time.perf_counter()
        with apart:
            self.step_module(*self.batch).backward()
        self.optimizer.step()
        self._wait()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    def evaluations(self) -> int:
        """Of the cells, with the products of the adjoint, in the last step of all processes."""
        reports = [report for deq in self.deqs for report in (deq.report, deq.adjoint_report) if report is not None]
        count = torch.tensor(sum(report.evaluations for report in reports), device=self.device)
        dist.all_reduce(count)
        return int(count)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measured(name: str, size: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Steps with and without averaging, in turns; of each two in a row, the second counts.

    The first is what DDP makes of a change: where the last step did not average, this one sends no buffers.
    """
    training = Training(name, size, device)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for k in range(rounds + 1):
        for averaging in (True, False) if k % 2 else (False, True):
            training.step(averaging=averaging)
            seconds[averaging].append(training.step(averaging=averaging))
    averaged, apart = seconds[True][1:], seconds[False][1:]  # after a round to warm up
    return {
        "batch": size,
        "seconds": statistics.median(averaged),
        "without": statistics.median(b / a for a, b in zip(averaged, apart, strict=True)),
        "evaluations": training.evaluations(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--work", type=json.loads, required=True, help="[[model, samples of this process], ...]")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # of random weights
    dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    device = torch.device(given.device)
    if given.device == "cuda":
        device = torch.device("cuda", dist.get_rank())
        torch.cuda.set_device(device)
    try:
        found = [measured(name, size, device, given.rounds) for name, size in given.work]
        if dist.get_rank() == 0:
            given.out.write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

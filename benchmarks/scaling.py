"""Training on several processes: samples and evaluations a second, efficiency, and the share of communication.

    python -m benchmarks.scaling                          # minutes; writes benchmarks/results/scaling.*
    python -m benchmarks.scaling --processes 1 2 4 8 --device cuda
    python -m benchmarks.scaling --quick                  # a look, and nothing to quote

Each number of processes is a run of torchrun on this machine, under DistributedDataParallel: gloo with one thread a
process on a CPU, NCCL with one process a GPU. Weak scaling keeps the batch of a process, strong scaling that of all of
them together. The runs of all numbers take turns, and the figures are medians over turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .command import RESULTS, Data, arguments, machine, made_by
from .report import table
from .scaling_worker import TASKS

ROOT = Path(__file__).parents[1]
WEAK, STRONG = "weak", "strong"


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        names: of models.
        processes: numbers of them; the first one is what the others are compared with.
        device: ``"cpu"`` or ``"cuda"``.
        column: which of the sizes of ``TASKS`` a process has: 0 on a CPU, 1 in a quick run, 2 on a GPU.
        rounds: of timing in a run of torchrun.
        turns: runs of torchrun for each number of processes.
    """

    names: Sequence[str] = tuple(TASKS)
    processes: Sequence[int] = (1, 2)
    device: str = "cpu"
    column: int = 0
    rounds: int = 4
    turns: int = 3


QUICK = Plan(column=1, rounds=1, turns=1)


def scaling(plan: Plan, say: Callable[[str], object] = print) -> Data:
    """Of each model, way of scaling and number of processes what was measured."""
    most = max(plan.processes)
    jobs = [(name, kind) for name in plan.names for kind in (WEAK, STRONG)]
    turns: dict[int, list[list[Data]]] = {count: [] for count in plan.processes}
    for turn in range(plan.turns):
        for count in plan.processes:
            sizes = {WEAK: 1, STRONG: most / count}
            work = [[name, round(TASKS[name].sizes[plan.column] * sizes[kind])] for name, kind in jobs]
            turns[count].append(_torchrun(plan, count, work))
            say(f"turn {turn + 1} of {plan.turns}: {count} processes")
    found: Data = {}
    for k, (name, kind) in enumerate(jobs):
        first = [turn[k] for turn in turns[plan.processes[0]]]
        of_counts = {str(count): _summary(count, [turn[k] for turn in turns[count]]) for count in plan.processes}
        for number, item in of_counts.items():
            own = [turn[k] for turn in turns[int(number)]]
            gain = [a["seconds"] / b["seconds"] for a, b in zip(first, own, strict=True)]
            more = 1 if kind == WEAK else int(number) / plan.processes[0]
            item["efficiency"] = statistics.median(gain) / more
        found.setdefault(name, {})[kind] = of_counts
    return found


def _summary(count: int, turns: Sequence[Data]) -> Data:
    seconds = statistics.median(turn["seconds"] for turn in turns)
    share = 1 - statistics.median(turn["without"] for turn in turns)
    return {
        "batch": turns[0]["batch"],
        "seconds": seconds,
        "samples": count * turns[0]["batch"] / seconds,
        "evaluations": statistics.median(turn["evaluations"] / turn["seconds"] for turn in turns),
        "communication": share if count > 1 else 0.0,
    }


def _torchrun(plan: Plan, count: int, work: list[Any]) -> list[Data]:
    """What the first of so many processes wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        told = ["--device", plan.device, "--rounds", str(plan.rounds), "--work", json.dumps(work), "--out", str(out)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        subprocess.run(  # noqa: S603 - its own program
            [*launch, "-m", "benchmarks.scaling_worker", *told],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found: list[Data] = json.loads(out.read_text())
    return found


# --------------------------------------------------------------------------------------------------------------- tables


def markdown(data: Data) -> str:
    """All that ``data`` holds, as one page."""
    plan = data["plan"]
    where = "CPU, gloo, one thread a process" if plan["device"] == "cpu" else f"{data['gpu']}, NCCL"
    parts = [
        "# Training on several processes",
        f"{made_by('scaling', data['machine'])} {where}; {data['cores']} cores. A training step of each model under "
        "DistributedDataParallel, of random samples and weights; one process is without DDP. Times are those of the "
        "clock on the wall, of the slowest process, so whatever else runs on the machine is in them. Efficiency is "
        "t1 / tN where each process has its batch (weak), and t1 / (N tN) where they share one (strong): 1 is the "
        "limit. Communication is the share of a step that is not there without averaging (`DDP.no_sync`), in turns in "
        "the same run; a solve takes as long as its slowest sample, and that the slowest process is waited for is in "
        "the efficiency, and not in this; below 0 it is noise. Evaluations are of the cells, the adjoint's products "
        f"included, of all processes. Medians over {plan['turns']} turns, in each of which every number of processes "
        f"is a run of {plan['rounds']} rounds.",
    ]
    for kind, title in ((WEAK, "Weak: the batch of a process is kept"), (STRONG, "Strong: the joint batch is kept")):
        rows = [
            [
                f"`{name}`",
                count,
                item["batch"],
                f"{1e3 * item['seconds']:.0f}",
                f"{item['samples']:.0f}" if item["samples"] >= 10 else f"{item['samples']:.1f}",
                f"{item['evaluations']:.0f}",
                f"{item['efficiency']:.2f}",
                f"{round(100 * item['communication'])} %" if count != "1" else "",
            ]
            for name, kinds in data["scaling"].items()
            for count, item in kinds[kind].items()
        ]
        header = ["model", "processes", "batch of each", "step, ms", "samples/s", "evaluations/s"]
        parts += [f"## {title}", table([*header, "efficiency", "communication"], rows)]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------------ run


def run(plan: Plan, say: Callable[[str], object] = print) -> Data:
    """The measurement, as plain data."""
    plain = {"device": plan.device, "processes": list(plan.processes), "rounds": plan.rounds, "turns": plan.turns}
    gpu = torch.cuda.get_device_name() if plan.device == "cuda" else None
    return {"machine": machine(), "plan": plain, "gpu": gpu, "cores": os.cpu_count(), "scaling": scaling(plan, say)}


def main(argv: Sequence[str] | None = None) -> None:
    options: dict[str, dict[str, Any]] = {
        "processes": {"nargs": "+", "type": int, "help": "numbers of processes; 1 2, or 1 and as many as GPUs"},
        "device": {"choices": ("cpu", "cuda"), "default": "cpu", "help": "cpu (gloo) or cuda (NCCL)"},
    }
    given = arguments(__doc__, TASKS, argv, RESULTS, options)
    plan = replace(QUICK if given.quick else Plan(), names=given.parts)
    if given.options["device"] == "cuda":
        plan = replace(
            plan, device="cuda", column=1 if given.quick else 2, processes=sorted({1, torch.cuda.device_count()})
        )
    if given.options["processes"]:
        plan = replace(plan, processes=sorted(set(given.options["processes"])))
    if plan.device == "cuda" and max(plan.processes) > torch.cuda.device_count():
        raise SystemExit(
            f"--device cuda takes one GPU a process, and there are {torch.cuda.device_count()}; given: --processes "
            f"{' '.join(map(str, plan.processes))}"
        )
    data = run(plan)
    given.write(markdown(data), "scaling.md", data, "scaling")


if __name__ == "__main__":
    main()

"""The zoo's solvers beside TorchDEQ's, on the same problems, in the same run, on one thread.

    python -m benchmarks.solvers             # all of it: minutes; writes benchmarks/results
    python -m benchmarks.solvers --quick     # a look: seconds, and nothing to quote

Prints tables, and writes them with a plot and all numbers (``solvers.json``). Counts do not depend on the machine;
times do, and are quoted as ratios within the same rounds.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from .measurements import MEASUREMENTS, QUICK, Data, Plan, plain
from .report import markdown, plot

RESULTS = Path(__file__).parent / "results"


def machine() -> Data:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchdeq": importlib.metadata.version("torchdeq"),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run(plan: Plan, parts: Iterable[str] = tuple(MEASUREMENTS), say: Callable[[str], object] = print) -> Data:
    """The measurements named, as plain data."""
    found: Data = {"machine": machine(), "plan": plain(plan)}
    for part in parts:
        start = time.perf_counter()
        found[part] = MEASUREMENTS[part](plan)
        say(f"{part}: {time.perf_counter() - start:.0f} s")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer problems and repetitions")
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), metavar="PART", help=", ".join(MEASUREMENTS))
    parser.add_argument(
        "--out", type=Path, help="folder to write to; benchmarks/results for a full run, otherwise nothing is written"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = run(QUICK if arguments.quick else Plan(), arguments.only or tuple(MEASUREMENTS))
    text = markdown(data)
    print(text)
    out = arguments.out or (None if arguments.quick or arguments.only else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "solvers.json").write_text(json.dumps(data, indent=1) + "\n")
        (out / "README.md").write_text(text)
        plot(data, out / "solvers.png")


if __name__ == "__main__":
    main()

"""What `zoo.load_pretrained` of a shipped weight takes in a fresh process, beside reading its file with safetensors.

    python -m benchmarks.loading             # minutes; writes benchmarks/results/loading.*
    python -m benchmarks.loading --quick     # one weight, and nothing to quote

Each side is a process of its own, from the start of Python to its end: `import zoo` and the loading, which reads the
record, checks both digests and makes the model; against `import torch`, `import safetensors.torch` and `load_file`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import zoo
from zoo.records import SHIPPED, WeightsRecord

from .clock import interleaved
from .command import RESULTS, Data, arguments, machine, made_by, measured
from .report import table

ROOT = Path(__file__).parents[1]
ZOO = "zoo"
FILE = "safetensors"
FILE_AND_TORCHVISION = "safetensors and torchvision"
"""The second side, whose process imports torchvision too: for the models whose layers are torchvision's."""


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        names: of weights; all that ship if None.
        rounds: of timing.
    """

    names: Sequence[str] | None = None
    rounds: int = 7


QUICK = Plan(names=("tanh_deq.digits",), rounds=1)


def loading(plan: Plan) -> Data:
    """Seconds of each side, and the zoo's over each other's, for each weight."""
    records = zoo.list_weights(source=SHIPPED)
    return {r.name: _one(r, plan.rounds) for r in records if plan.names is None or r.name in plan.names}


def _one(record: WeightsRecord, rounds: int) -> Data:
    file = f"from safetensors.torch import load_file; load_file({str(record.path)!r})"
    load = f"import zoo; zoo.load_pretrained({record.name!r})"
    programs = {ZOO: load, FILE: f"import torch; {file}"}
    if "True" in _run(f"{load}; import sys; print('torchvision' in sys.modules)"):
        programs[FILE_AND_TORCHVISION] = f"import torch, torchvision; {file}"
    actions: dict[str, Callable[[], object]] = {name: partial(_run, program) for name, program in programs.items()}
    times = interleaved(actions, rounds, clock=_seconds_of_children)
    return {
        "bytes": record.path.stat().st_size,
        "seconds": {name: time.median for name, time in times.items()},
        "ratio": {name: times[ZOO].ratio(time) for name, time in times.items() if name != ZOO},
    }


def _run(program: str) -> str:
    """What a Python program prints, run in a process of its own on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603 - its own programs
        [sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def _seconds_of_children() -> float:
    """Of the processor, for all processes that were started here and ended."""
    times = os.times()
    return times.children_user + times.children_system


# --------------------------------------------------------------------------------------------------------------- tables


def markdown(data: Data) -> str:
    """All that ``data`` holds, as one page."""
    rows = [
        [
            f"`{name}`",
            f"{item['bytes'] / 2**10:.0f}",
            f"{item['seconds'][ZOO]:.2f}",
            f"{item['seconds'][FILE]:.2f}",
            f"{item['ratio'][FILE]:.2f}",
            f"{item['ratio'][FILE_AND_TORCHVISION]:.2f}" if FILE_AND_TORCHVISION in item["ratio"] else "",
        ]
        for name, item in data["loading"].items()
    ]
    header = ["weights", "KiB", f"{ZOO}, s", f"{FILE}, s", "ratio", "ratio where both import torchvision"]
    return (
        "# Loading a shipped weight in a fresh process\n\n"
        f"{made_by('loading', data['machine'])} `import zoo; zoo.load_pretrained(name)` against `import torch`, "
        "`import safetensors.torch` and `load_file` of the same file, each from the start of its process to its end. "
        "Times are of the processor; ratios are medians over rounds in which all take turns. The last column is of "
        "models with layers of torchvision, whose import takes about as long as torch's.\n\n"
        f"{table(header, rows)}\n"
    )


# ------------------------------------------------------------------------------------------------------------------ run


def run(plan: Plan, say: Callable[[str], object] = print) -> Data:
    """The measurement, as plain data."""
    return {"machine": machine(), **measured(["loading"], {"loading": partial(loading, plan)}, say)}


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, ["loading"], argv, RESULTS)
    data = run(QUICK if given.quick else Plan())
    given.write(markdown(data), "loading.md", data, "loading")


if __name__ == "__main__":
    main()

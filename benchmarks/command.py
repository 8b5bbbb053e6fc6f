"""What all benchmarks share on the command line: their options, what they say of the machine, where they write."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Data = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Arguments:
    """What was asked for.

    Attributes:
        quick: a look.
        parts: names of measurements.
        out: the folder to write to; None where nothing is written.
        options: the values of those that are the benchmark's own, by name.
    """

    quick: bool
    parts: Sequence[str]
    out: Path | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def write(self, text: str, page: str, data: Data, name: str) -> None:
        """Print a page, and write it as ``page`` and the numbers as ``name.json`` if there is a folder to write to."""
        print(text)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
            (self.out / page).write_text(text)


def arguments(
    description: str | None,
    parts: Iterable[str],
    argv: Sequence[str] | None,
    results: Path,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Arguments:
    """Read the command line of a benchmark, whose full runs are written to ``results``, and leave torch one thread.

    ``options`` are the benchmark's own: by name, what ``add_argument`` takes.
    """
    parts = tuple(parts)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller problems, and fewer repetitions")
    parser.add_argument("--only", nargs="+", choices=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument(
        "--out", type=Path, help="folder to write to; benchmarks/results for a full run, otherwise nothing is written"
    )
    own = dict(options or {})
    for name, settings in own.items():
        parser.add_argument(f"--{name}", **settings)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = given.out or (None if given.quick or given.only else results)
    return Arguments(given.quick, given.only or parts, out, {name: getattr(given, name) for name in own})


def measured(
    parts: Iterable[str], measurements: Mapping[str, Callable[[], Data]], say: Callable[[str], object]
) -> Data:
    """The measurements named, and how long each took."""
    data: Data = {}
    for part in parts:
        start = time.perf_counter()
        data[part] = measurements[part]()
        say(f"{part}: {time.perf_counter() - start:.0f} s")
    return data


def machine() -> Data:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchdeq": _torchdeq(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def made_by(name: str, machine: Data) -> str:
    """The command, the day and the machine, in a sentence."""
    theirs = "" if machine["torchdeq"] is None else f", TorchDEQ {machine['torchdeq']}"
    return (
        f"Made by `python -m benchmarks.{name}` on {machine['date']}: {machine['cpu']}, {machine['threads']} thread, "
        f"Python {machine['python']}, torch {machine['torch']}{theirs}."
    )


def _torchdeq() -> str | None:
    """Its version; None where it is not installed, as for what compares with RAFT alone."""
    try:
        return importlib.metadata.version("torchdeq")
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

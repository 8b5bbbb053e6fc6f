"""The zoo's solvers beside TorchDEQ's, on the same problems, in the same run, on one thread.

    python -m benchmarks.solvers             # all of it: minutes; writes benchmarks/results
    python -m benchmarks.solvers --quick     # a look: seconds, and nothing to quote
    python -m benchmarks.solvers --device cuda  # instead: what solves cost beside f on a device, and how often it waits

Prints tables, and writes them with a plot and all numbers (``solvers.json``). Counts do not depend on the machine;
times do, and are quoted as ratios within the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from . import solver_costs
from .command import RESULTS, arguments, machine, measured
from .measurements import MEASUREMENTS, QUICK, Data, Plan, plain
from .report import markdown, plot

DEVICE = "measure the zoo's solvers in training steps of its models on this device instead"


def run(plan: Plan, parts: Iterable[str] = tuple(MEASUREMENTS), say: Callable[[str], object] = print) -> Data:
    """The measurements named, as plain data."""
    measurements = {name: partial(measure, plan) for name, measure in MEASUREMENTS.items()}
    return {"machine": machine(), "plan": plain(plan), **measured(parts, measurements, say)}


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, MEASUREMENTS, argv, RESULTS, {"device": {"choices": ("cpu", "cuda"), "help": DEVICE}})
    if (device := given.options["device"]) is not None:
        found = solver_costs.run(solver_costs.Plan(device, column=1 if given.quick or device == "cpu" else 2))
        given.write(solver_costs.markdown(found), f"solver_costs_{device}.md", found, f"solver_costs_{device}")
        return
    data = run(QUICK if given.quick else Plan(), given.parts)
    given.write(markdown(data), "README.md", data, "solvers")
    if given.out is not None:
        plot(data, given.out / "solvers.png")


if __name__ == "__main__":
    main()

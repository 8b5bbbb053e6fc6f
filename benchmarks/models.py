"""A training step of an MDEQ, by the zoo and by TorchDEQ with the same cell, in the same run, on one thread.

    python -m benchmarks.models             # mdeq_large at CIFAR's size: minutes; writes benchmarks/results/models.*
    python -m benchmarks.models --quick     # a small MDEQ: seconds, and nothing to quote

Prints tables, and writes them with all numbers (``models.json``). Counts and bytes do not depend on the machine; times
do, and are quoted as ratios within the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from . import contestants as c
from .command import RESULTS, Data, arguments, machine, made_by, measured
from .contestants import Contestant
from .report import table
from .train_mdeq import LARGE, SMALL, Recipe, Trained, trained
from .training_steps import PAIRS, compared, comparison, costs_of, costs_table

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        recipe: the model.
        level: the error of the gradient that all pairs of solvers are set for.
        pairs: of solvers, forward and adjoint; the zoo's first one is the default that others are compared with.
        rounds: of timing.
        unrolled: how many applications of the cell the implicit step is compared with.
    """

    recipe: Recipe = LARGE
    level: float = 3e-2  # about what the default tolerances of 1e-3 give
    pairs: Sequence[tuple[Contestant, Contestant]] = PAIRS
    rounds: int = 3
    unrolled: int = 18


QUICK = Plan(recipe=SMALL, pairs=((c.BROYDEN, c.BROYDEN), (c.T_BROYDEN, c.T_BROYDEN)), rounds=2)

# --------------------------------------------------------------------------------------------------------- measurements


def model(plan: Plan, found: Trained) -> Data:
    """What is trained, and what came of it."""
    step, recipe = found.step, plan.recipe
    radii = step.spectral_radii()
    return {
        "name": recipe.name,
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "images": list(step.images.shape),
        "state": sum(z_i[0].numel() for z_i in step.reference[0]),
        "steps": recipe.steps,
        "applications": recipe.applications,
        "jacobian_weight": recipe.jacobian_weight,
        "loss": found.loss,
        "penalty": found.penalty,
        "radius": [float(radii.min()), float(radii.max())],
    }


def costs(plan: Plan, found: Trained) -> Data:
    return costs_of(found.step, plan.rounds)


def steps(plan: Plan, found: Trained) -> Data:
    return compared(found.step, plan.level, plan.pairs, plan.rounds)


def memory(plan: Plan, found: Trained) -> Data:
    """Peak bytes of one forward and backward pass of the whole model, implicit and unrolled."""
    step = found.step
    implicit, again, unrolled = step.peak(), step.peak(recompute=True), step.peak(plan.unrolled)
    parameters = sum(p.numel() * p.element_size() for p in step.model.parameters())
    return {
        "applications": plan.unrolled,
        "bytes": {"parameters": parameters, "implicit": implicit, "implicit, recompute": again, "unrolled": unrolled},
        "share": {"implicit": implicit / unrolled, "implicit, recompute": again / unrolled},
    }


MEASUREMENTS: dict[str, Callable[[Plan, Trained], Data]] = {
    "model": model,
    "costs": costs,
    "steps": steps,
    "memory": memory,
}

# --------------------------------------------------------------------------------------------------------------- tables


def markdown(data: Data) -> str:
    """All that ``data`` holds, as one page."""
    parts = [
        "# A training step of an MDEQ beside TorchDEQ's",
        (
            f"{made_by('models', data['machine'])} float32. Times are of the processor; their ratios are medians over "
            "rounds in which all take turns."
        ),
    ]
    parts += [section(data[name]) for name, section in _SECTIONS.items() if name in data]
    return "\n\n".join(parts) + "\n"


def _model(found: Data) -> str:
    images = " x ".join(map(str, found["images"]))
    return (
        "## The model\n\n"
        f"`{found['name']}`, {found['parameters']:,} parameters, a batch of {images}, a state of {found['state']:,} "
        "numbers a sample, dropout off. At its initialisation the cell does not contract, so it is "
        f"trained first: {found['steps']} steps of Adam on scikit-learn's digits, enlarged, through "
        f"{found['applications']} applications of the cell, with {found['jacobian_weight']:g} times the Jacobian "
        f"penalty. After that the training loss is {found['loss']:.2f}, and the spectral radius of df/dz at z* is "
        "{:.2f} to {:.2f} on 8 digits that it has not seen.".format(*found["radius"])
    )


def _steps(found: Data) -> str:
    return comparison(found, "cell and stem")


def _memory(found: Data) -> str:
    rows = [
        [name, f"{size / MIB:.1f}", f"{found['share'][name]:.2f}" if name in found["share"] else ""]
        for name, size in found["bytes"].items()
    ]
    return (
        "## Peak memory of a step\n\n"
        "Live tensor bytes above the model's own, with the default solvers, the gradients of all parameters included; "
        f"unrolled is backpropagation through {found['applications']} applications of the same cell.\n\n"
        + table(["", "MiB", "of unrolled"], rows)
    )


_SECTIONS: dict[str, Callable[[Data], str]] = {
    "model": _model,
    "costs": costs_table,
    "steps": _steps,
    "memory": _memory,
}

# ------------------------------------------------------------------------------------------------------------------ run


def run(plan: Plan, parts: Iterable[str] = tuple(MEASUREMENTS), say: Callable[[str], object] = print) -> Data:
    """The measurements named, as plain data."""
    start = time.perf_counter()
    found = trained(plan.recipe)
    say(f"training: {time.perf_counter() - start:.0f} s")
    measurements = {name: partial(measure, plan, found) for name, measure in MEASUREMENTS.items()}
    return {"machine": machine(), **measured(parts, measurements, say)}


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(__doc__, MEASUREMENTS, argv, RESULTS)
    data = run(QUICK if given.quick else Plan(), given.parts)
    given.write(markdown(data), "models.md", data, "models")


if __name__ == "__main__":
    main()

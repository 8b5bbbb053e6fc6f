"""A training step of an MDEQ, by the zoo and by TorchDEQ with the same cell, in the same run, on one thread.

    python -m benchmarks.models             # mdeq_large at CIFAR's size: minutes; writes benchmarks/results/models.*
    python -m benchmarks.models --quick     # a small MDEQ: seconds, and nothing to quote

Prints tables, and writes them with all numbers (``models.json``). Counts and bytes do not depend on the machine; times
do, and are quoted as ratios within the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.implicit.computed_weights import computed_once

from . import contestants as c
from .clock import interleaved
from .contestants import Contestant, Zoo
from .memory import peak_bytes
from .report import table
from .solvers import RESULTS, machine
from .train_mdeq import LARGE, SMALL, Recipe, Trained, TrainingStep, trained
from .training_steps import PAIRS, Setting, settings

Data = dict[str, Any]
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
    """Seconds of what every step is made of, whoever makes it."""
    step = found.step
    x = step.injection()
    z = tuple(z_i.to(x.dtype).requires_grad_() for z_i in step.reference[0])
    everything = (*z, *step.parameters)
    with computed_once(step.cell):
        fz = step.cell(z, x)
        u = tuple(torch.ones_like(z_i) for z_i in z)

        def evaluation() -> None:
            with torch.no_grad():
                step.cell(z, x)

        def head_and_stem() -> None:
            inner = step.injection()
            g = torch.autograd.grad(step.loss(z), z)
            torch.autograd.grad(inner, tuple(step.model.stem.parameters()), torch.ones_like(inner))
            del g

        times = interleaved(
            {
                "evaluation": evaluation,
                "recorded evaluation": lambda: step.cell(z, x),
                "product with J^T": lambda: torch.autograd.grad(fz, z, u, retain_graph=True),
                "product with (df/dtheta)^T": lambda: torch.autograd.grad(fz, everything, u, retain_graph=True),
                "stem and head, both ways": head_and_stem,
            },
            plan.rounds,
        )
    return {name: item.median for name, item in times.items()}


def steps(plan: Plan, found: Trained) -> Data:
    """Time of one step at equal error of the gradient: ``[forward / adjoint] -> seconds, ratios, counts``."""
    step = found.step
    pairs = settings(step, plan.level, plan.pairs)
    times = interleaved({s.name: _running(s, step) for s in pairs}, plan.rounds, warm_up=False)  # settings warmed up
    ours = [s for s in pairs if isinstance(s.forward, Zoo)]
    default, fastest = ours[0], min(ours, key=lambda s: times[s.name].median)
    return {
        "level": plan.level,
        "default": default.name,
        "fastest": fastest.name,
        "pairs": {
            s.name: {
                "seconds": times[s.name].median,
                "ratio": times[s.name].ratio(times[default.name]),
                "ratio_to_fastest": times[s.name].ratio(times[fastest.name]),
                "error": s.error,
                "tol": s.tol,
                "adjoint_tol": s.adjoint_tol,
                "evaluations": s.evaluations,
                "products": s.products,
            }
            for s in pairs
        },
    }


def memory(plan: Plan, found: Trained) -> Data:
    """Peak bytes of one forward and backward pass of the whole model, implicit and unrolled."""
    step = found.step

    def peak(unrolled: int | None, recompute: bool) -> int:
        model = copy.deepcopy(step.model)
        model.deq.unrolled, model.deq.recompute, model.deq.on_failure = unrolled, recompute, "ignore"

        def action() -> None:
            torch.nn.functional.cross_entropy(model(step.images), step.labels).backward()

        return peak_bytes(action)

    implicit, again = peak(None, recompute=False), peak(None, recompute=True)
    unrolled = peak(plan.unrolled, recompute=False)
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


def _running(setting: Setting, step: TrainingStep) -> Callable[[], object]:
    return lambda: setting.run(step)


# --------------------------------------------------------------------------------------------------------------- tables


def markdown(data: Data) -> str:
    """All that ``data`` holds, as one page."""
    machine = data["machine"]
    parts = [
        "# A training step of an MDEQ beside TorchDEQ's",
        (
            f"Made by `python -m benchmarks.models` on {machine['date']}: {machine['cpu']}, {machine['threads']} "
            f"thread, Python {machine['python']}, torch {machine['torch']}, TorchDEQ {machine['torchdeq']}. float32. "
            "Times are of the processor; their ratios are medians over rounds in which all take turns."
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


def _costs(found: Data) -> str:
    rows = [[name, f"{1e3 * seconds:.0f}"] for name, seconds in found.items()]
    return "## What a step is made of\n\nThe same for both libraries.\n\n" + table(["", "ms"], rows)


def _steps(found: Data) -> str:
    rows = [
        [
            name,
            f"{item['seconds']:.2f}",
            f"{item['ratio']:.2f}",
            f"{item['ratio_to_fastest']:.2f}",
            f"{item['error']:.1e}",
            f"{item['tol']:.1e}, {item['adjoint_tol']:.1e}",
            f"{item['evaluations']} + {item['products']}",
        ]
        for name, item in found["pairs"].items()
    ]
    header = ["forward / adjoint", "s", "to first", "to fastest", "error", "tolerances", "evaluations + products"]
    return (
        "## One step, at equal error of the gradient\n\n"
        "Each pair of solvers has tolerances that are just tight enough (in powers of 2, half of the error for each "
        f"solve) for the relative error of the gradient of cell and stem to be below {found['level']:g}. The reference "
        "is in float64, with residuals below 1e-9. TorchDEQ runs with `ift=True` and relative residuals; its first "
        "pair is its default, and `lam=1e-12` is a ridge that its adjoint takes by registering a solver only. "
        "Normalised weights are computed once a step for both, and no solve may take more steps than it needs. "
        f"Ratios are to the first of the zoo's pairs ({found['default']}) and to the fastest of the zoo "
        f"({found['fastest']}).\n\n{table(header, rows)}"
    )


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


_SECTIONS: dict[str, Callable[[Data], str]] = {"model": _model, "costs": _costs, "steps": _steps, "memory": _memory}

# ------------------------------------------------------------------------------------------------------------------ run


def run(plan: Plan, parts: Iterable[str] = tuple(MEASUREMENTS), say: Callable[[str], object] = print) -> Data:
    """The measurements named, as plain data."""
    start = time.perf_counter()
    found = trained(plan.recipe)
    say(f"training: {time.perf_counter() - start:.0f} s")
    data: Data = {"machine": machine()}
    for part in parts:
        start = time.perf_counter()
        data[part] = MEASUREMENTS[part](plan, found)
        say(f"{part}: {time.perf_counter() - start:.0f} s")
    return data


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, and fewer repetitions")
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
        (out / "models.json").write_text(json.dumps(data, indent=1) + "\n")
        (out / "models.md").write_text(text)


if __name__ == "__main__":
    main()

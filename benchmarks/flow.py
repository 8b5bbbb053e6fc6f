"""DEQ flow: memory and time of a training step, time of an iteration beside RAFT's, warm starts of video, solvers.

    python -m benchmarks.flow             # minutes; writes benchmarks/results/flow.*
    python -m benchmarks.flow --quick     # small images: seconds, and nothing to quote
    python -m benchmarks.flow --weights runs/x/last.ckpt  # of a deq_flow_nano, in place of those that ship

One thread. Prints tables, and writes them with a plot and all numbers (``flow.json``). Counts and bytes do not depend
on the machine; times do, and are quoted as ratios within the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .command import RESULTS, Data, arguments, machine, made_by, measured
from .flow_speed import OURS, Inference, inference
from .flow_steps import UNROLLED, Images, Training, training
from .flow_video import Video, solvers, video
from .flow_weights import NANO, SMALL, Loaded, Recipe, loaded
from .report import table

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        recipe: weights and sequences.
        trainings: steps, each of one model.
        inferences: calls, each of one pair of models.
        video: how far solves go.
        rounds: of timing.
    """

    recipe: Recipe = NANO
    trainings: Sequence[Training] = (
        Training("deq_flow_nano", Images(4, 96, 128)),
        Training("deq_flow_base", Images(1, 184, 248), depths=(6, 24)),
    )
    inferences: Sequence[Inference] = (
        Inference("deq_flow_base", "raft_large", Images(2, 192, 256)),
        Inference("deq_flow_tiny", "raft_small", Images(2, 192, 256)),
    )
    video: Video = field(default_factory=Video)
    rounds: int = 5


QUICK = Plan(
    recipe=SMALL,
    trainings=(Training("deq_flow_nano", Images(1, 32, 48), depths=(3, 9), compared=9, timed=3, losses=2),),
    inferences=(Inference("deq_flow_nano", "raft_small", Images(1, 128, 128), iterations=2),),
    video=Video(depths=(1, 4, 8), tolerances=(3e-2,), equal=(4,), tol=3e-2, most=12),
    rounds=2,
)


@dataclass(frozen=True)
class Run:
    """A plan, and the model that it is for, which is loaded when it is first needed."""

    plan: Plan

    @cached_property
    def found(self) -> Loaded:
        return loaded(self.plan.recipe)


MEASUREMENTS: dict[str, Callable[[Run], Data]] = {
    "training": lambda run: {item.model: training(item, run.plan.rounds) for item in run.plan.trainings},
    "inference": lambda run: {item.model: inference(item, run.plan.rounds) for item in run.plan.inferences},
    "video": lambda run: {"weights": run.plan.recipe.weights, **video(run.plan.video, run.found)},
    "solvers": lambda run: solvers(run.plan.video, run.found),
}

# --------------------------------------------------------------------------------------------------------------- tables


def markdown(data: Data) -> str:
    """All that ``data`` holds, as one page."""
    parts = [
        "# DEQ flow beside RAFT",
        (
            f"{made_by('flow', data['machine'])} float32. Times are of the processor; their ratios are medians over "
            "rounds in which all take turns."
        ),
        "![error against evaluations, and memory](flow.png)",
    ]
    parts += [section(data[name]) for name, section in _SECTIONS.items() if name in data]
    return "\n\n".join(parts) + "\n"


def _training(found: Data) -> str:
    return (
        "## A training step\n\n"
        "Peak of live tensor bytes above the model's own, in MiB, with the gradients of all parameters, against the "
        "steps of the solve; and time. The solves are plain iterations that make all their steps; the adjoint ones of "
        "the implicit gradient, by Anderson, make as many products. With a trajectory there is a loss on several "
        "states of the solve, equally spaced, as in the published training. Unrolled is the same cell applied so "
        "often, with a loss on each state and no gradient through the place of a look-up, which is how RAFT is "
        "trained. What both encoders take, whatever is done with their features, is in all of them.\n\n"
        + "\n\n".join(_training_table(name, item) for name, item in found.items())
    )


def _training_table(name: str, found: Data) -> str:
    rows = [
        [
            way,
            *(f"{size / MIB:.0f}" for size in sizes),
            f"{found['ratio'][way]:.2f}",
            f"{1e3 * found['seconds'][way]:.0f}",
            f"{found['time_ratio'][way]:.2f}",
        ]
        for way, sizes in found["bytes"].items()
    ]
    depths, timed = found["depths"], found["timed"]
    header = [
        f"`{name}`, {found['images']}",
        *(f"{n} steps" for n in depths),
        f"times less at {found['compared']}",
        f"ms at {timed}",
        "to unrolled",
    ]
    return (
        f"{table(header, rows)}\n\n{found['losses']} losses with a trajectory. The encoders alone, forward and "
        f"backward: {found['encoders'] / MIB:.0f} MiB."
    )


def _inference(found: Data) -> str:
    rows = [
        [
            f"`{name}`, {item['images']}" if way == OURS else "",
            way,
            f"{1e3 * numbers['iteration']:.1f}",
            f"{numbers['iteration_ratio']:.2f}",
            f"{1e3 * numbers['call']:.0f}",
            f"{numbers['call_ratio']:.2f}",
        ]
        for name, item in found.items()
        for way, numbers in item["ways"].items()
    ]
    (n,) = {item["iterations"] for item in found.values()}
    header = ["", "", "ms an iteration", "DEQ flow / this", f"ms a call of {n}", "DEQ flow / this"]
    return (
        "## Time of an iteration\n\n"
        f"Without gradients. An iteration is what a call of {2 * n} iterations takes longer than one of {n}, divided "
        f"by {n}. DEQ flow solves by plain iteration, without stopping early, and evaluates its cell once more to tell "
        "the residual; torchvision's models upsample the flow at each iteration. The update of `raft_large` has the "
        "widths of `deq_flow_base`; `raft_small` has another cell than `deq_flow_tiny`, and narrower encoders. The "
        "last line of each is the cell of the DEQ flow, with the same weights, in a loop of torchvision's look-up and "
        f"update that upsamples once: what the solver adds is the ratio to it.\n\n{table(header, rows)}"
    )


def _video(found: Data) -> str:
    height, width = found["size"]
    least, depths = found["least"], found["depths"]
    rows = [[start, *(f"{epe:.2f}" for epe in epes)] for start, epes in found["epe"].items()]
    by_tolerance = [
        [
            f"{item['tol']:g}, {item['norm']}",
            *(f"{item[start]['evaluations']:.1f}" for start in ("cold", "warm")),
            f"{item['ratio']:.2f}",
            *(f"{item[start]['epe']:.2f}" for start in ("cold", "warm")),
            *(f"{100 * item[start]['solved']:.0f} %" for start in ("cold", "warm")),
        ]
        for item in found["tolerances"]
    ]
    header = ["tolerance", "evaluations, cold", "warm", "times fewer", "EPE, cold", "warm", "solved, cold", "warm"]
    reached = found["converged"]["epe"] * (1 + found["margin"])
    fewest = (
        f"An EPE of {reached:.2f}, within {100 * found['margin']:g} % of that of converged solves from rest "
        f"({found['converged']['epe']:.2f}, at most {found['most']} steps), takes {_count(least['cold'])} evaluations "
        f"a frame cold and {_count(least['warm'])} warm"
    )
    if found["ratio"] is not None:
        fewest += (
            f": {found['ratio']:.2f} times fewer ({found['ratio_with_first']:.2f} with the first pair of each "
            "sequence, which is cold in any case)"
        )
    return (
        "## Video\n\n"
        f"Weights `{found['weights']}`, {found['sequences']} test sequences of {found['frames']} frames of {height} x "
        f"{width}, through `model.stream(warm_start=...)`. The first pair of each is solved cold until it converges; "
        "all numbers are means over the other pairs. A cold start is rest; a warm one is the flow of the pair before, "
        f"moved on by itself. An evaluation is one of the cell. EPE of no flow: {found['zero']:.2f} pixels."
        f"\n\nEPE after solves of so many evaluations:\n\n"
        f"{table(['start', *(k + 1 for k in depths)], rows)}\n\n{fewest}.\n\n"
        f"To equal tolerances, the last of which is the model's own, by `{found['solver']}`, which here looks at every "
        f"residual:\n\n{table(header, by_tolerance)}"
    )


def _count(evaluations: int | None) -> str:
    return "more" if evaluations is None else str(evaluations)


def _solvers(found: Data) -> str:
    rows = [
        [
            name,
            *(f"{item[start]['evaluations']:.1f}" for start in ("cold", "warm")),
            *(f"{100 * item[start]['solved']:.0f} %" for start in ("cold", "warm")),
            *(f"{item[start]['epe']:.2f}" for start in ("cold", "warm")),
            *(f"{epe:.2f}" for epe in item["epe"]),
        ]
        for name, item in found["ways"].items()
    ]
    header = [
        "solver",
        *("evaluations, cold", "warm"),
        *("solved, cold", "warm"),
        *("EPE, cold", "warm"),
        *(f"EPE after {n}, cold" for n in found["equal"]),
    ]
    return (
        f"## Solvers\n\nThe same sequences, to a relative residual of {found['tol']:g}, and after equal numbers of "
        f"evaluations.\n\n{table(header, rows)}"
    )


_SECTIONS: dict[str, Callable[[Data], str]] = {
    "training": _training,
    "inference": _inference,
    "video": _video,
    "solvers": _solvers,
}

# ----------------------------------------------------------------------------------------------------------------- plot


def plot(data: Data, file: Path) -> None:
    """EPE against evaluations, and memory against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "video" in data:
        _plot_video(left, data["video"])
    if "training" in data:
        name, found = next(iter(data["training"].items()))
        _plot_memory(right, name, found)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(axis.has_data())
    figure.savefig(file, dpi=90)


def _plot_video(axis: Any, found: Data) -> None:
    for (start, epes), colour in zip(found["epe"].items(), ("#2166ac", "#b2182b"), strict=True):
        axis.plot([k + 1 for k in found["depths"]], epes, "o-", color=colour, label=f"{start} start")
    axis.axhline(
        found["converged"]["epe"], color="black", linewidth=0.8, label=f"from rest, at most {found['most']} steps"
    )
    axis.set(title="EPE of a frame, pixels", xlabel="evaluations a frame", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def _plot_memory(axis: Any, name: str, found: Data) -> None:
    for way, sizes in found["bytes"].items():
        axis.plot(found["depths"], [size / MIB for size in sizes], "s--" if way == UNROLLED else "o-", label=way)
    axis.axhline(found["encoders"] / MIB, color="black", linewidth=0.8, label="the encoders alone")
    axis.set(title=f"peak of a training step of {name}, MiB", xlabel="solver steps", ylim=(0, None))
    axis.set_xticks(found["depths"])
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)


# ------------------------------------------------------------------------------------------------------------------ run


def run(plan: Plan, parts: Iterable[str] = tuple(MEASUREMENTS), say: Callable[[str], object] = print) -> Data:
    """The measurements named, as plain data."""
    this = Run(plan)
    return {
        "machine": machine(),
        **measured(parts, {name: partial(measure, this) for name, measure in MEASUREMENTS.items()}, say),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--weights")
    own, rest = parser.parse_known_args(argv)
    given = arguments(__doc__, MEASUREMENTS, rest, RESULTS)
    plan = QUICK if given.quick else Plan()
    if own.weights is not None:
        plan = replace(plan, recipe=replace(plan.recipe, weights=own.weights))
    data = run(plan, given.parts)
    given.write(markdown(data), "flow.md", data, "flow")
    if given.out is not None:
        plot(data, given.out / "flow.png")


if __name__ == "__main__":
    main()

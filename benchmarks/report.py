"""The results as Markdown tables and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .command import Data, made_by

OURS = "zoo anderson"
PEER = "torchdeq"
_COLOURS = {
    "zoo anderson": "#b2182b",
    "zoo iteration": "#fdae61",
    "zoo broyden": "#f46d43",
    "torchdeq fixed_point_iter": "#abd9e9",
    "torchdeq anderson": "#2166ac",
    "torchdeq anderson lam=1e-12": "#67a9cf",
    "torchdeq broyden": "#1b7837",
}

# --------------------------------------------------------------------------------------------------------------- tables


def markdown(data: Data) -> str:
    """All that ``data`` holds, as one page."""
    parts = [
        "# The solvers beside TorchDEQ's",
        (
            f"{made_by('solvers', data['machine'])} float64 "
            "unless said. Counts do not depend on the machine. Times are of the processor; their ratios are medians "
            "over rounds in which all take turns. `(n)` marks a count at which the tolerance was not reached."
        ),
        "![residuals, ratios and memory](solvers.png)",
    ]
    parts += [section(data[name]) for name, section in _SECTIONS.items() if name in data]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _problems(found: Data) -> str:
    rows = [
        [name, " x ".join(str(n) for n in item["shape"]), "{:.3f} to {:.3f}".format(*item["radius"])]
        for name, item in found.items()
    ]
    return f"## Problems\n\n{table(['problem', 'state', 'spectral radius of df/dz at z*'], rows)}"


def _forward(found: Data) -> str:
    tolerances = "/".join(f"{tol:g}" for tol in found["tolerances"])
    return (
        "## Forward: evaluations of f\n\n"
        f"To a relative residual of {tolerances} of the worst sample; each solver is asked for that tolerance, and "
        f"what it returns is measured.\n\n{_counts(found['counts'])}"
    )


def _backward(found: Data) -> str:
    tolerances = "/".join(f"{tol:g}" for tol in found["tolerances"])
    return (
        "## Backward: vector-Jacobian products\n\n"
        f"To |g - (I - J^T) u| <= {tolerances} |g| of the worst sample, with each sample's g scaled to unit norm, so "
        f"that TorchDEQ's absolute tolerance can mean the same.\n\n{_counts(found['counts'])}"
    )


def _counts(found: Data) -> str:
    solvers = list(next(iter(found.values())))
    rows = [[s, *("/".join(map(_number, problem[s])) for problem in found.values())] for s in solvers]
    return table(["solver", *found], rows)


def _number(count: Data) -> str:
    return str(count["number"]) if count["reached"] else f"({count['number']})"


def _scale(found: Data) -> str:
    def part(name: str) -> str:
        rows = [[s, *map(_number, counts)] for s, counts in found[name].items()]
        return table(["solver", *(f"x {scale:g}" for scale in found["scales"])], rows)

    return (
        "## The units of the state, and of the loss\n\n"
        f"Evaluations of f to {found['tol']:g} on `tanh`, with z in other units (f becomes s f(z / s)):\n\n"
        f"{part('state')}\n\nProducts to {found['tol']:g} with the loss in other units:\n\n{part('loss')}"
    )


def _overhead(found: Data) -> str:
    solvers = list(dict.fromkeys(s for problem in found.values() for s in problem["ratios"]))
    rows = [["f alone, ms", *(f"{1e3 * problem['f_seconds']:.3g}" for problem in found.values())]]
    rows += [
        [s, *(f"{problem['ratios'][s]:.2f}" if s in problem["ratios"] else "" for problem in found.values())]
        for s in solvers
    ]
    return (
        "## Overhead\n\nTime of a solve of 30 steps over that of its evaluations of f alone; nothing stops early. "
        f"1.00 is the limit.\n\n{table(['solver', *found], rows)}"
    )


def _gradient(found: Data) -> str:
    rows = []
    for name, settings in found.items():
        for i, (setting, item) in enumerate(settings.items()):
            rows.append(
                [
                    "" if i else name,
                    setting,
                    f"{item['milliseconds']:.3g}",
                    f"{item['ratio']:.2f}",
                    f"{item['error']:.1e}",
                    f"{item['tol']:.1e}, {item['adjoint_tol']:.1e}",
                    f"{item['evaluations']} + {item['products']}",
                ]
            )
    header = ["problem", "forward / adjoint", "ms", "ratio", "error", "tolerances", "evaluations + products"]
    return (
        "## One forward and backward pass, at equal error of the gradient\n\n"
        "Each pair of solvers has tolerances that are just tight enough (in powers of 2, half of the error for the "
        "forward solve and half for the adjoint) for the relative error of the parameters' gradient to be below the "
        "level. TorchDEQ runs with `ift=True`; of its pairs the fastest three are shown, the fastest "
        "without a tuned ridge (`lam`, which its adjoint takes by registering a solver only), and its Anderson pair. "
        "`simple_fixed_point_iter` never looks at a residual, and is told how many steps suffice. Ratios are to the "
        f"zoo's default.\n\n{table(header, rows)}"
    )


def _memory(found: Data) -> str:
    rows = [[s, *(f"{value:.1f}" for value in peaks)] for s, peaks in found["states"].items()]
    return (
        "## Peak memory of a forward and backward pass\n\n"
        "Live tensor bytes, in states of 8 x 4096, when both solves make so many steps (tol=0).\n\n"
        + table(["solver", *(f"{n} steps" for n in found["steps"])], rows)
    )


def _mixed(found: Data) -> str:
    rows = []
    for tol, solvers in found.items():
        for s, item in solvers.items():
            alone = item.get("per_sample")
            saved = "" if alone is None else f"{1 - alone / item['whole_batch']:.0%}"
            rows.append([tol, s, item["whole_batch"], "" if alone is None else alone, saved])
    header = ["tol", "solver", "whole batch", "each sample to its own end", "saved"]
    return (
        "## A batch of mixed difficulty: rows evaluated\n\n"
        "16 samples whose spectral radii spread from 0.2 to 0.98. TorchDEQ evaluates the whole batch until its worst "
        f"sample has converged.\n\n{table(header, rows)}"
    )


def _compaction(found: Data) -> str:
    rows = [
        [tol, s, f"{item['milliseconds']:.3g}", f"{item['ratio']:.2f}"]
        for tol, solvers in found.items()
        for s, item in solvers.items()
    ]
    return (
        "## Dropping converged rows\n\n"
        "tanh, 256 samples of which 6 % are hard; ratios of times to that of `Anderson(compact=True)`.\n\n"
        + table(["tol", "solver", "ms", "ratio"], rows)
    )


_SECTIONS: dict[str, Callable[[Data], str]] = {
    "problems": _problems,
    "forward": _forward,
    "backward": _backward,
    "scale": _scale,
    "overhead": _overhead,
    "gradient": _gradient,
    "memory": _memory,
    "mixed": _mixed,
    "compaction": _compaction,
}

# ----------------------------------------------------------------------------------------------------------------- plot


def plot(data: Data, file: Path) -> None:
    """Residuals against evaluations above; overheads, gradients and memory below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (name, solvers) in zip(axes[0], data.get("traces", {}).items(), strict=False):
        _plot_traces(axis, name, solvers)
    for axis, name, draw in zip(
        axes[1], ("overhead", "gradient", "memory"), (_plot_overhead, _plot_gradient, _plot_memory), strict=True
    ):
        if name in data:
            draw(axis, data[name])
    entries = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        if label in _COLOURS
    }
    figure.legend(
        [entries[s] for s in _COLOURS if s in entries],
        [s for s in _COLOURS if s in entries],
        loc="outside upper center",
        ncols=len(_COLOURS),
        frameon=False,
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(axis.has_data())
    figure.savefig(file, dpi=110)


def _plot_traces(axis: Any, name: str, solvers: Data) -> None:
    for solver, residuals in solvers.items():
        axis.semilogy(range(1, len(residuals) + 1), residuals, color=_COLOURS[solver], label=solver, **_line(solver))
    axis.set(title=f"{name}: worst relative residual", xlabel="evaluations of f", xlim=(0, 200), ylim=(3e-9, 2))
    axis.grid(alpha=0.3)


def _plot_overhead(axis: Any, found: Data) -> None:
    found = {name: item for name, item in found.items() if "float64" in name}
    solvers = [s for s in _COLOURS if any(s in item["ratios"] for item in found.values())]
    width = 0.85 / len(solvers)
    for i, solver in enumerate(solvers):
        heights = [item["ratios"].get(solver, 0) for item in found.values()]
        axis.bar([k + i * width for k in range(len(found))], heights, width, color=_COLOURS[solver], label=solver)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks([k + 0.4 for k in range(len(found))], [name.replace(", ", "\n") for name in found])
    axis.set(title="time of 30 steps / time of their evaluations", yscale="log")


def _plot_gradient(axis: Any, found: Data) -> None:
    """Bars of TorchDEQ's fastest pairs, and of its Anderson pair, over the zoo's default."""
    groups = {
        "fastest TorchDEQ pair, ridge tuned": ("#67a9cf", fastest_peer),
        "fastest TorchDEQ pair as shipped": ("#4393c3", fastest_shipped_peer),
        "TorchDEQ anderson / anderson": ("#2166ac", anderson_peer),
    }
    names = list(found)
    for i, (label, (colour, ratio_of)) in enumerate(groups.items()):
        ratios = [ratio_of(settings) for settings in found.values()]
        beyond = [0.0 if ratio is None else ratio - 1 for ratio in ratios]
        bars = axis.barh([k + 0.27 * i for k in range(len(names))], beyond, 0.27, left=1, color=colour, label=label)
        axis.bar_label(
            bars, ["not reached" if ratio is None else f"{ratio:.1f}" for ratio in ratios], fontsize=8, padding=2
        )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(
        [k + 0.2 for k in range(len(names))], [name.replace(", error ", "\nerror ") for name in names], fontsize=8
    )
    axis.invert_yaxis()
    axis.set(title="forward + backward: time / time of the zoo's default", xscale="log", xlim=(0.5, 400))
    axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100], [0.5, 1, 2, 5, 10, 20, 50, 100])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="upper right")


def _plot_memory(axis: Any, found: Data) -> None:
    for solver in found["states"].keys() & _COLOURS.keys():
        peaks = found["states"][solver]
        axis.plot(found["steps"], peaks, "o-", color=_COLOURS[solver], label=solver, **_line(solver))
    axis.set(title="peak memory, in states", xlabel="steps of each solve", xscale="log", yscale="log")
    axis.set_xticks(found["steps"], found["steps"], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _line(solver: str) -> Data:
    return {"linewidth": 2.2 if solver == OURS else 1.3, "zorder": 3 if solver == OURS else 2}


def fastest_peer(settings: Data) -> float | None:
    """The least ratio among TorchDEQ's pairs that look at their residuals."""
    ratios = [item["ratio"] for s, item in settings.items() if s.startswith(PEER) and "simple" not in s]
    return min(ratios, default=None)


def fastest_shipped_peer(settings: Data) -> float | None:
    """The same among the pairs that need no option which TorchDEQ does not offer for adjoints."""
    return fastest_peer({s: item for s, item in settings.items() if "lam=" not in s})


def anderson_peer(settings: Data) -> float | None:
    item = settings.get("torchdeq anderson / anderson")
    return None if item is None else float(item["ratio"])

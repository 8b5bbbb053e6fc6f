"""Pictures of solves. The one file of this package that uses matplotlib, and only when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .report import SolverReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that people with any colour vision tell apart: Okabe and Ito, "Color Universal Design" (2008).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")


def convergence_plot(
    reports: Mapping[str, SolverReport], *, tol: float | None = None, axes: Axes | None = None
) -> Figure:
    """Residual against evaluations of f, one line a solver: the median sample, in a band from the best to the worst.

    Each mark is an evaluation at which the residual was looked at. Samples that stopped stay where they are; values
    that are not finite are left out; a residual of exactly 0 is drawn at the lowest other one. No global state of
    matplotlib is touched: the figure is the caller's alone, and goes as it is to ``wandb.Image(figure)``, to
    TensorBoard's ``add_figure`` or to ``figure.savefig(path)``.

    Args:
        reports: name -> report of a solve with ``trace=True``.
        tol: where to draw the line of the tolerance, in the solvers' ``norm``.
        axes: where to draw; axes of a new figure by default.

    Returns:
        the figure that holds the axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``reports`` is no mapping of names to reports.
        ValueError: ``reports`` is empty, or one of them has no trace or no sample.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("convergence_plot draws with matplotlib; install it: pip install matplotlib") from error
    traces = {name: _trace(name, report) for name, report in _checked(reports).items()}
    legend_place: dict[str, Any] = {}
    if axes is None:
        axes = Figure(figsize=(9, 4.5), layout="constrained").add_subplot()
        legend_place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # beside the axes, where it hides nothing
        axes.set_title("Convergence of the fixed-point solve")
    positive = torch.cat([trace[trace > 0] for trace in traces.values()])  # NaN is not > 0
    lowest = float(positive.min()) if positive.numel() else 0.0
    axes.set_yscale("log" if lowest else "linear")

    for i, (name, trace) in enumerate(traces.items()):
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        (looked_at,) = (~trace.isnan()).any(dim=1).nonzero(as_tuple=True)
        shown = trace[looked_at].clamp_min(lowest)
        x = (looked_at + 1).tolist()
        best, worst = shown.nan_to_num(nan=torch.inf).amin(dim=1), shown.nan_to_num(nan=-torch.inf).amax(dim=1)
        axes.fill_between(
            x, best.tolist(), worst.tolist(), facecolor=(color, 0.12), edgecolor=(color, 0.5), linewidth=0.8
        )
        axes.plot(
            *(x, shown.nanmedian(dim=1).values.tolist()),
            label=f"{name} ({int(reports[name].converged.sum())} of {trace.shape[1]} converged)",
            color=color,
            linestyle=_DASHES[i // len(_COLORS) % len(_DASHES)],
            marker=marker,
            markersize=4,
        )
    if tol is not None:
        axes.axhline(tol, color="0.4", linestyle=(0, (4, 3)), linewidth=1, label=f"tol = {tol:g}")
    axes.set_xlabel("evaluations of f")
    axes.set_ylabel("residual, in the solver's norm")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.legend(title="line: median sample\nband: best to worst", edgecolor="none", alignment="left", **legend_place)
    figure: Figure = axes.figure.canvas.figure  # also where the axes belong to a subfigure
    return figure


def rendered(figure: Figure) -> Tensor:
    """A figure as an image, for loggers that take images only: uint8 ``(3, H, W)``. No window is opened."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    W, H = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return pixels.view(H, W, 4)[..., :3].permute(2, 0, 1).contiguous()


def _checked(reports: Mapping[str, SolverReport]) -> Mapping[str, SolverReport]:
    if not isinstance(reports, Mapping) or not all(isinstance(report, SolverReport) for report in reports.values()):
        raise TypeError(
            "convergence_plot takes a mapping of names to solver reports, like {'Anderson': report}; "
            f"given: {type(reports).__name__}"
        )
    if not reports:
        raise ValueError("convergence_plot was given no report; give it at least one, like {'Anderson': report}")
    return reports


def _trace(name: str, report: SolverReport) -> Tensor:
    """``(K, B)`` on the CPU, NaN where there is nothing to draw."""
    if report.status.numel() == 0:
        raise ValueError(f"the report {name!r} is of an empty batch: there is nothing to draw")
    if report.trace is None:
        raise ValueError(
            f"the report {name!r} has no trace; solve with trace=True: fixed_point(..., trace=True), deq(x, trace=True)"
        )
    trace = report.trace.detach().cpu().double()
    return torch.where(trace.isfinite(), trace, torch.nan)

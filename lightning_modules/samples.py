"""What the loggers show of a validation besides numbers: samples with their predictions, and how solves converged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from zoo.implicit import DEQ, SolverReport, convergence_plot
from zoo.implicit.plots import rendered

from .drawing import Colour, Tile, palette, pixels, sheet, sized
from .flow_files import colour_picture, longest
from .pictures import log_picture, log_text, real_loggers

if TYPE_CHECKING:
    from .base import EquilibriumModule

IGNORED: Colour = (150, 150, 150)


def are_shown(trainer: pl.Trainer, stage: str, batch_index: int) -> bool:
    """Whether a batch is the first one of a validation, not of the sanity check, in a run with a logger.

    It is the same in all processes.
    """
    return stage == "val" and batch_index == 0 and not trainer.sanity_checking and bool(real_loggers(trainer))


def class_names(trainer: pl.Trainer) -> Sequence[str] | None:
    """Those that the data module of the run has; None where it has none, or there is no data module."""
    return getattr(getattr(trainer, "datamodule", None), "class_names", None)


def show(trainer: pl.Trainer, name: str, make: Callable[[], Tensor | str]) -> None:
    """Give a picture or a text to the loggers; it is made in the first process only.

    A failure ends no training of days for the sake of a picture: it is a warning.

    Args:
        trainer: of the run.
        name: like ``"val/samples"``.
        make: gives the picture, uint8 ``(3, H, W)``, or the text. No process waits for another in it.
    """
    if not trainer.is_global_zero:
        return
    try:
        made = make()
        if isinstance(made, str):
            log_text(trainer, name, made)
        else:
            log_picture(trainer, name, made)
    except Exception as error:  # noqa: BLE001 - see above
        rank_zero_warn(f"{name} of step {trainer.global_step} is not shown: {type(error).__name__}: {error}")


# --- how solves converged


def traced(module: EquilibriumModule, inputs: Iterable[tuple[DEQ, tuple[Any, ...]]]) -> dict[str, SolverReport]:
    """The reports of the layers' solves of these inputs, with their traces: the first call of each layer counts.

    Where there are several layers they are under their names, else under that of the solver. All processes call it:
    some cells have them wait for each other.
    """
    first: dict[DEQ, tuple[Any, ...]] = {}
    for layer, x in inputs:
        first.setdefault(layer, x)
    reports = {}
    for name, layer in module.equilibria().items():
        if layer not in first:
            continue
        with torch.no_grad(), undisturbed([layer]):
            layer(*first[layer], trace=True)
            report = layer.report
        if report is not None and report.status.numel():
            reports[name.rstrip("/") or type(layer.solver).__name__] = report
    return reports


def convergence(module: EquilibriumModule, reports: dict[str, SolverReport]) -> Tensor:
    """Residual against evaluations, uint8 ``(3, H, W)``; the tolerance is drawn where all layers have the same."""
    tolerances = {layer.solver.tol for layer in module.equilibria().values()}
    return rendered(convergence_plot(reports, tol=tolerances.pop() if len(tolerances) == 1 else None))


@contextmanager
def undisturbed(layers: Iterable[DEQ]) -> Iterator[None]:
    """Within this context layers solve without a word where they fail; after it their reports are those of before."""
    before = [(layer, layer.report, layer.adjoint_report, layer.on_failure) for layer in layers]
    try:
        for layer, *_ in before:
            layer.on_failure = "ignore"
        yield
    finally:
        for layer, report, adjoint_report, on_failure in before:
            layer.report, layer.adjoint_report, layer.on_failure = report, adjoint_report, on_failure


# --- samples


def classified(
    images: Tensor, logits: Tensor, labels: Tensor, class_names: Sequence[str] | None, samples: int = 8
) -> Tensor:
    """The first images, each with the class that was predicted and its probability, and the true one where it differs.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        logits: ``(B, K)``.
        labels: ``(B,)``.
        class_names: numbers if not given.
        samples: at most so many.

    Returns:
        uint8 ``(3, height, width)``.
    """
    probability, predicted = logits[:samples].double().softmax(dim=1).max(dim=1)
    tiles = []
    for image, p, k, label in zip(
        images[:samples], probability.tolist(), predicted.tolist(), labels[:samples].tolist(), strict=True
    ):
        caption = [f"{100 * p:.0f} %  {_name(class_names, k)}"]
        if k != label:
            caption.append(f"true: {_name(class_names, label)}")
        tiles.append(Tile(sized(pixels(image), 136, 256, smooth=True), tuple(caption), right=k == label))
    rows = [tiles[i : i + 4] for i in range(0, len(tiles), 4)]
    return sheet(rows, "Probability and predicted class; where it is wrong, the true class below")


def segmented(
    images: Tensor,
    predicted: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_names: Sequence[str] | None,
    samples: int = 4,
) -> Tensor:
    """The first images, their labels and what was predicted, side by side; pixels that do not count are grey.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        predicted: classes ``(B, H, W)``.
        labels: likewise, or ``ignore_index``.
        ignore_index: the label of pixels that do not count.
        class_names: numbers if not given.
        samples: at most so many.

    Returns:
        uint8 ``(3, height, width)``.
    """
    predicted, labels = predicted[:samples].detach().cpu(), labels[:samples].cpu()
    counts = labels != ignore_index
    occurring = torch.cat([labels[counts], predicted.flatten()]).unique().tolist()
    colours = palette(max(occurring, default=0) + 1)
    table = torch.tensor([*colours, IGNORED], dtype=torch.uint8)

    def coloured(classes: Tensor) -> Tensor:
        return sized(table[classes].permute(2, 0, 1), 160, 400, smooth=False)

    rows = []
    for image, found, true, counted in zip(images[:samples], predicted, labels, counts, strict=True):
        right = f"{100 * float((found == true)[counted].double().mean()):.1f} % right" if counted.any() else "no labels"
        known = true.where(counted, len(colours))
        rows.append(
            [
                Tile(sized(pixels(image), 160, 400, smooth=True)),
                Tile(coloured(known)),
                Tile(coloured(found), (right,)),
            ]
        )
    legend = [(colours[k], _name(class_names, k)) for k in occurring]
    if not counts.all():
        legend.append((IGNORED, "not labelled"))
    return sheet(rows, "", columns=("image", "labels", "prediction"), legend=legend)


def moved(images: Tensor, labels: Tensor, found: Tensor, samples: int = 3) -> Tensor:
    """The first images, their flow as far as it is known, and the flow that was found, side by side.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: flow ``(B, 2, H, W)``, in pixels; 0, and so white, where it is not known.
        found: likewise.
        samples: at most so many.

    Returns:
        uint8 ``(3, height, width)``. Both flows of a sample are on one scale, whose end is the longest of the labels,
        or of what was found where these do not move.
    """
    rows = []
    for image, true, flow in zip(images[:samples], labels[:samples], found[:samples], strict=True):
        scale = longest(true) or longest(flow)
        first = Tile(sized(pixels(image), 160, 400, smooth=True))
        rows.append([first, *(_flow_tile(each, scale) for each in (true, flow))])
    return sheet(rows, "", columns=("first image", "flow, labels", "flow, prediction"))


def _flow_tile(flow: Tensor, scale: Tensor) -> Tile:
    return Tile(sized(colour_picture(flow, scale), 160, 400, smooth=True), (f"up to {float(longest(flow)):.1f} px",))


def continued(read: Iterable[str], in_data: Iterable[str], by_model: Iterable[str]) -> str:
    """Texts, how the data go on, and how the model does, one sample below another."""
    parts = []
    for i, (before, true, found) in enumerate(zip(read, in_data, by_model, strict=True), start=1):
        parts += [
            f"=== sample {i}: what was read\n{_printable(before)}",
            f"--- how it goes on in the data\n{_printable(true)}",
            f"--- how the model goes on\n{_printable(found)}",
        ]
    return "\n\n".join(parts)


def _name(class_names: Sequence[str] | None, k: int) -> str:
    return class_names[k] if class_names is not None and k < len(class_names) else f"class {k}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)

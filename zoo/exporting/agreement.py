"""Whether a graph does what its model does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zoo.implicit.exported import GraphReport

from .errors import ExportError
from .tasks import Task

_NEAR = 10  # times the tolerance: so near, rounding may decide whether a sample has converged

Runner = Callable[[tuple[Tensor, ...]], dict[str, Tensor]]
"""A graph that was read from its file."""


@dataclass(frozen=True)
class Agreement:
    """How well a graph agrees with its model on one batch.

    Rounding differs between them, so a sample whose residual is about ``tol`` may take a step more in one of them; and
    what has not converged may be anywhere. So values are compared where both made the same number of steps and
    converged, and everywhere if the cell is unrolled.

    Attributes:
        difference: the largest difference of an output, divided by that output's largest value where this is above 1;
            NaN if nothing was compared.
        compared: samples whose values were compared, of ``batch``.
        steps: of each sample in the graph; empty for a model without an equilibrium.
        model_steps: likewise in the model.
    """

    batch: int
    difference: float
    compared: int
    steps: tuple[int, ...]
    model_steps: tuple[int, ...]


def agreement(task: Task, run: Runner, inputs: tuple[Tensor, ...], tolerance: float) -> Agreement:
    """Compare on one batch.

    Raises:
        ExportError: the difference is above ``tolerance``; what one of them solved the other did not, by far; or no
            sample could be compared though the model converged.
    """
    with torch.no_grad():
        wanted = {name: x.cpu() for name, x in task(*inputs).items()}
    found = run(inputs)
    batch = len(inputs[0])
    same = torch.ones(batch, dtype=torch.bool)
    steps, model_steps = [], []
    if task.solver is not None:
        steps, model_steps = found["steps"].tolist(), wanted["steps"].tolist()
        solved = wanted["converged"] & found["converged"]
        near = torch.maximum(wanted["residual"], found["residual"]) <= _NEAR * task.solver.tol
        if (differ := ~near & (wanted["converged"] != found["converged"])).any():
            first = int(differ.int().argmax())
            told = [f"{x['converged'][first]} with a residual of {x['residual'][first]:.1e}" for x in (found, wanted)]
            raise ExportError(
                f"the graph does not solve as the model does: whether sample {first} has converged is {told[0]}, and "
                f"in the model {told[1]}. Nothing was written"
            )
        if not task.is_unrolled:
            same = solved & (wanted["steps"] == found["steps"])
        if solved.any() and not same.any():
            raise ExportError(
                f"the graph does not solve as the model does: it made {steps} steps, and the model {model_steps}. "
                "Nothing was written"
            )
    differences = {
        name: float((found[name] - x)[same].abs().amax() / x[same].abs().amax().clamp_min(1))
        if same.any()
        else math.nan
        for name, x in wanted.items()
        if name not in GraphReport._fields
    }
    worst = max(differences, key=lambda name: differences[name])
    if same.any() and not differences[worst] <= tolerance:
        raise ExportError(
            f"the graph's {worst} differs from the model's by {differences[worst]:.1e}, more than {tolerance:.1e}. "
            "Nothing was written. A long solve magnifies rounding: if the model differs as much from itself in "
            "float64, give a larger tolerance"
        )
    return Agreement(batch, differences[worst], int(same.sum()), tuple(steps), tuple(model_steps))


def onnx_runner(path: Path, output_names: list[str]) -> Runner:
    """An ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are of what its own optimiser removes
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        named = {x.name: value.cpu().numpy() for x, value in zip(session.get_inputs(), inputs, strict=True)}
        values = (torch.from_numpy(value) for value in session.run(output_names, named))
        return dict(zip(output_names, values, strict=True))

    return run


def program_runner(path: Path, output_names: list[str]) -> Runner:
    """A program of ``torch.export``, read again."""
    program = torch.export.load(path).module()

    def run(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = program(*inputs)
        return {name: outputs[name].cpu() for name in output_names}

    return run

"""Whole models as one graph, for ONNX or ``torch.export``, whose solve still ends when all samples have converged.

The graph runs without this zoo, and without torch where it is ONNX. It solves as the model does: sample by sample, with
the model's own solver, tolerance and number of steps; and it tells how that went.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .agreement import Agreement, Runner, agreement, onnx_runner, program_runner
from .errors import ExportError
from .examples import another, example_inputs
from .tasks import Task

__all__ = ["Agreement", "ExportError", "Exported", "check_target", "example_inputs", "export"]

log = logging.getLogger("zoo")

ONNX, PROGRAM = ".onnx", ".pt2"
BATCH = "batch"
_OPSET = 18  # in which torch writes; its way to later ones leaves GridSample as it was, and onnxruntime refuses that
_INLINE = 1 << 30  # bytes of weights; one ONNX file holds less than 2 GiB


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        inputs: their names and shapes, ``"batch"`` for the dimension that is free.
        outputs: likewise; the report of the solve is among them.
        checks: on the example, and on a random batch of another size; empty with ``check=False``.
    """

    path: Path
    inputs: dict[str, tuple[str | int, ...]]
    outputs: dict[str, tuple[str | int, ...]]
    checks: tuple[Agreement, ...]


def export(
    model: nn.Module, path: str | os.PathLike[str], *inputs: Any, check: bool = True, tolerance: float = 1e-4
) -> Exported:
    """Write a model, in eval mode, as a graph: an ONNX file, or a program of ``torch.export``.

    The loop of the solve is one operator of the graph, which ends when all samples have converged, or failed. The graph
    has the model's outputs (a language model's are log p of all tokens, ``(B, L, V)``, and its new memory where one is
    among the inputs), and ``steps``, ``residual`` and ``converged``, each ``(B,)``, as in
    :class:`~zoo.implicit.SolverReport`. It has no gradients. Weights that are computed from others are in it as they
    are now.

    Args:
        model: of the zoo, or your own with at most one :class:`~zoo.implicit.DEQ` in it; it is not changed. Solvers are
            ``FixedPointIteration``, ``Anderson`` and ``Broyden``; ``compact`` means nothing in a graph.
        path: ends in ``.onnx`` or ``.pt2``, in a folder that exists; a file that is there is replaced.
        inputs: what the model is called with, an example; :func:`example_inputs` makes some, and does so where none are
            given. A run may have another number of samples; all other sizes are those of the example.
        check: run the graph, with onnxruntime or as the reloaded program, on the example and on a random batch of
            another size, and compare with the model. Nothing is written where they differ.
        tolerance: by how much they may differ; see :class:`Agreement`.

    Raises:
        ExportError: another suffix; a package is missing; a solver or a model that cannot be a graph; or the graph does
            not do what the model does.
        InputError: the model refuses the inputs, or they are needed and were not given.

    Example:
        >>> model = zoo.load_pretrained("mdeq_nano.digits")
        >>> zoo.export(model, "digits.onnx", torch.rand(1, 1, 8, 8))
    """
    path = Path(path).expanduser()
    check_target(path, check=check)
    task = Task(model, inputs or example_inputs(model))
    example = task.example
    with torch.no_grad():
        outputs = task(*example)  # the model itself refuses what does not fit it
        program = _traced(task)
    checks: list[Agreement] = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder, path.name)
        if path.suffix == ONNX:
            _write_onnx(program, written, [*task.input_names], [*outputs])
        else:
            torch.export.save(program, written)
        if check:
            run: Runner = (onnx_runner if path.suffix == ONNX else program_runner)(written, [*outputs])
            checks = [agreement(task, run, batch, tolerance) for batch in (example, another(example))]
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    if checks and not any(found.compared for found in checks):
        log.warning("%s was not compared with the model: no sample converged in as many steps in both", path)
    return Exported(
        path,
        {name: (BATCH, *x.shape[1:]) for name, x in zip(task.input_names, example, strict=True)},
        {name: (BATCH, *x.shape[1:]) for name, x in outputs.items()},
        tuple(checks),
    )


def check_target(path: Path, *, check: bool = True) -> None:
    """Raise ExportError unless ``path`` has a known suffix, can be a file, and the packages that it needs are there."""
    if path.suffix not in (ONNX, PROGRAM):
        raise ExportError(f"export writes {ONNX} and {PROGRAM} files; given: {path.name!r}")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent}; make it, or choose another for {path.name}")
    if path.is_dir():
        raise ExportError(f"{path} is there already; it is a folder")
    needed = ["onnx", "onnxscript"] + ["onnxruntime"] * check
    missing = [name for name in needed if path.suffix == ONNX and importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{ONNX} files need {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install -r requirements-export.txt. A {PROGRAM} file needs nothing but torch"
        )


def _traced(task: Task) -> ExportedProgram:
    """The graph, for any number of samples."""
    graph = task.as_graph()
    batch = torch.export.Dim(BATCH)
    rows = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in task.example)  # one row would be taken for a constant
    return torch.export.export(graph, rows, dynamic_shapes=(tuple({0: batch} for _ in rows),), strict=False)


def _write_onnx(program: ExportedProgram, path: Path, input_names: list[str], output_names: list[str]) -> None:
    from onnxscript.optimizer import remove_unused_nodes

    size = sum(x.numel() * x.element_size() for x in program.state_dict.values() if isinstance(x, Tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own ways of writing
        written = torch.onnx.export(
            program,
            input_names=input_names,
            output_names=output_names,
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert written is not None  # noqa: S101 - for the type checker
    remove_unused_nodes(written.model)  # also weights, of which onnxruntime would warn
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose source each operator stood, most of the file
    written.save(path, external_data=size > _INLINE)

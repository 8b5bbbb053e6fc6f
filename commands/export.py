"""``cli.py export NAME OUT.onnx``: a model as a graph for ONNX or ``torch.export``, whose solve still ends early."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .values import expanded, parse_value

if TYPE_CHECKING:
    from torch import nn

    from zoo.exporting import Agreement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument(
        "name", metavar="NAME", help="what zoo.load_pretrained takes: a name of cli.py list, a file, a .ckpt of a run"
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        type=expanded,
        help="the file to write, .onnx or .pt2 (torch.export), in a folder that exists",
    )
    parser.add_argument(
        "--size", metavar="HxW", help="height and width of images, like 64x96; the graph takes no other"
    )
    parser.add_argument("--length", metavar="L", type=int, help="positions of a text; the graph takes no other number")
    parser.add_argument(
        "--batch",
        metavar="N",
        type=int,
        default=2,
        help="samples of the example, 2 by default; the graph takes any number",
    )
    parser.add_argument(
        "--solver", metavar="YAML", help="another solver: Broyden, or {class_path: Anderson, init_args: {memory: 5}}"
    )
    parser.add_argument("--tol", metavar="X", type=float, help="another tolerance of the solver")
    parser.add_argument("--max_steps", metavar="K", type=int, help="another limit of the solver's steps")
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=float,
        default=1e-4,
        help="by how much graph and model may differ; 1e-4 by default",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")


def run(args: argparse.Namespace) -> None:
    """Export, check, and show what was written.

    Raises:
        ValueError: an argument does not fit, a package is missing, or the graph does not do what the model does.
        WeightsError: NAME cannot be read; see :func:`zoo.load_pretrained`.
    """
    import zoo
    from zoo.exporting import check_target, example_inputs, export

    out = Path(args.out)
    check_target(out)
    if out.exists() and not args.force:
        raise ValueError(f"{out} is there already; --force replaces it")
    if args.batch < 1:
        raise ValueError(f"--batch takes an integer >= 1; given: {args.batch}")
    size = None if args.size is None else _size(args.size)
    overrides = {} if args.solver is None else {"solver": parse_value(args.solver)}
    model = zoo.load_pretrained(args.name, **overrides)
    _change_solver(model, **{key: getattr(args, key) for key in ("tol", "max_steps") if getattr(args, key) is not None})
    exported = export(model, out, *example_inputs(model, size, args.length, args.batch), tolerance=args.tolerance)

    print(f"file:     {out}, {out.stat().st_size:,} bytes")
    for what, shapes in (("inputs", exported.inputs), ("outputs", exported.outputs)):
        print(f"{what}:".ljust(10) + ", ".join(f"{name} ({', '.join(map(str, x))})" for name, x in shapes.items()))
    for what, found in zip(("example", "another"), exported.checks, strict=True):
        print(f"{what}:".ljust(10) + _in_words(found))


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or min(map(int, found.groups())) < 1:
        raise ValueError(f"--size takes a height and a width, like 64x96; given: {text!r}")
    return int(found[1]), int(found[2])


def _change_solver(model: nn.Module, **changes: Any) -> None:
    from zoo.implicit import DEQ

    for layer in model.modules():
        if isinstance(layer, DEQ):
            layer.solver = dataclasses.replace(layer.solver, **changes)


def _in_words(found: Agreement) -> str:
    """One line of how the graph and the model agree."""
    values = (
        f"largest difference {found.difference:.1e} in {found.compared} of {found.batch} samples"
        if found.compared
        else "NO VALUES COMPARED"
    )
    if not found.steps:
        return values
    steps, model_steps = (" ".join(map(str, x)) for x in (found.steps, found.model_steps))
    others = "" if found.compared == found.batch else "; the others have not converged, or differ in a step"
    return f"steps {steps}, the model's {model_steps}; {values}{others}"

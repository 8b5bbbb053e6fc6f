"""``cli.py convert ORIGINAL OUT.safetensors``: a checkpoint of others, or of a run, as a weights file of the zoo."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .values import expanded, parse_overrides

if TYPE_CHECKING:
    from torch import nn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument(
        "original",
        metavar="ORIGINAL",
        help="a file that the original authors published, the name of its record (cli.py list --source original), "
        "or whatever else zoo.load_pretrained takes, like a .ckpt of a run",
    )
    parser.add_argument(
        "out", metavar="OUT.safetensors", type=expanded, help="the file to write, in a folder that exists"
    )
    parser.add_argument(
        "--override",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="arguments of the model, in YAML: stem_stride=2, norm=pre, solver=Newton",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")


def run(args: argparse.Namespace) -> None:
    """Convert, and show what was written.

    Raises:
        ValueError: an override does not fit, or OUT cannot be written there.
        WeightsError: ORIGINAL cannot be read; see :func:`zoo.load_original`.
    """
    import zoo
    from zoo.weight_files import sha256_of

    out = Path(args.out)
    _check_target(out, force=args.force)
    overrides = parse_overrides(args.override)
    try:
        model = _loaded(args.original, overrides)
    except TypeError as error:  # an override of another type than the model's argument
        raise ValueError(str(error)) from error

    unfinished = out.with_name(f".{out.stem}.{os.getpid()}.safetensors")
    try:
        zoo.save_weights(model, unfinished)
        _check_same(model, unfinished)
        digest, size = sha256_of(unfinished.read_bytes()), unfinished.stat().st_size
        unfinished.replace(out)
    except OSError as error:  # which names the unfinished file, of which the user knows nothing
        raise ValueError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    spec = zoo.spec_of(model)
    print(f"model:      {spec.model}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    print(f"arguments:  {json.dumps(spec.arguments)}")
    print(f"file:       {out}, {size:,} bytes, read back and equal bit by bit")
    print(f"sha256:     {digest}")
    print(f"to load it: zoo.load_pretrained({str(out)!r})")


def _loaded(source: str, overrides: dict[str, Any]) -> nn.Module:
    """The model of weights of the zoo, else of a file of others; warnings are lines without Python's locations."""
    import zoo
    from zoo.locating import find
    from zoo.weights import ForeignWeightsError

    with warnings.catch_warnings():
        warnings.showwarning = _tell
        try:
            return zoo.load_pretrained(source, **overrides)
        except ForeignWeightsError:
            return zoo.load_original(find(source, None, None, None).path, **overrides)


def _tell(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _check_target(out: Path, *, force: bool) -> None:
    """Raise ValueError unless a file can be written there and nothing is lost by it."""
    if out.suffix != ".safetensors":
        raise ValueError(f"OUT ends with .safetensors, the one format that is written; given: {out}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent}; make it, or choose another for {out.name}")
    if out.is_dir() or (out.exists() and not force):
        raise ValueError(f"{out} is there already; " + ("it is a folder" if out.is_dir() else "--force replaces it"))


def _check_same(model: nn.Module, path: Path) -> None:
    """Raise WeightsError unless the file holds the model: its arguments, and its tensors bit by bit."""
    import torch

    import zoo
    from zoo.weight_files import read_weights

    made, (read, tensors) = zoo.spec_of(model), read_weights(path)
    state = model.state_dict()
    same = (
        read is not None
        and read.model == made.model
        and read.arguments == json.loads(json.dumps(made.arguments))  # where there are lists, and no tuples
        and tensors.keys() == state.keys()
        and all(
            (x := state[key].cpu().contiguous()).dtype == y.dtype
            and x.shape == y.shape
            and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
            for key, y in tensors.items()
        )
    )
    if not same:
        raise zoo.WeightsError(f"{path.parent} gave back other bytes than were written; nothing was kept: try again")

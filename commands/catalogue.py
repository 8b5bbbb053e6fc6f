"""``cli.py list [PATTERN]``: which pretrained weights there are, and which models."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .values import unmatched

NARROW = 140  # columns of a terminal below which a table would fold every cell
NAMES = {"name", "parameters", "weights"}  # columns that are never folded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument(
        "pattern", nargs="?", default="*", help="shell wildcards, like 'mdeq*'; in quotes. Default: all"
    )
    parser.add_argument("--models", action="store_true", help="the models instead, with and without weights")
    parser.add_argument("--source", choices=("shipped", "original"), help="only weights that ship, or the originals'")
    parser.add_argument("--json", action="store_true", help="the records of the weights, or the models, as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ValueError: nothing matches; the message names what is near.
    """
    if args.models and args.source:
        raise ValueError("--source is about weights; leave it out with --models")
    (_list_models if args.models else _list_weights)(args)


def _list_weights(args: argparse.Namespace) -> None:
    import zoo
    from zoo.cards import main_figures

    records = sorted(
        zoo.list_weights(args.pattern, source=args.source), key=lambda record: (record.source != "shipped", record.name)
    )
    recorded_only = [f"--{key}" for key in ("json", "source") if getattr(args, key)]
    ported = [] if records and recorded_only else fnmatch.filter(_torchvision(), args.pattern)
    if ported and recorded_only:
        raise ValueError(
            f"the weights that match {args.pattern!r} are torchvision's, without a record: leave out "
            f"{' and '.join(recorded_only)}"
        )
    if not (records or ported):
        raise unmatched(args.pattern, args.source)
    if args.json:
        print(json.dumps([dataclasses.asdict(record) for record in records], indent=2))
        return
    _show(
        {
            "name": record.name,
            "parameters": f"{record.num_parameters:,}",
            "trained on": record.trained_on,
            "figures": main_figures(record),
            "source": record.source,
            "licence": record.licence,
        }
        for record in records
    )
    _show({"name": name, "trained on": "optical flow, as RAFT: the start of a DEQ-Flow"} for name in ported)
    first = [*(record.name for record in records), *ported][0]
    print(f"{len(records) + len(ported)} weights. To load one: zoo.load_pretrained({first!r})")


def _torchvision() -> list[str]:
    """The names by which ``zoo.load_pretrained`` takes torchvision's weights of RAFT."""
    from torchvision.models.optical_flow import Raft_Large_Weights

    return [f"torchvision:Raft_Large_Weights.{key}" for key in Raft_Large_Weights.__members__]


def _list_models(args: argparse.Namespace) -> None:
    import torch

    import zoo
    from zoo.implicit.choices import nearest

    names = zoo.list_models(args.pattern)
    if not names:
        known, listing = zoo.list_models(), "zoo.list_models(), or cli.py list --models,"
        raise ValueError(f"no models match {args.pattern!r}.{nearest(args.pattern, known, listing)}")
    models: list[dict[str, Any]] = []
    for name in names:
        with torch.device("meta"):  # to count parameters, without memory for them
            model = zoo.create_model(name)
        count = sum(parameter.numel() for parameter in model.parameters())
        weights = [record.name for record in zoo.list_weights(f"{name}.*")]
        models.append({"name": name, "class": type(model).__name__, "num_parameters": count, "weights": weights})
    if args.json:
        print(json.dumps(models, indent=2))
        return
    _show(
        {
            "name": model["name"],
            "class": model["class"],
            "parameters": f"{model['num_parameters']:,}",
            "weights": model["weights"],
        }
        for model in models
    )
    print(f"{len(models)} models. To make one: zoo.create_model({models[0]['name']!r})")


def _show(rows: Iterable[Mapping[str, str | list[str]]]) -> None:
    """Print rows of one kind, and no name folded.

    That is a table; in a pipe, one line a row, however long; in a narrow terminal, a line a value.
    """
    rows = list(rows)
    if not rows:
        return
    terminal = Console()
    if terminal.is_terminal and terminal.width < NARROW:
        for row in rows:
            name, *others = ((key, _joined(value, ", ")) for key, value in row.items())
            print("\n".join([name[1], *(f"  {key}: {value}" for key, value in others if value), ""]))
        return
    console = terminal if terminal.is_terminal else Console(width=10_000)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for key in rows[0]:
        justify: Literal["right", "left"] = "right" if key == "parameters" else "left"
        table.add_column(key, justify=justify, no_wrap=key in NAMES, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_joined(value, "\n" if terminal.is_terminal else ", ")) for value in row.values()))
    console.print(table)
    print()


def _joined(value: str | list[str], by: str) -> str:
    return value if isinstance(value, str) else by.join(value)

"""``cli.py evaluate PATTERN``: a table over weights, of what is measured beside what is recorded and published.

python cli.py evaluate "*"

Each weight is tested on the task and the data that its record names, one after the other, on one device. Lines appear
as they are done, and files with all lines so far are written after each.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from zoo import WeightsRecord

    from .measuring import Measured

ABSOLUTE, RELATIVE = 1e-4, 1e-3
"""A metric is reproduced if it differs from the recorded one by no more than the larger of these two."""

REPRODUCED = "reproduced"
"""All recorded metrics of the parts that were read came out again."""
NOT_REPRODUCED = "not reproduced"
MEASURED = "measured"
"""There is nothing recorded to compare with, or only a part of the data was read."""
NOT_HERE = "not here"
"""The file of the weights, or the data, have to be fetched first."""
FAILED = "failed"

COLUMNS = {
    "status": "status",
    "metric": "metric",
    "value": "measured",
    "recorded": "recorded",
    "difference": "difference",
    "published": "published",
    "published_difference": "difference",
    "parameters": "parameters",
    "evaluations": "evaluations",
    "residual": "residual",
    "converged": "converged",
    "spectral_radius": "radius",
    "milliseconds": "ms/sample",
    "megabytes": "MB/sample",
}
"""Columns of the Markdown table after the weights' name, and their titles. CSV has ``seconds`` and ``message`` too."""

LEGEND = f"""\
A metric is reproduced if it is within {ABSOLUTE:g} or {RELATIVE:.1%} of the recorded one, whichever is more. The columns
from evaluations on are of the last part that was read: evaluations of the cell a solve (mean over solves), residual
(mean over samples), fraction of samples that converged, spectral radius of df/dz at z* (mean over some samples of the
first batch), time of a test step (median over batches) and peak of the memory that it takes, both a sample. A sample is
a row of a solve: an image, a pair of frames, a segment of a text. The first batch warms up, the second is looked at for
memory (on a CPU the bytes of live tensors, on a GPU those of its allocator), the rest are timed."""


@dataclass(frozen=True)
class Metric:
    """One metric of one weight."""

    name: str
    value: float | None
    recorded: float | None
    published: float | None

    @property
    def difference(self) -> float | None:
        """From the recorded value."""
        return _minus(self.value, self.recorded)

    @property
    def published_difference(self) -> float | None:
        """From what the authors report."""
        return _minus(self.value, self.published)

    @property
    def is_reproduced(self) -> bool:
        """Whether it is as recorded; True where nothing is recorded."""
        if self.recorded is None:
            return True
        return self.value is not None and abs(self.value - self.recorded) <= max(
            ABSOLUTE, RELATIVE * abs(self.recorded)
        )


@dataclass(frozen=True)
class Row:
    """What came out of one weight."""

    weights: str
    status: str
    message: str = ""
    parameters: int | None = None
    metrics: list[Metric] = field(default_factory=list)
    evaluations: float | None = None
    residual: float | None = None
    converged: float | None = None
    spectral_radius: float | None = None
    milliseconds: float | None = None
    megabytes: float | None = None
    seconds: float | None = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """One a metric; one if there is none."""
        own = {key: value for key, value in vars(self).items() if key != "metrics"}
        nothing = Metric("", None, None, None)
        for metric in self.metrics or [nothing]:
            yield {
                **own,
                "metric": metric.name,
                "value": metric.value,
                "recorded": metric.recorded,
                "difference": metric.difference,
                "published": metric.published,
                "published_difference": metric.published_difference,
            }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        help="names of weights with shell wildcards, like 'mdeq*'; or one source that load_pretrained takes: a file, a "
        "folder, a Lightning checkpoint, hf:..., https:...",
    )
    parser.add_argument(
        "--as",
        dest="like",
        metavar="NAME",
        help="evaluate a source that is no record's as the weights of this name are evaluated",
    )
    parser.add_argument("--split", choices=("val", "test", "both"), default="both", help="parts of the data to read")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="one of them is used (default: auto)"
    )
    parser.add_argument("--batch_size", type=_count, help="in place of the one that is recorded; texts are cut by it")
    parser.add_argument(
        "--limit", type=_count, metavar="N", help="at most N batches of each part; nothing is then compared"
    )
    parser.add_argument("--data_root", metavar="FOLDER", help="where the data are, in place of the recorded root")
    parser.add_argument(
        "--out",
        metavar="NAME",
        help="write NAME.csv, NAME.json and NAME.md, in place of what is there (default: runs/evaluation-<time>)",
    )
    parser.add_argument(
        "--format", choices=tuple(_PRINTERS), default="markdown", help="of what is printed (default: markdown)"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate, print and write.

    Raises:
        ValueError: the pattern matches nothing, or ``--as`` names nothing.
        OSError: the files cannot be written.
        SystemExit: 1 if a recorded metric is not reproduced, a weight failed, or none could be measured.
    """
    from zoo.records import find_record, list_weights

    like = None if args.like is None else find_record(args.like)
    records = [None] if (found := list_weights(args.pattern)) == [] else found
    if records == [None]:
        _require_source(args.pattern)
    out = args.out or time.strftime("runs/evaluation-%Y%m%d-%H%M%S")
    files = Files(Path(out.removesuffix(".md").removesuffix(".csv").removesuffix(".json")), vars(args))
    files.write([])  # so that a folder that cannot be written to is found before anything is measured
    names = [args.pattern if record is None else record.name for record in records]
    printer = _PRINTERS[args.format](max(map(len, names)))
    rows = []
    for name, record in zip(names, records, strict=True):
        row = evaluate(name, record, like, args)
        rows.append(row)
        files.write(rows)
        printer.show(row)
    printer.end(rows, files.paths)
    if not any(row.status in {REPRODUCED, MEASURED} for row in rows) or any(_is_bad(row) for row in rows):
        raise SystemExit(1)


def evaluate(name: str, record: WeightsRecord | None, like: WeightsRecord | None, args: argparse.Namespace) -> Row:
    """One row; whatever goes wrong with these weights stands in it."""
    from zoo import WeightsError, load_pretrained
    from zoo.records import ORIGINAL

    absent = record is not None and record.source == ORIGINAL and not record.path.is_file()
    parameters = None if record is None else record.num_parameters
    try:
        model = load_pretrained(name)
        parameters = sum(p.numel() for p in model.parameters())
        evaluation = _evaluation(name, record, like, model)
        from .measuring import measure

        found = measure(
            model,
            evaluation,
            split=args.split,
            device=args.device,
            batch_size=args.batch_size,
            limit=args.limit,
            data_root=args.data_root,
        )
    except FileNotFoundError as error:  # with which data say how to get them
        return Row(name, NOT_HERE, str(error), parameters)
    except WeightsError as error:
        return Row(name, NOT_HERE if absent else FAILED, str(error), parameters)
    except Exception as error:  # noqa: BLE001 - the others are still to come, and this one's row says what it was
        return Row(name, FAILED, f"{type(error).__name__}: {error}", parameters)
    return _row(name, record, parameters, found, args.split, args.limit)


def _row(
    name: str, record: WeightsRecord | None, parameters: int, found: Measured, split: str, limit: int | None
) -> Row:
    from .measuring import METRICS, PARTS

    def known(values: Mapping[str, float]) -> dict[str, float]:
        return {key: value for key, value in values.items() if key.partition("_")[0] in PARTS[split]}

    recorded, published = (known(record.metrics), known(record.published)) if record else ({}, {})
    usual = [f"{part}_{metric}" for part in PARTS[split] for metric in METRICS]
    names = dict.fromkeys([*recorded, *published, *(() if recorded else (key for key in usual if key in found.metrics))])
    metrics = [Metric(key, found.metrics.get(key), recorded.get(key), published.get(key)) for key in names]
    own = {key: getattr(found, key) for key in vars(found) if key != "metrics"}
    if limit is not None or not recorded:
        return Row(name, MEASURED, "" if limit is None else f"{limit} batches only", parameters, metrics, **own)
    bad = [metric.name for metric in metrics if not metric.is_reproduced]
    if bad and record:
        message = f"{', '.join(bad)} not as recorded; trained on: {record.trained_on}"
        return Row(name, NOT_REPRODUCED, message, parameters, metrics, **own)
    return Row(name, REPRODUCED, "", parameters, metrics, **own)


def _evaluation(
    name: str, record: WeightsRecord | None, like: WeightsRecord | None, model: nn.Module
) -> Mapping[str, Any]:
    """The task and the data: those of the record; of ``--as``; of the checkpoint; of the only record of its model.

    Raises:
        ValueError: there is none, or there are several.
    """
    from lightning_modules.checkpoints import read_checkpoint
    from zoo import spec_of
    from zoo.records import list_weights

    from .measuring import evaluation_of

    for chosen in (like, record):
        if chosen is not None and chosen.evaluation is not None:
            return chosen.evaluation
        if chosen is not None:
            raise ValueError(
                f"the record of {chosen.name} does not say how it is evaluated; name weights that are evaluated on the "
                "same task and data (--as NAME)"
            )
    path = Path(name.removeprefix("file:"), "checkpoints", "best.ckpt") if Path(name).is_dir() else Path(name)
    if path.suffix == ".ckpt" and path.is_file():
        return evaluation_of(read_checkpoint(str(path))["made_by"])
    arch = spec_of(model).model
    same = [each for each in list_weights() if each.model == arch and each.evaluation is not None]
    if len(same) != 1 or same[0].evaluation is None:
        known = f"several weights of {arch} are: {', '.join(each.name for each in same)}" if same else "no weights are"
        raise ValueError(
            f"it is not known how {name} is evaluated, since {known}; name weights that are evaluated on the same task "
            "and data (--as NAME)"
        )
    return same[0].evaluation


def _require_source(pattern: str) -> None:
    """Raise ValueError, which names what is near, for a pattern that matches no name and can be nothing else."""
    from zoo.implicit.choices import nearest
    from zoo.records import list_weights

    if Path(pattern).exists() or any(sign in pattern for sign in (":", "/", os.sep)) or pattern.endswith(".ckpt"):
        return
    names = [record.name for record in list_weights()]
    raise ValueError(f"no weights match {pattern!r}.{nearest(pattern.replace('*', ''), names)}")


def _is_bad(row: Row) -> bool:
    return row.status in {NOT_REPRODUCED, FAILED}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number, at least 1; given: {text}")
    return value


# --------------------------------------------------------------------------------------------------------------- output


class Files:
    """NAME.csv, NAME.json and NAME.md, with all rows so far.

    Each is written beside its place and then moved there: an interruption leaves the one before.
    """

    def __init__(self, name: Path, asked: Mapping[str, Any]) -> None:
        self.paths = [name.with_name(f"{name.name}.{ending}") for ending in ("csv", "json", "md")]
        self.made = {"asked": dict(asked), **_machine()}

    def write(self, rows: Sequence[Row]) -> None:
        """Write all three."""
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        asked = ", ".join(f"{key}={value}" for key, value in self.made["asked"].items() if value is not None)
        machine = ", ".join(f"{key} {value}" for key, value in self.made.items() if key != "asked")
        width = max((len(row.weights) for row in rows), default=0)
        contents = (
            "".join([_csv_line(CSV), *(_csv_lines(row) for row in rows)]),
            json.dumps({**self.made, "rows": [asdict(row) for row in rows]}, indent=2) + "\n",
            f"# Evaluation\n\n{asked}; {machine}.\n\n{LEGEND}\n\n"
            + "".join([_header(width), *(_markdown_lines(row, width) for row in rows)])
            + "".join(f"\n- {line}" for line in _messages(rows))
            + "\n",
        )
        for path, content in zip(self.paths, contents, strict=True):
            beside = path.with_name(f".{path.name}.part")
            beside.write_text(content, encoding="utf-8")
            beside.replace(path)


def _machine() -> dict[str, Any]:
    import torch

    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


CSV = ("weights", *COLUMNS, "seconds", "message")


def _csv_line(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow("" if value is None else value for value in values)
    return line.getvalue()


def _csv_lines(row: Row) -> str:
    return "".join(_csv_line([line[key] for key in CSV]) for line in row.lines())


WIDTHS = {"status": 14, "metric": 19, "published_difference": 10}


def _cells(cells: Sequence[str], width: int, fill: str = " ") -> str:
    widths = [width, *(WIDTHS.get(key, max(9, len(title))) for key, title in COLUMNS.items())]
    return "| " + " | ".join(cell.ljust(size, fill) for cell, size in zip(cells, widths, strict=True)) + " |\n"


def _header(width: int) -> str:
    return _cells(["weights", *COLUMNS.values()], width) + _cells(["-"] * (1 + len(COLUMNS)), width, "-")


def _markdown_lines(row: Row, width: int) -> str:
    """The weight's own figures stand in its first line only."""
    own = {*vars(row)}
    lines = []
    for n, line in enumerate(row.lines()):
        shown = [line[key] if n == 0 or key not in own else None for key in COLUMNS]
        lines.append(_cells([row.weights if n == 0 else "", *map(_shown, shown)], width))
    return "".join(lines)


def _shown(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}"


def _messages(rows: Sequence[Row]) -> list[str]:
    return [f"{row.weights}, {row.status}: {row.message}" for row in rows if row.message]


class MarkdownPrinter:
    """A table, its columns below each other, then what is to be said of rows, and where the files are."""

    def __init__(self, width: int) -> None:
        self.width = width
        print(_header(width), end="", flush=True)

    def show(self, row: Row) -> None:
        print(_markdown_lines(row, self.width), end="", flush=True)

    def end(self, rows: Sequence[Row], paths: Sequence[Path]) -> None:
        print("".join(f"\n{line.splitlines()[0]}" for line in _messages(rows)))
        counts = {status: sum(row.status == status for row in rows) for status in dict.fromkeys(r.status for r in rows)}
        print(", ".join(f"{number} {status}" for status, number in counts.items()), f"-> {', '.join(map(str, paths))}")


class CsvPrinter:
    """The lines of NAME.csv."""

    def __init__(self, width: int) -> None:
        print(_csv_line(CSV), end="", flush=True)

    def show(self, row: Row) -> None:
        print(_csv_lines(row), end="", flush=True)

    def end(self, rows: Sequence[Row], paths: Sequence[Path]) -> None:
        """Nothing stands after the lines."""


class JsonPrinter:
    """One object a line and a weight."""

    def __init__(self, width: int) -> None:
        """Nothing stands before the lines."""

    def show(self, row: Row) -> None:
        print(json.dumps(asdict(row)), flush=True)

    def end(self, rows: Sequence[Row], paths: Sequence[Path]) -> None:
        """Nothing stands after the lines."""


_PRINTERS: dict[str, type[MarkdownPrinter] | type[CsvPrinter] | type[JsonPrinter]] = {
    "markdown": MarkdownPrinter,
    "csv": CsvPrinter,
    "json": JsonPrinter,
}

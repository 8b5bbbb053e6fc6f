"""What ``cli.py evaluate`` writes and prints: a row a weight, as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
A metric is reproduced if it is within {ABSOLUTE:g} or {RELATIVE:.1%} of the recorded one, whichever is more. The
columns from evaluations on are of the last part that was read: evaluations of the cell a solve (mean over solves),
residual (mean over samples), fraction of samples that converged, spectral radius of df/dz at z* (mean over some samples
of the first batch), time of a test step (median over batches) and peak of the memory that it takes, both a sample. A
sample is a row of a solve: an image, a pair of frames, a segment of a text. The first batch warms up, the second is
looked at for memory (on a CPU the bytes of live tensors, on a GPU those of its allocator), the rest are timed."""


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


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


class Files:
    """NAME.csv, NAME.json and NAME.md, with all rows so far.

    Numbers that JSON does not have are the words ``"nan"``, ``"inf"`` and ``"-inf"`` in it.

    Each is written beside its place and then moved there: an interruption leaves the one before.

    Raises:
        OSError: they cannot be written there.
    """

    def __init__(self, name: Path, asked: Mapping[str, Any]) -> None:
        self.paths = [name.with_name(f"{name.name}.{ending}") for ending in ("csv", "json", "md")]
        self.made = {"asked": dict(asked), **_machine()}
        name.parent.mkdir(parents=True, exist_ok=True)
        for path in self.paths:  # a folder that cannot be written to is found before anything is measured
            _beside(path).touch()
            _beside(path).unlink()

    @property
    def named(self) -> str:
        """The three, for people."""
        return ", ".join(map(str, self.paths))

    def write(self, rows: Sequence[Row]) -> None:
        """Write all three."""
        asked = ", ".join(f"{key}={value}" for key, value in self.made["asked"].items() if value is not None)
        machine = ", ".join(f"{key} {value}" for key, value in self.made.items() if key != "asked")
        width = max((len(row.weights) for row in rows), default=0)
        contents = (
            "".join([_csv_line(CSV), *(_csv_lines(row) for row in rows)]),
            _json({**self.made, "rows": [asdict(row) for row in rows]}, indent=2) + "\n",
            f"# Evaluation\n\n{asked}; {machine}.\n\n{LEGEND}\n\n"
            + "".join([_header(width), *(_markdown_lines(row, width) for row in rows)])
            + "".join(f"\n- {line}" for line in _messages(rows))
            + "\n",
        )
        for path, content in zip(self.paths, contents, strict=True):
            _beside(path).write_text(content, encoding="utf-8")
            _beside(path).replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _machine() -> dict[str, Any]:
    import torch  # not before it is needed: --help has this file too

    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_in_words(value), indent=indent, allow_nan=False)


def _in_words(value: Any) -> Any:
    """Plain data whose numbers are finite, or else words."""
    if isinstance(value, dict):
        return {key: _in_words(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_words(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


CSV = ("weights", *COLUMNS, "seconds", "message")


def _csv_line(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow("" if value is None else value for value in values)
    return line.getvalue()


def _csv_lines(row: Row) -> str:
    return "".join(_csv_line([line[key] for key in CSV]) for line in row.lines())


MOST_SAID = 5
"""Of so many weights that are not here it is printed what to fetch; of more it stands in the files only."""
WIDTHS = {"status": 14, "metric": 19, "published_difference": 10}


def _widths(width: int) -> list[int]:
    """Of all columns; the first has the names of weights, of which the longest has this width."""
    return [max(width, len("weights")), *(WIDTHS.get(key, max(9, len(title))) for key, title in COLUMNS.items())]


def _line(cells: Sequence[str], width: int) -> str:
    from zoo.cards import markdown_row  # not before it is needed, as torch

    return markdown_row(cells, _widths(width)) + "\n"


def _header(width: int) -> str:
    return _line(["weights", *COLUMNS.values()], width) + _line(["-" * size for size in _widths(width)], width)


def _markdown_lines(row: Row, width: int) -> str:
    """The weight's own figures stand in its first line only."""
    own = {*vars(row)}
    lines = []
    for n, line in enumerate(row.lines()):
        shown = [line[key] if n == 0 or key not in own else None for key in COLUMNS]
        lines.append(_line([row.weights if n == 0 else "", *map(_shown, shown)], width))
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

    def end(self, rows: Sequence[Row], where: str) -> None:
        counts = Counter(row.status for row in rows)
        said = [row for row in rows if row.status != NOT_HERE or counts[NOT_HERE] <= MOST_SAID]
        print("".join(f"\n{line.splitlines()[0]}" for line in _messages(said)))
        print(", ".join(f"{number} {status}" for status, number in counts.items()), f"-> {where}")


class CsvPrinter:
    """The lines of NAME.csv."""

    def __init__(self, width: int) -> None:
        print(_csv_line(CSV), end="", flush=True)

    def show(self, row: Row) -> None:
        print(_csv_lines(row), end="", flush=True)

    def end(self, rows: Sequence[Row], where: str) -> None:
        """Nothing stands after the lines."""


class JsonPrinter:
    """One object a line and a weight."""

    def __init__(self, width: int) -> None:
        """Nothing stands before the lines."""

    def show(self, row: Row) -> None:
        print(_json(asdict(row)), flush=True)

    def end(self, rows: Sequence[Row], where: str) -> None:
        """Nothing stands after the lines."""


PRINTERS: dict[str, type[MarkdownPrinter] | type[CsvPrinter] | type[JsonPrinter]] = {
    "markdown": MarkdownPrinter,
    "csv": CsvPrinter,
    "json": JsonPrinter,
}

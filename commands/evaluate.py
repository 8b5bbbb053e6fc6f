"""``cli.py evaluate PATTERN``: a table over weights, of what is measured beside what is recorded and published.

python cli.py evaluate "*"

Each weight is tested on the task and the data that its record names, one after the other, on one device. Lines appear
as they are done, and files with all lines so far are written after each.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .tables import FAILED, MEASURED, NOT_HERE, NOT_REPRODUCED, PRINTERS, REPRODUCED, Files, Metric, Row
from .values import expanded, unmatched

if TYPE_CHECKING:
    from torch import nn

    from zoo import WeightsRecord

_ADVICE = "name weights that are evaluated on the same task and data (--as NAME)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        help="names of weights with shell wildcards, like 'mdeq*'; or one source that load_pretrained takes: a file, a "
        "folder, a Lightning checkpoint, hf:..., https:...",
    )
    parser.add_argument("--source", choices=("shipped", "original"), help="only weights from there")
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
    parser.add_argument(
        "--data_root", metavar="FOLDER", type=expanded, help="where the data are, in place of the recorded root"
    )
    parser.add_argument(
        "--out",
        metavar="NAME",
        type=_out,
        help="write NAME.csv, NAME.json and NAME.md, in place of what is there (default: runs/evaluation-<time>)",
    )
    parser.add_argument(
        "--format", choices=tuple(PRINTERS), default="markdown", help="of what is printed (default: markdown)"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate, print and write.

    Raises:
        ValueError: the pattern matches nothing and is no source; ``--as`` names nothing, or is needed; the device is
            not here.
        WeightsError: a source cannot be loaded.
        OSError: the files cannot be written.
        SystemExit: 1 if a recorded metric is not reproduced, a weight failed, or none could be measured.
    """
    from zoo.blobs import shown
    from zoo.records import find_record, list_weights

    _require_device(args.device)
    like = None if args.like is None else find_record(args.like)
    name = shown(args.pattern)  # what is written may be shared, and an address may hold a secret
    records = list_weights(args.pattern, args.source)
    chosen: dict[str, tuple[WeightsRecord | None, Callable[[], _Subject]]] = {
        record.name: (record, partial(_recorded, record, like)) for record in records
    }
    if not chosen:
        if not _may_be_a_source(args.pattern):
            raise unmatched(args.pattern, args.source)
        given = _given(args.pattern, name, like)  # what is wrong with it is told before files are touched
        chosen = {name: (None, lambda: given)}
    out = args.out or time.strftime("runs/evaluation-%Y%m%d-%H%M%S")
    files = Files(Path(out), {**vars(args), "pattern": name})
    printer = PRINTERS[args.format](max(map(len, chosen)))
    rows: list[Row] = []
    for each, (record, subject) in chosen.items():
        try:
            rows.append(evaluate(each, record, subject, args))
        except (KeyboardInterrupt, SystemExit):  # the latter is Lightning's after the former
            kept = f"the rows before it are in {files.named}" if rows else "nothing was measured, and nothing written"
            print(f"stopped at {each}; {kept}", file=sys.stderr)
            raise
        files.write(rows)
        printer.show(rows[-1])
    printer.end(rows, files.named)
    if not any(row.status in {REPRODUCED, MEASURED} for row in rows) or any(_is_bad(row) for row in rows):
        raise SystemExit(1)


def evaluate(name: str, record: WeightsRecord | None, prepare: Callable[[], _Subject], args: argparse.Namespace) -> Row:
    """One row; whatever goes wrong with these weights stands in it."""
    from zoo import WeightsError
    from zoo.records import ORIGINAL

    absent = record is not None and record.source == ORIGINAL and not record.path.is_file()
    parameters = None if record is None else record.num_parameters
    try:
        subject = prepare()
        parameters = sum(p.numel() for p in subject.model.parameters())
        from .measuring import measure

        found = measure(
            subject.model,
            subject.evaluation,
            split=args.split,
            device=args.device,
            batch_size=args.batch_size,
            limit=args.limit,
            data_root=args.data_root,
        )
    except FileNotFoundError as error:  # with which data say how to get them
        return Row(name, NOT_HERE, str(error), parameters, _metrics(record, {}, args.split))
    except WeightsError as error:
        status = NOT_HERE if absent else FAILED
        return Row(name, status, str(error), parameters, _metrics(record, {}, args.split))
    except Exception as error:  # noqa: BLE001 - the others are still to come, and this one's row says what it was
        return Row(name, FAILED, f"{type(error).__name__}: {error}", parameters, _metrics(record, {}, args.split))
    metrics = _metrics(record, found.metrics, args.split)
    status, message = _judged(record, metrics, args.limit)
    message = "; ".join(filter(None, [message, subject.chosen]))
    own = {key: value for key, value in vars(found).items() if key != "metrics"}
    return Row(name, status, message, parameters, metrics, **own)


def _judged(record: WeightsRecord | None, metrics: Sequence[Metric], limit: int | None) -> tuple[str, str]:
    """A status, and what is to be said of it."""
    if limit is not None:
        return MEASURED, f"{limit} batches only"
    if record is None or all(metric.recorded is None for metric in metrics):
        return MEASURED, ""
    bad = [metric.name for metric in metrics if not metric.is_reproduced]
    if bad:
        return NOT_REPRODUCED, f"{', '.join(bad)} not as recorded; trained on: {record.trained_on}"
    return REPRODUCED, ""


def _metrics(record: WeightsRecord | None, found: Mapping[str, float], split: str) -> list[Metric]:
    """What is recorded and published of the parts that are read, and what was found of it.

    Where nothing is recorded, of what was found that which is recorded usually.
    """
    from .measuring import METRICS, PARTS

    def known(values: Mapping[str, float]) -> dict[str, float]:
        return {key: value for key, value in values.items() if key.partition("_")[0] in PARTS[split]}

    recorded, published = (known(record.metrics), known(record.published)) if record else ({}, {})
    usual = (f"{part}_{metric}" for part in PARTS[split] for metric in METRICS)
    names = dict.fromkeys([*(recorded or (key for key in usual if key in found)), *published])
    return [Metric(key, found.get(key), recorded.get(key), published.get(key)) for key in names]


class _Subject(NamedTuple):
    """What is evaluated: the model, on which task and data, and how that was chosen, unless by its record."""

    model: nn.Module
    evaluation: Mapping[str, Any]
    chosen: str = ""


def _recorded(record: WeightsRecord, like: WeightsRecord | None) -> _Subject:
    """Weights by their record, which says how they are evaluated, or else ``--as`` does.

    Raises:
        ValueError: neither does.
        WeightsError: they cannot be loaded.
    """
    from zoo import load_pretrained

    model = load_pretrained(record.name)
    if record.evaluation is not None or like is None:
        return _Subject(model, _evaluation(record))
    return _Subject(model, _evaluation(like), f"measured as {like.name} is")


def _given(source: str, name: str, like: WeightsRecord | None) -> _Subject:
    """Weights of a source, evaluated as ``--as`` is, or on their run's data, or as the only record of their model is.

    Raises:
        ValueError: there is no such source, or none of the three, or several.
        WeightsError: they cannot be loaded.
    """
    from zoo import load_pretrained, spec_of
    from zoo.locating import TORCHVISION, find
    from zoo.pickles import is_pickle
    from zoo.records import list_weights

    path = None if source.startswith(TORCHVISION) else find(source, None, None, None).path
    model = load_pretrained(path or source)
    if like is not None:
        return _Subject(model, _evaluation(like), f"measured as {like.name} is")
    if path is not None and is_pickle(path):
        return _Subject(model, _evaluation_of_run(path), "measured on the data of its run")
    arch = spec_of(model).model
    same = {each.name: each.evaluation for each in list_weights() if each.model == arch and each.evaluation}
    if len(same) != 1:
        known = f"several weights of {arch} do: {', '.join(same)}" if same else f"no weights of {arch} do"
        raise ValueError(f"{name} does not say how it is evaluated, and {known}; {_ADVICE}")
    ((only, evaluation),) = same.items()
    return _Subject(model, evaluation, f"measured as {only} is")


def _evaluation(record: WeightsRecord) -> Mapping[str, Any]:
    if record.evaluation is None:
        raise ValueError(f"the record of {record.name} does not say how it is evaluated; {_ADVICE}")
    return record.evaluation


def _evaluation_of_run(path: Path) -> Mapping[str, Any]:
    """The task and the data of the run that wrote a checkpoint."""
    from lightning_modules.checkpoints import CheckpointError, read_checkpoint

    from .measuring import evaluation_of

    try:
        return evaluation_of(read_checkpoint(str(path))["made_by"])
    except CheckpointError as error:
        raise ValueError(str(error)) from None


def _may_be_a_source(pattern: str) -> bool:
    """Whether what matches no name can be something else that ``load_pretrained`` takes."""
    return ":" in pattern or "/" in pattern or Path(pattern).exists() or pattern.endswith((".ckpt", ".safetensors"))


def _require_device(device: str) -> None:
    """Raise ValueError for a device that is not here: else each row would say so."""
    import torch

    if device in {"cuda", "mps"} and not getattr(torch, device).is_available():
        raise ValueError(f"--device {device} is not available here; take cpu, or auto")


def _is_bad(row: Row) -> bool:
    return row.status in {NOT_REPRODUCED, FAILED}


def _out(text: str) -> str:
    """``runs/table.md`` -> ``runs/table``."""
    name = re.sub(r"\.(csv|json|md)$", "", expanded(text))
    if Path(name).name in {"", ".."}:
        raise argparse.ArgumentTypeError(f"takes the name of files to write, like runs/table; given: {text!r}")
    return name


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"takes a whole number, at least 1; given: {text!r}")
    return int(text)

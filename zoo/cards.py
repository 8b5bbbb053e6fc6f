"""The table of all weights, and a card for each, generated from their records: no figure is typed twice.

``python -m zoo.cards`` writes them anew, into ``checkpoints/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from . import records
from .implicit.choices import in_short
from .records import ORIGINAL, WeightsRecord

MEASURED = ".4f"  # how a measured figure is written; a published one has the places that its authors gave


def write_cards() -> Path:
    """Write ``checkpoints/README.md`` and ``checkpoints/cards/<name>.md`` of every record; the table's path.

    Cards of what has no record any more are removed.
    """
    folder = records.weights_dir() / "cards"
    folder.mkdir(exist_ok=True)
    cards = {f"{record.name}.md": model_card(record) for record in records.list_weights()}
    for name, card in cards.items():
        (folder / name).write_text(card, encoding="utf-8")
    for path in folder.glob("*.md"):
        if path.name not in cards:
            path.unlink()
    table = records.weights_dir() / "README.md"
    table.write_text(markdown_table(), encoding="utf-8")
    return table


def main_figures(record: WeightsRecord) -> str:
    """What was measured, or of an original what its authors report, in a line."""
    measured = {key: value for key, value in record.metrics.items() if not key.endswith("converged")}
    published = _in_words(record.published, "g")
    return _in_words(measured, MEASURED) or (f"published: {published}" if published else "none published")


# --------------------------------------------------------------------------------------------------------------- table


def markdown_table() -> str:
    """All weights in two tables, those that ship before the originals."""
    shipped, originals = (records.list_weights(source=source) for source in (records.SHIPPED, ORIGINAL))
    lines = [
        "# Pretrained weights",
        "",
        "Generated from the records (`python -m zoo.cards`); do not edit. Each name leads to a card.",
        "",
        "## Weights that ship with the zoo",
        "",
        "Each is a safetensors file with the model's name and arguments in its header, and is verified at each load:",
        '`zoo.load_pretrained("tanh_deq.digits")`.',
        "",
        *_table(
            ("name", "parameters", "trained on", "metrics", "input", "licence", "made by", "sha256"),
            (
                (
                    _link(record),
                    f"{record.num_parameters:,}",
                    record.trained_on,
                    _in_words(record.metrics, MEASURED),
                    record.preprocessing,
                    record.licence,
                    f"`{record.recipe}`",
                    f"`{str(record.sha256)[:12]}…`",
                )
                for record in shipped
            ),
        ),
    ]
    if originals:
        lines += [
            "",
            "## Weights that the original authors published",
            "",
            "They do not ship: their card says what to fetch and where to put it, and so does",
            "`zoo.load_pretrained(name)` until it is there. The figures are their authors', for their own protocols.",
            "",
            *_table(
                ("name", "parameters", "trained on", "published", "licence", "file"),
                (
                    (
                        _link(record),
                        f"{record.num_parameters:,}",
                        record.trained_on,
                        _in_words(record.published, "g") or "nothing",
                        record.licence,
                        f"[`{record.file}`]({record.download})",
                    )
                    for record in originals
                ),
            ),
        ]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield markdown_row(row)


def markdown_row(cells: Sequence[str], widths: Sequence[int] | None = None) -> str:
    """A line of a Markdown table, its cells filled up to ``widths``; what would end a cell is written as an entity."""
    sizes = widths or [0] * len(cells)
    filled = (cell.replace("|", "&#124;").ljust(size) for cell, size in zip(cells, sizes, strict=True))
    return f"| {' | '.join(filled)} |"


def _link(record: WeightsRecord) -> str:
    return f"[`{record.name}`](cards/{record.name}.md)"


def _in_words(figures: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value:{form}}" for key, value in figures.items())


# ---------------------------------------------------------------------------------------------------------------- card


def model_card(record: WeightsRecord, source: str | None = None) -> str:
    """What one set of weights is, how it is loaded and what to expect of it, in Markdown.

    Args:
        record: of the weights.
        source: what ``load_pretrained`` takes for them, if it is not the record's name: a copy on a hub, say.
    """
    sections = {
        f"# {record.name}": _opening(record),
        "## Load": _loading(record, source),
        "## Figures": _figures(record),
        "## Input": [record.preprocessing],
        "## Model": _model(record),
        "## Where it comes from": _provenance(record),
        "## Notes": [record.notes] if record.notes else [],
    }
    return "\n\n".join("\n".join([head, "", *lines]) for head, lines in sections.items() if lines) + "\n"


def _opening(record: WeightsRecord) -> list[str]:
    made = "trained by its authors" if record.source == ORIGINAL else "trained by this zoo"
    return [
        f"The deep equilibrium model `{record.model}` with {record.num_parameters:,} parameters, {made} on:",
        f"{record.trained_on}.",
    ]


def _loading(record: WeightsRecord, source: str | None) -> list[str]:
    line = f"model = zoo.load_pretrained({json.dumps(source or record.name)})"
    code = ["```python", "import zoo", "", line, "```"]
    if source or record.source != ORIGINAL:
        return code
    return [
        f"The file does not ship. Fetch `{record.file}` from <{record.download}>,",
        f"and put it into `originals/{record.name}/` of the cache: `$DEQ_ZOO_CACHE`, else `deq-zoo` in",
        "`$XDG_CACHE_HOME`, else `~/.cache/deq-zoo`. Then:",
        "",
        *code,
        "",
        "Or turn it into a file of the zoo's, from wherever it lies:",
        f"`python cli.py convert {record.file} OUT.safetensors`.",
    ]


def _figures(record: WeightsRecord) -> list[str]:
    """Measured beside published, by name."""
    names = list(dict.fromkeys([*record.metrics, *record.published]))
    command = f"python cli.py evaluate {record.name}"
    rows = [
        (
            name.replace("_", " "),
            f"{record.metrics[name]:{MEASURED}}" if name in record.metrics else "",
            f"{record.published[name]:g}" if name in record.published else "",
        )
        for name in names
    ]
    if not rows:
        return ["Its authors report none."]
    return [
        *_table(("", "measured by this zoo", "published"), iter(rows)),
        "",
        "Fractions, not percent; errors of flow in pixels."
        + (f" {'Measured' if record.metrics else 'To be measured'} by `{command}`." if record.evaluation else ""),
    ]


def _model(record: WeightsRecord) -> list[str]:
    choices = [
        f"- {role}: {f'`{in_short(chosen)}`' if (chosen := record.arguments.get(role)) else 'the default of the model'}"
        for role in ("solver", "gradient")
    ]
    sizes = {key: value for key, value in record.arguments.items() if key not in {"solver", "gradient"}}
    lines = [*choices, *(f"- {key}: `{json.dumps(value)}`" for key, value in sizes.items())]
    if record.classes:
        lines.append(f"- classes: {', '.join(record.classes)}")
    return lines


def _provenance(record: WeightsRecord) -> list[str]:
    unseen = "not known, as nobody of this zoo has seen the file; from its first use on it has to stay as it is"
    facts = {
        "origin": record.origin,
        "file": record.file and f"`{record.file}`",
        "download": record.download and f"<{record.download}>",
        "recipe": f"`{record.recipe}`",
        "licence": record.licence,
        "sha256": f"`{record.sha256}`" if record.sha256 else unseen,
    }
    return [f"- {key}: {value}" for key, value in facts.items() if value]


if __name__ == "__main__":
    print(f"Wrote {write_cards()} and the cards beside it")

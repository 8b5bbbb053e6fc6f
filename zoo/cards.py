"""The table of all weights, and a card for each, generated from their records: no figure is typed twice."""

from __future__ import annotations

from pathlib import Path

from . import records


def write_table() -> Path:
    """Write ``checkpoints/README.md``, the table of all weights, from their records."""
    path = records.weights_dir() / "README.md"
    path.write_text(markdown_table(), encoding="utf-8")
    return path


def markdown_table() -> str:
    """The table of all weights. Generated, so that no figure is typed twice."""
    lines = [
        "# Weights that ship with the zoo",
        "",
        "Generated from the records beside them (`examples/publish_weights.py`); do not edit. Each is a safetensors",
        "file with the model's name and arguments in its header, and is verified at each load.",
        "",
        "| name | parameters | trained on | metrics | input | licence | made by | sha256 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records.list_weights(source=records.SHIPPED):
        metrics = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in r.metrics.items())
        lines.append(
            f"| `{r.name}` | {r.num_parameters:,} | {r.trained_on} | {metrics} | {r.preprocessing} | {r.licence} "
            f"| `{r.recipe}` | `{(r.sha256 or '')[:12]}…` |"
        )
    return "\n".join(lines) + "\n"

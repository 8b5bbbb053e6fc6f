"""The table of all weights and their cards: made of the records, and as the records are now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import zoo
from tests.command_line import ROOT
from tests.toy_weights import publish
from zoo import cards
from zoo.records import ORIGINAL, SHIPPED, find_record, save_record

CHECKPOINTS = ROOT / "checkpoints"
STALE = "the cards are not of the records as they are: run python -m zoo.cards"


def original(name: str = "tanh_deq.paper", **changes: object) -> zoo.WeightsRecord:
    """A record as those of the originals are, saved."""
    publish()
    record = dataclasses.replace(
        find_record("tanh_deq.toy"),
        name=name,
        source=ORIGINAL,
        sha256=None,
        metrics={},
        published={"test_accuracy": 0.792},
        origin="https://nowhere.invalid; A. Author, 1999",
        download="https://nowhere.invalid/file",
        file="paper.pkl",
        notes="Seen by nobody.",
    )
    record = dataclasses.replace(record, **changes)
    save_record(record)
    return record


# ------------------------------------------------------------------------------------------------------------ as it is


def test_the_table_is_not_stale() -> None:
    assert (CHECKPOINTS / "README.md").read_text(encoding="utf-8") == cards.markdown_table(), STALE


def test_no_card_is_missing_stale_or_of_nothing() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in (CHECKPOINTS / "cards").iterdir()}
    assert written == {f"{record.name}.md": cards.model_card(record) for record in zoo.list_weights()}, STALE


def test_every_file_has_a_record_and_every_record_a_file() -> None:
    shipped = {path.name for path in CHECKPOINTS.iterdir() if path.is_file() and path.suffix != ".md"}
    names = [record.name for record in zoo.list_weights(source=SHIPPED)]
    assert "tanh_deq.digits" in names
    assert shipped == {f"{name}.{kind}" for name in names for kind in ("json", "safetensors")}
    originals = {path.name for path in (CHECKPOINTS / "originals").iterdir()}
    assert originals == {f"{record.name}.json" for record in zoo.list_weights(source=ORIGINAL)}


# ------------------------------------------------------------------------------------------------------- how it is made


def test_the_table_is_made_of_the_records(weights_folder: Path) -> None:
    publish()
    assert "original authors" not in cards.markdown_table()
    original()
    assert cards.write_cards() == weights_folder / "README.md"
    table = (weights_folder / "README.md").read_text()
    assert table == cards.markdown_table()
    ours, theirs = (line for line in table.splitlines() if line.startswith("| [`"))
    assert ours == (
        "| [`tanh_deq.toy`](cards/tanh_deq.toy.md) | 496 | nothing | val accuracy 0.5000, test accuracy 0.1235 "
        f"| images (B, 64) in [0, 1] | MIT | `none` | `{str(find_record('tanh_deq.toy').sha256)[:12]}…` |"
    )
    assert theirs == (
        "| [`tanh_deq.paper`](cards/tanh_deq.paper.md) | 496 | nothing | test accuracy 0.792 | MIT "
        "| [`paper.pkl`](https://nowhere.invalid/file) |"
    )


def test_a_card_has_all_that_the_record_says(weights_folder: Path) -> None:
    original(metrics={"test_accuracy": 0.79034}, classes=["cat", "dog"], evaluation={"task": {}, "data": {}})
    cards.write_cards()
    written = (weights_folder / "cards" / "tanh_deq.paper.md").read_text()
    for told in (
        "# tanh_deq.paper\n",
        'model = zoo.load_pretrained("tanh_deq.paper")',
        "| test accuracy | 0.7903 | 0.792 |",
        "Measured by `python cli.py evaluate tanh_deq.paper`.",
        "Fetch `paper.pkl` from <https://nowhere.invalid/file>,",
        "`originals/tanh_deq.paper/` of the cache",
        "python cli.py convert paper.pkl OUT.safetensors",
        "- width: `6`",
        "- solver: the default of the model",
        "- classes: cat, dog",
        "A. Author, 1999",
        "licence: MIT",
        "Seen by nobody.",
        "images (B, 64) in [0, 1]",
    ):
        assert told in written
    save_record(dataclasses.replace(find_record("tanh_deq.paper"), metrics={}))
    unmeasured = cards.model_card(find_record("tanh_deq.paper"))
    assert "To be measured by `python cli.py evaluate tanh_deq.paper`." in unmeasured
    assert "$XDG_CACHE_HOME" in unmeasured
    ours = (weights_folder / "cards" / "tanh_deq.toy.md").read_text()
    assert f"sha256: `{find_record('tanh_deq.toy').sha256}`" in ours
    assert "cache" not in ours


@pytest.mark.parametrize("name", ["tanh_deq.digits", "mdeq_nano.digits"])
def test_a_card_tells_solver_and_gradient(name: str) -> None:
    card = cards.model_card(find_record(name))
    assert "- solver: `Anderson(tol=" in card
    assert "- gradient: `ImplicitGradient(solver=Anderson(tol=" in card


def test_cards_of_what_is_gone_are_removed(weights_folder: Path) -> None:
    gone = original()
    cards.write_cards()
    (weights_folder / "originals" / f"{gone.name}.json").unlink()
    zoo.records.all_records.cache_clear()
    cards.write_cards()
    assert [path.name for path in (weights_folder / "cards").iterdir()] == ["tanh_deq.toy.md"]

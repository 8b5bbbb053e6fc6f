"""``cli.py evaluate``: figures beside what is recorded, files that survive, rows that say what is missing."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cli
import commands.measuring
from commands.measuring import evaluation_of, measure
from commands.tables import Metric, Row
from tests.command_line import Fitted, refused, rows
from tests.servers import Reply, serving
from tests.toy_weights import publish
from zoo import create_model, load_pretrained, save_weights
from zoo.records import ORIGINAL, find_record, list_weights, save_record

TOY = "tanh_deq.toy"
DIGITS = {
    "task": {"class_path": "lightning_modules.ImageClassifier", "init_args": {"num_classes": 10}},
    "data": {"class_path": "datamodules.DigitsDataModule", "init_args": {"batch_size": 32}},
}
IMAGENET = {**DIGITS, "data": {"class_path": "datamodules.ImageNetDataModule", "init_args": {"root": "nowhere"}}}


def change(name: str = TOY, **changes: Any) -> None:
    """Change a record of the test's."""
    save_record(dataclasses.replace(find_record(name), **changes))


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """The accuracies of the toy, whose weights are always the same."""
    torch.manual_seed(0)
    found = measure(
        create_model("tanh_deq", width=6, contraction=0.7).eval(), DIGITS, split="both", device="cpu"
    ).metrics
    return {key: found[key] for key in ("val_accuracy", "test_accuracy")}


@pytest.fixture
def toy(weights_folder: Path, measured: dict[str, float]) -> dict[str, float]:
    """A toy published with its record; the metrics that are right."""
    torch.manual_seed(0)
    publish(TOY)
    change(evaluation=DIGITS, metrics=measured)
    return dict(measured)


def evaluate(*args: str) -> int:
    """The exit status."""
    try:
        cli.main(["evaluate", *args, "--device", "cpu", "--out", "table"])
    except SystemExit as done:
        return int(str(done.code))
    return 0


def table() -> list[Row]:
    """The rows in the JSON file."""
    return [
        Row(**{**row, "metrics": [Metric(**metric) for metric in row["metrics"]]})
        for row in json.loads(Path("table.json").read_text())["rows"]
    ]


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("name", ["tanh_deq.digits", "mdeq_nano.digits"])
def test_recorded_metrics_of_shipped_weights_are_reproduced(name: str) -> None:
    assert evaluate(name) == 0
    (row,) = table()
    record = find_record(name)
    assert (row.weights, row.status, row.parameters) == (name, "reproduced", record.num_parameters)
    assert {metric.name: metric.recorded for metric in row.metrics} == record.metrics
    assert all(metric.value == pytest.approx(metric.recorded, abs=1e-4) for metric in row.metrics)
    assert row.converged == 1
    assert row.residual is not None
    assert 0 < row.residual < 1e-3
    assert row.evaluations is not None
    assert 5 < row.evaluations < 30
    assert row.spectral_radius is not None
    assert 0 < row.spectral_radius < 1
    assert row.milliseconds is not None
    assert 0 < row.milliseconds < 1000
    assert row.megabytes is not None
    assert 0.01 < row.megabytes < 10


def test_a_text_and_a_video_are_measured_too() -> None:
    """A few batches: a sample is a pair of a video's frames, or a segment of a text."""
    given = ("--source", "shipped", "--split", "val", "--limit", "3", "--batch_size", "2")
    assert evaluate("deq*", *given) == 0
    flow, text = table()
    assert [row.message for row in (flow, text)] == 2 * ["3 batches only"]
    assert [metric.name for metric in flow.metrics] == ["val_converged", "val_epe", "val_epe_zero"]
    for row in (flow, text):
        assert row.milliseconds is not None
        assert 0.3 < (row.megabytes or 0) < 10, "two of them would take more, or less"


def test_a_metric_that_is_not_reproduced(toy: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    change(metrics={**toy, "test_accuracy": toy["test_accuracy"] + 2e-3})
    assert evaluate(TOY) == 1
    (row,) = table()
    assert (row.status, row.message) == ("not reproduced", "test_accuracy not as recorded; trained on: nothing")
    assert row.metrics[1].difference == pytest.approx(-2e-3)
    assert "1 not reproduced -> table.csv, table.json, table.md" in capsys.readouterr().out
    assert evaluate(TOY, "--split", "val") == 0, "the other part is as recorded"
    assert evaluate(TOY, "--limit", "1") == 0, "a part of the data is not compared"
    assert table()[0].milliseconds is None, "the first batch is not timed"


def test_what_is_recorded_and_not_measured_is_not_reproduced(toy: dict[str, float]) -> None:
    change(metrics={**toy, "test_epe": 1.0})
    assert evaluate(TOY) == 1
    assert table()[0].metrics[2] == Metric("test_epe", None, 1.0, None)


@given(st.floats(-1e3, 1e3), st.floats(-1, 1))
def test_the_tolerance(recorded: float, difference: float) -> None:
    found = Metric("test_epe", recorded + difference, recorded, None)
    if abs(difference) < 0.99 * max(1e-4, 1e-3 * abs(recorded)):
        assert found.is_reproduced
    if abs(difference) > 1.01 * max(1e-4, 1e-3 * abs(recorded)):
        assert not found.is_reproduced
    assert not dataclasses.replace(found, value=float("nan")).is_reproduced
    assert dataclasses.replace(found, recorded=None).is_reproduced


def test_published_metrics_are_shown_with_the_difference(toy: dict[str, float]) -> None:
    change(published={"test_accuracy": 0.5, "test_accuracy_top5": 0.9})
    assert evaluate(TOY) == 0
    first, second, third = table()[0].metrics
    assert (first.published, first.published_difference) == (None, None)
    assert second.published_difference == pytest.approx(toy["test_accuracy"] - 0.5)
    assert third == Metric("test_accuracy_top5", None, None, 0.9)


def test_a_batch_of_another_size_gives_the_same(toy: dict[str, float]) -> None:
    assert evaluate(TOY, "--batch_size", "50") == 0
    assert table()[0].status == "reproduced"


def test_memory_of_a_sample_does_not_depend_on_the_batch(toy: dict[str, float]) -> None:
    sizes = [measure(load_pretrained(TOY), DIGITS, device="cpu", batch_size=n, limit=2).megabytes for n in (20, 80)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)


def test_nothing_listens_afterwards(toy: dict[str, float]) -> None:
    model: Any = load_pretrained(TOY)
    measure(model, DIGITS, device="cpu", limit=1)
    assert not model.deq._forward_hooks


# --------------------------------------------------------------------------------------------------- what is not a name


def test_a_checkpoint_of_a_run_is_tested_on_its_own_data(fitted: Fitted) -> None:
    assert evaluate(fitted.best) == 0
    (row,) = table()
    (tested,) = [line for line in rows(fitted.folder / "metrics.csv") if line["test/accuracy"]]
    assert (row.status, row.message) == ("measured", "measured on the data of its run")
    found = {metric.name: metric.value for metric in row.metrics}
    assert found["test_accuracy"] == pytest.approx(float(tested["test/accuracy"]))


@pytest.mark.parametrize("written", ["run", "run/checkpoints", "~/run", "file:run/checkpoints/best.ckpt"])
def test_a_run_is_tested_on_its_own_data_however_it_is_called(
    written: str, fitted: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not on those of the shipped weights of its model."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("run/checkpoints").mkdir(parents=True)
    shutil.copy(fitted.best, "run/checkpoints")
    assert evaluate(written, "--limit", "1", "--split", "val") == 0
    assert table()[0].message == "1 batches only; measured on the data of its run"


@pytest.mark.parametrize("source", ["runs/version_9", "nowhere.ckpt", "torchvision:Raft_Large_Weights.V3", "hf:x"])
def test_a_mistyped_source_leaves_files_as_they_are(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("csv", "json", "md"):
        Path(f"table.{ending}").write_text("of before")
    refused(capsys, "evaluate", source, "--out", "table")
    assert {path.name: path.read_text() for path in Path().iterdir()} == {
        f"table.{ending}": "of before" for ending in ("csv", "json", "md")
    }


def test_secrets_of_an_address_are_not_written(toy: dict[str, float], weights_folder: Path) -> None:
    with serving() as server:
        server.replies["/a.safetensors"] = Reply((weights_folder / f"{TOY}.safetensors").read_bytes())
        assert evaluate(f"{server.url}/a.safetensors?token=SECRET", "--limit", "1", "--split", "val") == 0
        assert table()[0].weights == f"{server.url}/a.safetensors"
    for ending in ("csv", "json", "md"):
        assert "SECRET" not in Path(f"table.{ending}").read_text()


def test_a_file_is_tested_as_the_weights_of_its_model_are(
    toy: dict[str, float], weights_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(weights_folder / f"{TOY}.safetensors")
    assert evaluate(file) == 0
    assert table()[0].message == f"measured as {TOY} is"
    assert {metric.name: metric.value for metric in table()[0].metrics}["test_accuracy"] == toy["test_accuracy"]
    publish("tanh_deq.other")
    change("tanh_deq.other", evaluation=DIGITS)
    capsys.readouterr()
    assert evaluate(file) == 2
    assert "several weights of tanh_deq do: tanh_deq.other, tanh_deq.toy" in capsys.readouterr().err
    assert evaluate(file, "--as", TOY) == 0
    change("tanh_deq.other", evaluation=None)
    assert evaluate(file, "--as", "tanh_deq.other") == 2
    assert "the record of tanh_deq.other does not say how it is evaluated; name" in capsys.readouterr().err


def test_a_pattern_that_matches_nothing_names_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "evaluate", "tanh_deq.digit?x")
    assert "no weights match 'tanh_deq.digit?x'" in message
    assert "Did you mean 'tanh_deq.digits'?" in message
    assert "unknown weights 'tanh'" in refused(capsys, "evaluate", "*", "--as", "tanh")
    message = refused(capsys, "evaluate", "tanh_deq.digits", "--source", "original")
    assert message == "1 weights match 'tanh_deq.digits', and none of them is original: tanh_deq.digits is shipped"
    assert "Known: deq_flow_nano.synthetic, " in refused(capsys, "evaluate", "torch*", "--source", "shipped")
    assert not list(Path().iterdir())


def test_what_cannot_be_done_is_said_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert "--device cuda is not available here" in refused(capsys, "evaluate", "*", "--device", "cuda")
    assert "--limit: takes a whole number, at least 1; given: 'x'" in refused(capsys, "evaluate", "*", "--limit", "x")
    assert "at least 1; given: '0'" in refused(capsys, "evaluate", "*", "--batch_size", "0")
    for name in (".", "..", "/", ".csv"):
        message = refused(capsys, "evaluate", "*", "--out", name)
        assert message == f"argument --out: takes the name of files to write, like runs/table; given: {name!r}"
    Path("file").touch()
    assert "file" in refused(capsys, "evaluate", "tanh*", "--out", "file/table")


def test_names_of_files_and_folders_at_home(toy: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    change(evaluation=IMAGENET)
    cli_status = 0
    try:
        cli.main(["evaluate", TOY, "--out=~/table.md", "--data_root=~/images"])
    except SystemExit as done:
        cli_status = int(str(done.code))
    assert cli_status == 1, "there are no images"
    assert str(Path.cwd() / "home" / "images") in Path("home/table.md").read_text()


# ---------------------------------------------------------------------------------------------------- what is not there


def test_what_is_not_here_has_a_row_and_the_run_goes_on(
    toy: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    publish("tanh_deq.images")
    change("tanh_deq.images", evaluation=IMAGENET)
    publish("tanh_deq.published")
    change("tanh_deq.published", source=ORIGINAL, sha256=None, file="net.pth", download="a page", origin="a repository")
    (Path("checkpoints") / "tanh_deq.published.json").unlink()
    assert evaluate("*") == 0
    found = {row.weights: row for row in table()}
    assert {name: row.status for name, row in found.items()} == {
        "tanh_deq.images": "not here",
        "tanh_deq.published": "not here",
        TOY: "reproduced",
    }
    assert "nowhere" in found["tanh_deq.images"].message
    assert "net.pth" in found["tanh_deq.published"].message
    printed = capsys.readouterr().out
    assert "tanh_deq.images, not here: " in printed
    assert "2 not here, 1 reproduced" in printed
    assert evaluate("tanh_deq.images", "--data_root", "elsewhere") == 1, "nothing was measured"
    assert "elsewhere" in table()[0].message


def test_originals_are_shown_with_what_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("*", "--source", "original") == 1, "none could be measured"
    found = {row.weights: row for row in table()}
    assert {row.status for row in found.values()} == {"not here"}
    assert found["mdeq_small_imagenet.imagenet"].metrics[0] == Metric("test_accuracy", None, None, 0.755)
    printed = capsys.readouterr().out
    assert f"{len(list_weights(source=ORIGINAL))} not here" in printed
    assert "by hand" not in printed, "of so many it stands in the files"
    assert "by hand" in Path("table.md").read_text()


def test_one_that_fails_does_not_stop_the_others(toy: dict[str, float], weights_folder: Path) -> None:
    publish("tanh_deq.damaged")
    (weights_folder / "tanh_deq.damaged.safetensors").write_bytes(b"nonsense")
    publish("tanh_deq.silent")
    publish("tanh_deq.wrong")
    wrong = {**DIGITS, "data": {"class_path": DIGITS["data"]["class_path"], "init_args": {"size": 3}}}
    change("tanh_deq.wrong", evaluation=wrong)
    assert evaluate("*") == 1
    found = {row.weights: row for row in table()}
    assert [row.status for row in found.values()] == ["failed", "failed", "reproduced", "failed"]
    assert "tanh_deq.damaged.safetensors" in found["tanh_deq.damaged"].message
    assert "unexpected keyword argument 'size'" in found["tanh_deq.wrong"].message
    assert "does not say how it is evaluated" in found["tanh_deq.silent"].message
    assert evaluate("tanh_deq.silent", "--as", TOY) == 1
    assert table()[0].status == "not reproduced", "its record has metrics of nothing"


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ("task", "os.system"),
        ("data", "os.system"),
        ("task", "datamodules.DigitsDataModule"),
        ("data", "datamodules.base.SplitDataModule"),
        ("data", "datamodules.digits_split"),
        ("task", "lightning_modules.PredictionWriter"),
        ("task", "ImageClassifier"),
    ],
)
def test_no_other_class_is_called(part: str, path: str, toy: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda *given: pytest.fail("it was called"))
    change(evaluation={**DIGITS, part: {"class_path": path, "init_args": {"command": "true"}}})
    assert evaluate(TOY) == 1
    assert f"given: {path!r}" in table()[0].message


def test_a_checkpoint_without_data_is_no_evaluation(fitted: Fitted) -> None:
    with pytest.raises(ValueError, match=r"does not say what to test it on; .* \(--as NAME\)"):
        evaluation_of({"model": DIGITS["task"]})


# --------------------------------------------------------------------------------------------------------------- files


def test_the_three_files_and_what_is_printed_say_the_same(
    toy: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    publish("tanh_deq.images")
    change("tanh_deq.images", evaluation=IMAGENET)
    capsys.readouterr()
    assert evaluate("*", "--format", "csv") == 0
    printed = capsys.readouterr().out
    assert printed == Path("table.csv").read_text()
    lines = list(csv.DictReader(io.StringIO(printed)))
    assert [line["metric"] for line in lines] == 2 * ["val_accuracy", "test_accuracy"]
    assert (lines[0]["status"], lines[0]["value"], lines[0]["recorded"]) == ("not here", "", "0.5")
    assert float(lines[3]["value"]) == toy["test_accuracy"] == float(lines[3]["recorded"])
    assert evaluate("*", "--format", "json") == 0
    printed = capsys.readouterr().out
    assert [json.loads(line) for line in printed.splitlines()] == json.loads(Path("table.json").read_text())["rows"]
    made = json.loads(Path("table.json").read_text())
    assert (made["torch"], made["threads"], made["asked"]["pattern"]) == (
        torch.__version__,
        torch.get_num_threads(),
        "*",
    )
    markdown = Path("table.md").read_text()
    assert f"| {toy['test_accuracy']:.4f}" in markdown
    assert "- tanh_deq.images, not here: " in markdown
    assert {path.name for path in Path().iterdir() if path.is_file()} == {"table.csv", "table.json", "table.md"}


def test_figures_that_are_no_numbers_are_json_too(
    toy: dict[str, float], weights_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a model that diverges."""
    model = load_pretrained(TOY)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    save_weights(model, "nan.safetensors")
    capsys.readouterr()
    assert evaluate("nan.safetensors", "--limit", "1", "--format", "json") == 0

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert json.loads(Path("table.json").read_text(), parse_constant=refuse)["rows"] == [printed]
    assert {"nan", "inf"} & {printed["residual"], printed["spectral_radius"]}


@pytest.mark.parametrize("name", ["a|b.safetensors", "x"])
def test_a_table_has_its_columns_whatever_the_name(name: str, toy: dict[str, float], weights_folder: Path) -> None:
    shutil.copy(weights_folder / f"{TOY}.safetensors", name)
    assert evaluate(f"./{name}" if name == "x" else name, "--limit", "1", "--split", "val") == 0
    lines = [line for line in Path("table.md").read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == 4, "two of its head"
    assert len({line.count("|") for line in lines}) == 1
    assert "|" in name or len({len(line) for line in lines}) == 1


def test_interrupted_at_once_nothing_is_said_to_be_there(
    toy: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.measuring, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(TOY)
    assert capsys.readouterr().err == f"stopped at {TOY}; nothing was measured, and nothing written\n"


def test_an_interruption_loses_no_row(
    toy: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish("tanh_deq.zzz")
    change("tanh_deq.zzz", evaluation=DIGITS)
    done = commands.measuring.measure

    def interrupted(model: torch.nn.Module, *args: Any, **options: Any) -> Any:
        if Path("table.json").exists():
            assert f"| {TOY}" in capsys.readouterr().out
            raise KeyboardInterrupt
        return done(model, *args, **options)

    monkeypatch.setattr(commands.measuring, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("*")
    assert "stopped at tanh_deq.zzz; the rows before it are in table.csv, table.json" in capsys.readouterr().err
    assert [(row.weights, row.status) for row in table()] == [(TOY, "reproduced")]
    assert rows(Path("table.csv"), metric="test_accuracy")[0]["weights"] == TOY
    assert TOY in Path("table.md").read_text()


def test_without_a_name_files_are_new(toy: dict[str, float]) -> None:
    cli.main(["evaluate", TOY, "--device", "cpu", "--limit", "1"])
    assert {path.suffix for path in Path("runs").glob("evaluation-*")} == {".csv", ".json", ".md"}
    cli.main(["evaluate", TOY, "--device", "cpu", "--limit", "1", "--out", "kept/all.v2.md"])
    assert {path.name for path in Path("kept").iterdir()} == {"all.v2.csv", "all.v2.json", "all.v2.md"}

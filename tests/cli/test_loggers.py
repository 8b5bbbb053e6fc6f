"""Weights & Biases, offline, TensorBoard and CSV, for real: all three show the same."""

from __future__ import annotations

import csv
import re
import time
from pathlib import Path

import lightning_fabric.loggers.tensorboard as lightning_tensorboard
import pytest
import wandb
import yaml
from lightning_utilities.core.imports import RequirementCache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_line import DIGITS, QUIET, ROOT, TINY, Fitted, fit, main, metrics, refused


@pytest.mark.usefixtures("wandb_offline")
def test_a_run_with_wandb_offline(tmp_path: Path) -> None:
    run = fit("-c", DIGITS, "-c", str(ROOT / "configs" / "loggers" / "wandb_offline.yaml"), *TINY)
    identity = run.cli.trainer.logger.version
    wandb.finish()

    assert run.folder == tmp_path / "runs" / "deq-zoo" / identity
    assert {path.name for path in run.folder.rglob("*") if path.is_file()} == {"config.yaml", "best.ckpt", "last.ckpt"}
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["trainer"]["logger"]["init_args"]["offline"] is True
    assert config["trainer"]["max_epochs"] == 1

    (record,) = (tmp_path / "runs" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.name == f"run-{identity}.wandb"
    logged = record.read_bytes()
    for name in (b"train/steps", b"train/adjoint_steps", b"val/residual", b"test/accuracy", b"tanh_deq"):
        assert name in logged

    here = {path.name for path in tmp_path.iterdir()}
    assert here <= {"runs", "elsewhere"}
    tested = main("test", "--ckpt_path", run.best, *QUIET)
    assert metrics(tested)["test/accuracy"] == metrics(run.cli)["test/accuracy"]


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_online_differs_in_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    online, offline = (
        yaml.safe_load((ROOT / "configs" / "loggers" / f"{name}.yaml").read_text())["trainer"]["logger"]
        for name in ("wandb", "wandb_offline")
    )
    assert offline["init_args"].pop("offline") is True
    assert online == offline


# ------------------------------------------------------------------------------------------------ the same in all three

LANGUAGE = (
    *("--model", "LanguageModel", "--model.model", "deq_transformer", "--model.vocab_size", "256"),
    *("--model.model_args", "{d_model: 8, num_heads: 2, d_inner: 8, memory_length: 8}"),
    *(
        "--data",
        "TextFolderDataModule",
        "--data.root",
        "texts",
        "--data.segment_length",
        "16",
        "--data.batch_size",
        "2",
    ),
    *("--data.eval_batch_size", "2", "--num_threads", "1", "--seed_everything", "0", *QUIET),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--trainer.log_every_n_steps", "1"),
)
IMAGES = ("-c", DIGITS, *TINY)
OWN = {"epoch", "step", "trainer/global_step", "hp_metric"}
"""What a logger has for itself."""


def logger(name: str) -> tuple[str, str]:
    return "-c", str(ROOT / "configs" / "loggers" / f"{name}.yaml")


def a_fit(*recipe: str) -> Fitted:
    if "texts" in recipe:
        Path("texts").mkdir(exist_ok=True)
        for i in range(20):
            Path("texts", f"{i}.txt").write_text(f"A text, the {i}th of them. " * 20, encoding="utf-8")
    return fit(*recipe)


def in_table(run: Fitted) -> set[str]:
    with (run.folder / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        return set(next(csv.reader(lines))) - OWN


def once_written(record: Path, what: bytes) -> bytes:
    """W&B's own process may still write when the run has finished."""
    until = time.monotonic() + 60
    while what not in (logged := record.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)
    return logged


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


@pytest.mark.parametrize("recipe", [IMAGES, LANGUAGE], ids=["images", "text"])
@pytest.mark.usefixtures("wandb_offline")
@pytest.mark.filterwarnings("ignore::zoo.implicit.report.ConvergenceWarning")
def test_all_loggers_have_the_same(recipe: tuple[str, ...], tmp_path: Path) -> None:
    table = a_fit(*recipe)
    names = in_table(table)
    of_steps = {f"train/{name}" for name in ("lr", "samples_per_second", "evaluations_per_second", "steps", "residual")}
    assert names >= {*of_steps, "val/spectral_radius", "val/loss", "test/loss"}
    text = "texts" in recipe
    shown = [path for path in table.folder.rglob("*") if path.suffix in {".png", ".txt"}]
    sample = "samples/val_samples_000002.txt" if text else "pictures/val_samples_000002.png"
    assert {str(path.relative_to(table.folder)) for path in shown} == {sample, "pictures/val_convergence_000002.png"}

    board = events(a_fit(*recipe, *logger("tensorboard")).folder)
    assert set(board.Tags()["scalars"]) - OWN == names
    pictures = {"val/convergence"} if text else {"val/convergence", "val/samples"}
    assert set(board.Tags()["images"]) == pictures
    assert {event.step for name in pictures for event in board.Images(name)} == {2}
    texts = [name for name in board.Tags()["tensors"] if name.startswith("val/")]
    assert texts == (["val/samples/text_summary"] if text else [])
    assert [event.step for event in board.Scalars("train/lr")] == [0, 1]

    run = a_fit(*recipe, *logger("wandb_offline"))
    wandb.finish()
    (record,) = (tmp_path / "runs" / "wandb").glob("offline-run-*/run-*.wandb")
    logged = once_written(record, b"test/loss")
    found = {name.decode() for name in re.findall(rb"(?:train|val|test)/[a-z0-9_]+", logged)}
    assert found >= {*names, "val/convergence", "val/samples"}
    media = {str(path.relative_to(record.parent / "files" / "media")) for path in record.parent.rglob("val/*")}
    assert len([name for name in media if name.startswith("images/val/convergence")]) == 1
    assert len([name for name in media if name.startswith(("table" if text else "images") + "/val/samples")]) == 1
    assert not list(run.folder.rglob("*.png"))


def test_two_loggers_at_once() -> None:
    """The run's folder is that of the first; pictures are where they can be shown."""
    run = fit(*IMAGES, *logger("csv_and_tensorboard"))
    assert run.folder == Path("runs", "deq-zoo", "version_0").absolute()
    assert (run.folder / "config.yaml").is_file()
    board = events(Path("runs", "tensorboard", "version_0"))
    assert set(board.Tags()["scalars"]) - OWN == in_table(run)
    assert set(board.Tags()["images"]) == {"val/convergence", "val/samples"}
    assert not list(Path("runs").rglob("*.png"))


def test_tensorboard_may_be_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(lightning_tensorboard, name, RequirementCache("no-such-package"))
    message = refused(capsys, "fit", *IMAGES, *logger("tensorboard"))
    assert message.startswith("TensorBoardLogger needs a package that is not installed. Neither `tensorboard` nor")
    assert "pip install" in message
    assert "\n" not in message

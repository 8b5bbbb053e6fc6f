"""fit, then validate, test and predict from nothing but the checkpoint; and what a run leaves on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from tests.command_line import DIGITS, QUIET, RESUME, TINY, Fitted, fit, main, metrics, rows, said, same, weights


def test_a_run_has_a_folder_of_its_own(fitted: Fitted) -> None:
    assert fitted.folder.parts[-3:] == ("runs", "tanh_deq_digits", "version_0")
    files = {str(path.relative_to(fitted.folder)) for path in fitted.folder.rglob("*") if path.is_file()}
    shown = {f"pictures/val_{name}_000002.png" for name in ("samples", "convergence")}  # of one validation of ten
    checkpoints = {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert files == {"config.yaml", "hparams.yaml", "metrics.csv", *checkpoints, *shown}


def test_the_log_has_the_solvers_statistics(fitted: Fitted) -> None:
    train = [row for row in rows(fitted.folder / "metrics.csv") if row["train/steps"]]
    assert [row["step"] for row in train] == list("012345")  # three epochs of two batches
    for row in train:
        assert 0 < float(row["train/steps"]) <= 50
        assert 0 < float(row["train/adjoint_steps"]) <= 50
        assert 0 < float(row["train/residual"]) <= 1e-4
        assert row["train/converged"] == "1.0"
        assert 0 < float(row["train/loss"]) < math.inf
    for stage, how_often in (("val", 3), ("test", 1)):
        measured = [row for row in rows(fitted.folder / "metrics.csv") if row[f"{stage}/loss"]]
        assert len(measured) == how_often
        for row in measured:
            assert 0 < float(row[f"{stage}/steps"]) <= 50
            assert 0 < float(row[f"{stage}/residual"]) <= 1e-4
            assert row[f"{stage}/converged"] == "1.0"
            assert 0 <= float(row[f"{stage}/accuracy"]) <= 1


def test_fit_ends_with_the_test_of_its_best_checkpoint(fitted: Fitted) -> None:
    (row,) = [row for row in rows(fitted.folder / "metrics.csv") if row["test/accuracy"]]
    relative = Path(fitted.best).relative_to(fitted.folder.parents[2])
    assert f"python cli.py test --ckpt_path {relative}\n" in fitted.output
    assert f"{float(row['test/accuracy']):.4g} │" in fitted.output
    assert "training time (s)" in fitted.output
    losses = [float(row["val/loss"]) for row in rows(fitted.folder / "metrics.csv") if row["val/loss"]]
    assert torch.load(fitted.best, weights_only=True)["epoch"] == losses.index(min(losses))


@pytest.mark.parametrize("form", ["--ckpt_path {}", "--ckpt_path={}"])
def test_the_test_of_a_checkpoint_is_the_one_that_ended_the_fit(fitted: Fitted, form: str) -> None:
    again = main("test", *form.format(fitted.best).split(), *QUIET)
    (row,) = [row for row in rows(fitted.folder / "metrics.csv") if row["test/accuracy"]]
    assert metrics(again) == {name: float(row[name]) for name in row if name.startswith("test/")}


def test_the_validation_of_a_checkpoint_is_that_of_its_epoch(fitted: Fitted) -> None:
    epoch = str(torch.load(fitted.best, weights_only=True)["epoch"])
    (row,) = [row for row in rows(fitted.folder / "metrics.csv", epoch=epoch) if row["val/accuracy"]]
    assert metrics(main("validate", "--ckpt_path", fitted.best, *QUIET)) == {
        name: float(row[name]) for name in row if name.startswith("val/")
    }


def test_predictions_are_those_that_were_tested(fitted: Fitted, tmp_path: Path) -> None:
    with said() as messages:
        main("predict", f"--ckpt_path={fitted.best}", *QUIET)
    (file,) = tmp_path.rglob("predictions.csv")
    assert f"Wrote 360 predictions to {file.relative_to(tmp_path)}" in messages
    table = rows(file)
    assert list(table[0]) == ["index", "prediction", "probability", "label"]
    assert [row["index"] for row in table] == [str(i) for i in range(360)]
    assert all(0.1 <= float(row["probability"]) <= 1 for row in table)
    (row,) = [row for row in rows(fitted.folder / "metrics.csv") if row["test/accuracy"]]
    hits = sum(row["prediction"] == row["label"] for row in table)
    assert torch.tensor(hits / 360).item() == float(row["test/accuracy"])


def test_the_saved_configuration_is_the_run(fitted: Fitted, tmp_path: Path) -> None:
    again = fit("-c", str(fitted.folder / "config.yaml"))
    assert again.folder == tmp_path / "runs" / "tanh_deq_digits" / "version_0"
    assert same(weights(again.last), weights(fitted.last))
    assert same(weights(again.best), weights(fitted.best))
    assert (again.folder / "config.yaml").read_text() == (fitted.folder / "config.yaml").read_text()


def test_another_seed_is_another_run(fitted: Fitted) -> None:
    """That the runs above are equal is no accident."""
    other = fit("-c", str(fitted.folder / "config.yaml"), "--seed_everything", "1", "--test_after_fit", "false")
    assert not same(weights(other.last), weights(fitted.last))


def test_only_fit_writes_a_configuration(fitted: Fitted, tmp_path: Path) -> None:
    main("test", "--ckpt_path", fitted.best, *QUIET)
    assert not list(tmp_path.rglob("config.yaml"))
    assert list(tmp_path.rglob("metrics.csv"))


def test_without_the_test_after_fit() -> None:
    run = fit("-c", DIGITS, *TINY, "--test_after_fit", "false")
    assert "test/accuracy" not in rows(run.folder / "metrics.csv")[0]
    assert "test/" not in run.output
    assert f"--ckpt_path {Path(run.best).relative_to(Path.cwd())}" in run.output


def test_runs_do_not_overwrite_each_other() -> None:
    first, second = (fit("-c", DIGITS, *TINY, "--test_after_fit", "false") for _ in range(2))
    assert (first.folder.name, second.folder.name) == ("version_0", "version_1")
    assert Path(first.best).is_file()
    assert Path(first.folder, "config.yaml").is_file()


def test_a_run_without_a_logger(tmp_path: Path) -> None:
    run = fit("-c", DIGITS, *TINY, "--trainer.logger", "false", "--test_after_fit", "false")
    assert run.folder == tmp_path
    main("predict", "--ckpt_path", run.best, *QUIET, "--trainer.logger", "false")
    assert len(rows(tmp_path / "predictions.csv")) == 360


def test_a_run_is_resumed() -> None:
    """Two epochs, the second from the checkpoint of the first: its optimizer, its counters, its loops."""
    first = fit("-c", DIGITS, *TINY, "--test_after_fit", "false")
    second = fit("--ckpt_path", first.last, *RESUME, "--trainer.max_epochs", "2", "--test_after_fit", "false")
    assert {row["epoch"] for row in rows(second.folder / "metrics.csv")} == {"1"}
    before, after = (torch.load(run.last, weights_only=True) for run in (first, second))
    assert (before["global_step"], after["global_step"]) == (2, 4)
    assert [int(state["step"]) for state in after["optimizer_states"][0]["state"].values()] == [4] * 5
    assert not same(before["state_dict"], after["state_dict"])
    config = yaml.safe_load((second.folder / "config.yaml").read_text())
    assert config["ckpt_path"] == first.last
    assert config["model"]["init_args"]["model_args"]["width"] == 8


def test_the_configuration_of_a_resumed_run_resumes_again() -> None:
    first = fit("-c", DIGITS, *TINY, "--test_after_fit", "false")
    second = fit("--ckpt_path", first.last, *RESUME, "--trainer.max_epochs", "2", "--test_after_fit", "false")
    third = fit("-c", str(second.folder / "config.yaml"))
    assert torch.load(third.last, weights_only=True)["global_step"] == 4
    assert same(weights(third.last), weights(second.last))

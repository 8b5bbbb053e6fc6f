"""``fit --resume auto``: however a run stopped, the same command goes on with it, in its folder, as if it never had."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import pytorch_lightning as pl
import torch
import wandb
import yaml
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger, Logger

from commands.training import ZooCLI
from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier
from lightning_modules.checkpoints import CheckpointError
from lightning_modules.continued_runs import ContinuedMetrics, ContinuedRun
from tests.cli.test_loggers import events
from tests.command_line import DIGITS, ROOT, TINY, Fitted, fit, metrics, refused, rows, said, same, weights

RUNS = Path("runs", "tanh_deq_digits")
AUTO = ("--resume", "auto")
LONG = (*TINY, "--trainer.max_epochs", "3")


class StopAt(pl.Callback):
    """Somebody's Ctrl-C, while this hook runs at this step."""

    def __init__(self, step: int, hook: str = "on_train_batch_start") -> None:
        self.step = step
        setattr(self, hook, self._stop)

    def _stop(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            raise KeyboardInterrupt


@contextlib.contextmanager
def with_callback(callback: pl.Callback) -> Iterator[None]:
    """Runs of the command line have this callback too."""
    make = ZooCLI.instantiate_trainer

    def made(self: ZooCLI, **kwargs: Any) -> pl.Trainer:
        trainer = make(self, **kwargs)
        trainer.callbacks.append(callback)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZooCLI, "instantiate_trainer", made)
        yield


def stopped_at(step: int, *args: str, hook: str = "on_train_batch_start") -> None:
    """A run that is interrupted while this hook runs at this step."""
    with with_callback(StopAt(step, hook)), pytest.raises(SystemExit):
        fit("-c", DIGITS, *LONG, *args)


def log(folder: Path) -> list[dict[str, str]]:
    """What is logged, but for the time that it took and the means over a part of an epoch."""
    left_out = ("samples_per_second", "evaluations_per_second", "train/accuracy", "per_s", "time")
    found = [
        {key: value for key, value in row.items() if value and not any(word in key for word in left_out)}
        for row in rows(folder / "metrics.csv")
    ]
    return [row for row in found if row.keys() > {"epoch", "step"}]


def told(messages: list[str]) -> list[str]:
    """What ``--resume auto`` said."""
    return [message for message in messages if message.startswith("--resume auto")]


def test_a_run_starts_and_a_finished_one_is_tested_again() -> None:
    with said() as messages:
        first = fit("-c", DIGITS, *LONG, *AUTO)
    assert told(messages) == [f"--resume auto found no good checkpoint in {RUNS}: training starts from the beginning"]
    before, saved = (first.folder / "metrics.csv").read_text(), weights(first.last)
    with said() as messages:
        second = fit("-c", DIGITS, *LONG, *AUTO)
    assert told(messages) == [f"--resume auto goes on from {RUNS}/version_0/checkpoints/last.ckpt (step 6, epoch 2)"]
    assert any(message.startswith("This run was finished already: nothing is left to train") for message in messages)
    assert [folder.name for folder in RUNS.iterdir()] == ["version_0"]
    assert metrics(second.cli)["test/accuracy"] == metrics(first.cli)["test/accuracy"]
    assert "Result of the best checkpoint" in second.output
    assert (first.folder / "metrics.csv").read_text() == before
    assert same(weights(second.last), saved)


def test_a_finished_run_is_trained_longer() -> None:
    fit("-c", DIGITS, *TINY, *AUTO)
    longer = fit("-c", DIGITS, *TINY, "--resume", "--trainer.max_epochs", "2")  # there is no other than auto
    assert longer.folder.name == "version_0"
    assert torch.load(longer.last, weights_only=True)["global_step"] == 4
    config = yaml.safe_load((longer.folder / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    assert (config["resume"], config["ckpt_path"], config["trainer"]["logger"]["init_args"]["version"]) == (None,) * 3


@pytest.mark.parametrize(
    ("step", "hook"),
    [
        *((step, "on_train_batch_start") for step in (1, 2, 3, 5)),
        *((4, hook) for hook in ("on_validation_start", "on_validation_batch_end", "on_validation_epoch_end")),
    ],
)
def test_it_is_as_if_it_had_never_stopped(step: int, hook: str, never_stopped: Fitted) -> None:
    stopped_at(step, *AUTO, hook=hook)
    assert (RUNS / "version_0" / "checkpoints" / "interrupted.ckpt").is_file()
    resumed = fit("-c", DIGITS, *LONG, *AUTO)
    assert resumed.folder == Path.cwd() / RUNS / "version_0"
    first, second = (torch.load(run.last, weights_only=True) for run in (never_stopped, resumed))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert same(first[part], second[part]), part
    assert log(resumed.folder) == log(never_stopped.folder)
    assert metrics(resumed.cli)["test/accuracy"] == metrics(never_stopped.cli)["test/accuracy"]
    best = resumed.cli.trainer.checkpoint_callback.best_model_score
    assert best == never_stopped.cli.trainer.checkpoint_callback.best_model_score


def test_a_step_that_ends_an_epoch_is_validated(never_stopped: Fitted) -> None:
    """Stopped after the last step of an epoch, and before its validation."""
    stopped_at(4, *AUTO, hook="on_train_batch_end")
    resumed = fit("-c", DIGITS, *LONG, *AUTO)
    first, second = (torch.load(run.last, weights_only=True) for run in (never_stopped, resumed))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert same(first[part], second[part]), part
    validated = [[row for row in log(run.folder) if "val/loss" in row] for run in (never_stopped, resumed)]
    assert validated[0] == validated[1]
    assert len(validated[0]) == 3


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_train_batch_end"])
def test_the_last_of_max_steps_is_validated(hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing is left to train."""
    length = (*TINY, "--trainer.max_epochs", "-1", "--trainer.max_steps", "4")
    whole = fit("-c", DIGITS, *length)
    (tmp_path / "stopped").mkdir()
    monkeypatch.chdir(tmp_path / "stopped")
    with with_callback(StopAt(4, hook)), pytest.raises(SystemExit):
        fit("-c", DIGITS, *length, *AUTO)
    resumed = fit("-c", DIGITS, *length, *AUTO)
    for name in ("best", "last"):
        first, second = (torch.load(getattr(run, name), weights_only=True) for run in (whole, resumed))
        assert first["global_step"] == second["global_step"] == 4
        assert same(first["state_dict"], second["state_dict"])
    validated = [[row for row in log(run.folder) if "val/loss" in row] for run in (whole, resumed)]
    assert validated[0] == validated[1]
    assert metrics(whole.cli)["test/loss"] == metrics(resumed.cli)["test/loss"]


class RunId(Logger):
    """Somebody's logger, which has a name of its own for what others call a version."""

    def __init__(self, run_id: str = "own") -> None:
        super().__init__()
        self.run_id = run_id

    name = property(lambda self: "somebody's")
    version = property(lambda self: self.run_id)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


def test_a_logger_of_another_kind_beside() -> None:
    Path("two.yaml").write_text(
        "trainer:\n  logger:\n  - {class_path: CSVLogger, init_args: {save_dir: runs, name: tanh_deq_digits}}\n"
        "  - {class_path: tests.cli.test_resume_auto.RunId}\n"
    )
    fit("-c", DIGITS, "-c", "two.yaml", *TINY, *AUTO)
    again = fit("-c", DIGITS, "-c", "two.yaml", *LONG, *AUTO)
    assert again.folder.name == "version_0"


def a_short_fit(logger: CSVLogger) -> None:
    """In a script."""
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    few = {"max_steps": 1, "limit_val_batches": 1, "accelerator": "cpu", "log_every_n_steps": 1}
    module = ImageClassifier(model_args={"width": 8}, show_every=0)
    pl.Trainer(logger=logger, **quiet, **few).fit(module, datamodule=DigitsDataModule())


def test_what_a_script_has_logged_before() -> None:
    logger = CSVLogger("logs")
    logger.log_hyperparams({"mine": 42})
    a_short_fit(logger)
    assert yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())["mine"] == 42


def test_a_log_that_is_elsewhere() -> None:
    logger = CSVLogger("memory://logs")
    a_short_fit(logger)
    assert fsspec.filesystem("memory").exists(f"{logger.log_dir}/metrics.csv".removeprefix("memory:/"))
    assert list(Path.cwd().iterdir()) == []


def test_an_interrupted_write_of_the_log_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a new column comes, the file is written anew."""
    log = ContinuedMetrics(str(tmp_path))
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    log.log_metrics({"b": 2.5}, 1)

    def interrupt(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            log.save()
    assert (tmp_path / "metrics.csv").read_bytes() == b"a,step\r\n1.0,0\r\n"
    log.save()
    log.log_metrics({"a": 3.0}, 2)
    log.save()
    assert (tmp_path / "metrics.csv").read_bytes() == b"a,b,step\r\n1.0,,0\r\n,2.5,1\r\n3.0,,2\r\n"


def test_the_last_checkpoint_is_the_last_though_it_is_not_the_best() -> None:
    """With Lightning 2.6 alone it would be the last of those that were the best."""
    worst_is_best = ("--checkpoint.mode", "max", "--test_after_fit", "false")  # the loss falls
    run = fit("-c", DIGITS, *LONG, *worst_is_best)
    best, last = (torch.load(path, weights_only=True) for path in (run.best, run.last))
    assert (best["global_step"], last["global_step"]) == (2, 6)
    (state,) = [state for name, state in last["callbacks"].items() if name.startswith("ModelCheckpoint{")]
    assert state["best_model_path"] == str(Path(run.best).relative_to(Path.cwd()))
    with said() as messages:
        fit("-c", DIGITS, *LONG, *worst_is_best, *AUTO)
    assert any(message.startswith("This run was finished already") for message in messages)


def test_the_log_of_a_killed_run(fitted: Fitted) -> None:
    """Rows after the checkpoint, and one that was not written to its end."""
    folder = RUNS / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    content = torch.load(fitted.best, weights_only=True)
    (folder / "checkpoints" / "best.ckpt").write_bytes(Path(fitted.best).read_bytes())
    text = (fitted.folder / "metrics.csv").read_bytes()
    (folder / "metrics.csv").write_bytes(text + text[text.index(b"\n") + 1 :][:40])
    log = ContinuedMetrics(str(folder))
    log.keep_before(content["global_step"])
    log.log_metrics({"new": 1.5}, 17)
    log.save()
    kept = rows(folder / "metrics.csv")
    before = [row for row in rows(fitted.folder / "metrics.csv") if int(row["step"]) < content["global_step"]]
    assert [{**row, "new": ""} for row in before] == [dict(row) for row in kept[:-1]] != []
    assert {key: value for key, value in kept[-1].items() if value} == {"new": "1.5", "step": "17"}
    assert [file.name for file in folder.glob(".*")] == []


def test_a_full_disk_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "some.png")

    with with_callback(Full()):
        message = refused(capsys, "fit", "-c", DIGITS, *TINY)
    assert message.startswith("some.png could not be written: No space left on device. Make room; a fit goes on from")


# ------------------------------------------------------------------------------------------------- what is passed over


@pytest.fixture
def folder(fitted: Fitted) -> Path:
    """Of a finished run of three epochs, copied; ``last`` is newer than ``best``."""
    folder = RUNS / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    for age, name in enumerate(("last.ckpt", "best.ckpt")):
        (folder / name).write_bytes((fitted.folder / "checkpoints" / name).read_bytes())
        os.utime(folder / name, (0, 1_000_000 - age))
    return folder


def test_a_truncated_one(folder: Path) -> None:
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    os.utime(last, (0, 2_000_000))
    with said() as messages:
        fit("-c", DIGITS, *LONG, *AUTO, "--test_after_fit", "false")
    skipped, taken = told(messages)
    assert skipped == f"--resume auto passes over {last}: is damaged, or not a checkpoint: File is not a zip file"
    assert taken.startswith(f"--resume auto goes on from {folder / 'best.ckpt'} (step ")


def test_all_of_them(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"")
    with said() as messages:
        run = fit("-c", DIGITS, *TINY, *AUTO, "--test_after_fit", "false")
    assert [message.partition(":")[0] for message in told(messages)] == [
        f"--resume auto passes over {folder / 'last.ckpt'}",
        f"--resume auto passes over {folder / 'best.ckpt'}",
        f"--resume auto found no good checkpoint in {folder}",
    ]
    assert run.folder.name == "version_1", "what is damaged may still be of use to somebody"


def test_weights_alone_and_another_model(folder: Path) -> None:
    other = fit("-c", str(ROOT / "configs" / "resnet_digits.yaml"), *TINY[:-2], "--test_after_fit", "false")
    (folder / "best.ckpt").write_bytes(Path(other.last).read_bytes())
    content = torch.load(folder / "last.ckpt", weights_only=True)
    del content["optimizer_states"]
    torch.save(content, folder / "last.ckpt")
    with said() as messages:
        fit("-c", DIGITS, *TINY, *AUTO, "--test_after_fit", "false")
    weights_only, foreign, _ = sorted(told(messages), reverse=True)
    assert weights_only.endswith("last.ckpt: it holds weights only, with no state of optimizer and loops to go on from")
    assert foreign.endswith("best.ckpt: it is of another run: its model is resnet, and tanh_deq was asked for")


@pytest.mark.usefixtures("folder")
def test_a_model_of_another_size_is_refused_as_always(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit", "-c", DIGITS, *AUTO, "--model.model_args.width", "9")
    assert message.startswith(f"{RUNS}/version_0/checkpoints/last.ckpt is a checkpoint of another model than the one")


# ------------------------------------------------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("fit", "--resume", "last"), "--resume takes auto, and finds the run's last good checkpoint by itself; given"),
        (("test", *AUTO), "--resume goes with fit, and this is test, which takes --ckpt_path FILE"),
        (
            ("fit", *AUTO, "--trainer.logger", "true"),
            "--resume auto looks in the folder of the run, which it knows for",
        ),
    ],
)
def test_what_can_be_given(typed: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, typed[0], "-c", DIGITS, *typed[1:]).startswith(message)


def test_one_of_the_two(fitted: Fitted, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit", "-c", DIGITS, *AUTO, "--ckpt_path", fitted.last)
    assert message.startswith(f"--resume auto finds a checkpoint, and --ckpt_path {fitted.last} names one: give one of")


@pytest.mark.usefixtures("folder")
def test_what_is_typed_beats_the_checkpoint() -> None:
    with said() as messages:
        run = fit("-c", DIGITS, *LONG, *AUTO, "--test_after_fit", "false", "--model.label_smoothing", "0.3")
    assert run.cli.model.hparams["label_smoothing"] == 0.3
    assert any(message.startswith("model.label_smoothing: 0.3 as given, in place of 0.1 in") for message in messages)


# -------------------------------------------------------------------------------------------------- where a run may be


def test_tensorboard() -> None:
    board = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "boards")
    stopped_at(3, *board, *AUTO)
    with said() as messages:
        run = fit("-c", DIGITS, *LONG, *board, *AUTO)
    (taken,) = told(messages)
    assert (
        taken
        == "--resume auto goes on from boards/lightning_logs/version_0/checkpoints/interrupted.ckpt (step 3, epoch 1)"
    )
    assert run.folder.relative_to(Path.cwd()) == Path("boards", "lightning_logs", "version_0")


def test_several_loggers_all_go_on() -> None:
    both = ("-c", str(ROOT / "configs" / "loggers" / "csv_and_tensorboard.yaml"))
    stopped_at(3, *both, *AUTO)
    run = fit("-c", DIGITS, *LONG, *both, *AUTO)
    assert run.folder.relative_to(Path.cwd()) == Path("runs", "deq-zoo", "version_0")
    board = Path("runs", "tensorboard")
    assert [folder.name for folder in board.iterdir()] == ["version_0"]
    losses = events(board / "version_0").Scalars("train/loss")
    assert [loss.step for loss in losses] == list(range(6))


@pytest.mark.usefixtures("wandb_offline")
def test_wandb() -> None:
    offline = ("-c", str(ROOT / "configs" / "loggers" / "wandb_offline.yaml"))
    stopped_at(3, *offline, *AUTO)
    wandb.finish()
    (checkpoint,) = Path("runs", "deq-zoo").glob("*/checkpoints/interrupted.ckpt")
    with said() as messages:
        run = fit("-c", DIGITS, *offline, *LONG, *AUTO)
    identity = checkpoint.parents[1].name
    assert told(messages) == [f"--resume auto goes on from {checkpoint} (step 3, epoch 1)"]
    assert run.cli.trainer.logger.version == identity
    assert run.cli.trainer.logger.experiment.id == identity
    assert run.folder.relative_to(Path.cwd()) == checkpoint.parents[1]
    wandb.finish()


def test_a_folder_of_its_own_for_checkpoints() -> None:
    kept = ("--checkpoint.dirpath", "kept")
    first = fit("-c", DIGITS, *TINY, *kept, "--test_after_fit", "false")
    assert first.cli.trainer.logger.version == 0
    with said() as messages:
        second = fit("-c", DIGITS, *LONG, *kept, *AUTO, "--test_after_fit", "false")
    assert told(messages) == ["--resume auto goes on from kept/last.ckpt (step 2, epoch 0)"]
    assert second.cli.trainer.logger.version == 0


def test_without_a_logger() -> None:
    nothing = ("--trainer.logger", "false", "--test_after_fit", "false")
    fit("-c", DIGITS, *TINY, *nothing)
    with said() as messages:
        fit("-c", DIGITS, *LONG, *nothing, *AUTO)
    assert told(messages) == ["--resume auto goes on from checkpoints/last.ckpt (step 2, epoch 0)"]


# --------------------------------------------------------------------------------------------------- several processes


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("first", [Path("a.ckpt"), None])
def test_all_processes_find_the_same(first: Path | None, tmp_path: Path) -> None:
    class Found(ContinuedRun):
        def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
            self.path = first if trainer.global_rank == 0 else Path("b.ckpt")
            super().setup(trainer, *args, **kwargs)

    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", callbacks=[Found(None, 7)], max_epochs=1, logger=False
    )
    with pytest.raises(Exception, match="on a disk that all machines share") as error:
        trainer.fit(BoringModel())
    assert f"--resume auto found {'no checkpoint' if first is None else 'a.ckpt (step 7)'} in" in str(error.value)
    assert CheckpointError.__name__ in str(error.value) or isinstance(error.value, CheckpointError)

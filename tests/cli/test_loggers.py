"""Weights & Biases, for real and offline; and the other configuration parses."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
import yaml

from tests.command_line import DIGITS, QUIET, ROOT, TINY, fit, main, metrics


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

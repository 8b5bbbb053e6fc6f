"""Optical flow from the command line: fit, test, predict on frames of one's own, go on, and what is refused."""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets._optical_flow import _read_flo

import zoo
from tests.command_line import QUIET, ROOT, Fitted, fit, main, metrics, refused, rows, same, weights
from tests.lightning_modules.flows import MEASURES

MODEL = {
    "model": "deq_flow_nano", "solver": "FixedPointIteration", "solver.norm": "relative", "solver.tol": 0.9,
    "solver.max_steps": 12, "losses": 2, "schedule": "one_cycle", "lr": 1e-4, "gradient": "PhantomGradient",
    "gradient.advance": "true",
}  # fmt: skip
DATA = {"batch_size": 2, "height": 32, "width": 48, "max_shift": 2, "train_size": 4, "val_size": 2, "test_size": 3}
TYPED = (
    *("--model", "OpticalFlow", *(f"--model.{name}={value}" for name, value in MODEL.items())),
    *("--data", "SyntheticFlowDataModule", *(f"--data.{name}={value}" for name, value in DATA.items())),
)
SHORT = (*QUIET, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1")


@pytest.fixture(scope="session")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A run of two steps. Nobody writes there."""
    with contextlib.chdir(tmp_path_factory.mktemp("moved")):
        return fit(*TYPED, *SHORT)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A folder of three frames of odd size, of a picture that moves two pixels to the right from one to the next."""
    folder = tmp_path / "frames"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (37, 60, 3), dtype=np.uint8)
    for number in (1, 2, 10):
        Image.fromarray(np.roll(picture, 2 * number, axis=1)[:, :51]).save(folder / f"frame_{number}.png")
    return folder


def test_the_figures_of_flow(moved: Fitted) -> None:
    table = rows(moved.folder / "metrics.csv")
    for stage in ("train", "val", "test"):
        (row,) = [row for row in table if row[f"{stage}/epe"]]
        assert {name.partition("/")[2] for name in row if name.startswith(stage)} >= set(MEASURES)
        found = {name: float(row[f"{stage}/{name}"]) for name in MEASURES if row[f"{stage}/{name}"]}
        assert found["epe"] > 0
        assert 0.1 < found["epe_zero"] < 10
        assert 0 <= found["1px"] <= found["3px"] <= 1
    assert [row["step"] for row in table if row["train/loss"]] == ["0", "1"]
    assert "test/epe" in moved.output
    names = {path.name for path in (moved.folder / "pictures").iterdir()}
    assert names == {"val_flow_000002.png", "val_convergence_000002.png"}
    with Image.open(moved.folder / "pictures" / "val_flow_000002.png") as picture:
        assert picture.width > 3 * 3 * 48, "three columns of small images, enlarged"


def test_a_checkpoint_is_all_that_a_test_needs(moved: Fitted) -> None:
    again = main("test", "--ckpt_path", moved.best, *QUIET)
    (row,) = [row for row in rows(moved.folder / "metrics.csv") if row["test/loss"]]
    assert metrics(again) == {name: float(row[name]) for name in row if name.startswith("test/")}
    assert (again.model.losses, again.model.schedule) == (2, "one_cycle")


def test_sequences_are_tested_as_videos(moved: Fitted) -> None:
    found = [
        metrics(main("test", "--ckpt_path", moved.best, *QUIET, "--data.frames", "3", "--model.warm_start", warm))
        for warm in ("true", "false")
    ]
    assert found[0]["test/epe"] != found[1]["test/epe"]
    assert found[0]["test/epe_zero"] == found[1]["test/epe_zero"]


def test_flow_of_a_folder_of_frames(moved: Fitted, frames: Path, tmp_path: Path) -> None:
    """Named as the frames are; the second pair starts where the first ended, unless it is told not to."""
    written = []
    for warm in ("true", "false"):
        main(
            *("predict", "--ckpt_path", moved.best, *QUIET, "--model.warm_start", warm),
            *("--data", "FramesDataModule", "--data.root", str(frames)),
        )
        table_file = max(tmp_path.rglob("predictions.csv"), key=lambda file: file.stat().st_mtime)
        table = rows(table_file)
        assert [row["name"] for row in table] == ["frame_1", "frame_2"]
        assert [row["flow"] for row in table] == ["flow/frame_1.flo", "flow/frame_2.flo"]
        written.append([_read_flo(str(table_file.parent / row["flow"])) for row in table])
        with Image.open(table_file.parent / table[1]["flow_picture"]) as picture:
            assert picture.size == (51, 37)
    assert written[0][0].shape == (2, 37, 51)
    np.testing.assert_allclose(written[0][0], written[1][0], rtol=1e-4, atol=1e-4)
    assert np.abs(written[0][1] - written[1][1]).max() > 1e-4


@pytest.mark.filterwarnings("ignore:.*decode.*:DeprecationWarning")
def test_flow_as_kitti_has_it(moved: Fitted, frames: Path, tmp_path: Path) -> None:
    files = [str(frames / f"frame_{number}.png") for number in (1, 2)]
    data = ("--data", "FramesDataModule", f"--data.images=[{', '.join(files)}]", "--data.root=")
    with contextlib.chdir(tmp_path):
        main("predict", "--ckpt_path", moved.best, *data, "--predictions.flow_format", "kitti")
    (table,) = tmp_path.rglob("predictions.csv")
    (row,) = rows(table)
    with Image.open(table.parent / row["flow"]) as png:
        assert png.size == (51, 37)
    assert not list(tmp_path.rglob("*.flo"))


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_frames_have_no_truth(verb: str, moved: Fitted, frames: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(frames.parent):
        arguments = ("--ckpt_path", moved.best, "--data", "FramesDataModule", "--data.root", str(frames))
        with pytest.raises(SystemExit):
            main(verb, *arguments)
    assert "error: FramesDataModule has no ground truth to train on or to test with" in capsys.readouterr().err


def test_sequences_are_trained_on(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        run = fit(*TYPED, *SHORT, "--data.frames", "3")
    (row,) = [row for row in rows(run.folder / "metrics.csv") if row["train/epe"]]
    assert float(row["train/epe"]) > 0


def test_a_run_is_resumed(moved: Fitted) -> None:
    again = fit("--ckpt_path", moved.last, *SHORT, "--trainer.max_epochs", "2", "--test_after_fit", "false")
    assert [row["step"] for row in rows(again.folder / "metrics.csv") if row["train/loss"]] == ["2", "3"]
    assert torch.load(again.last, weights_only=True)["global_step"] == 4


def test_a_stage_starts_from_the_weights_of_another(moved: Fitted) -> None:
    still = ("--model.lr", "0", "--model.freeze_batch_norm", "true", "--model.model_args.padding", "bottom")
    again = fit(*TYPED, *SHORT, *still, "--model.weights_from", moved.last, "--test_after_fit", "false")
    assert same(weights(again.last), weights(moved.last))
    assert torch.load(again.last, weights_only=True)["hyper_parameters"]["weights_from"] is None
    config = yaml.safe_load((again.folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["weights_from"] == moved.last, "the configuration is the run's"


def test_weights_of_a_checkpoint_come_before_those_of_a_stage(
    moved: Fitted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.chdir(tmp_path), caplog.at_level("INFO"):
        main("test", "--ckpt_path", moved.best, "--model.weights_from", moved.best)
    assert f"has no effect here: all weights are those of {moved.best}" in caplog.text
    assert "as given, in place of" not in caplog.text


def test_its_weights_are_published(moved: Fitted, weights_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = str(ROOT / "examples" / "publish_weights.py")
    monkeypatch.setattr(sys, "argv", [example, moved.best])
    runpy.run_path(example, run_name="__main__")
    (record,) = zoo.list_weights()
    (tested,) = [row for row in rows(moved.folder / "metrics.csv") if row["test/epe"]]
    assert (record.name, record.recipe) == (
        "deq_flow_nano.synthetic",
        "make weights CONFIG=configs/deq_flow_nano_synthetic_video.yaml ARGS='--model.weights_from CHECKPOINT', one of "
        "configs/deq_flow_nano_synthetic.yaml",
    )
    assert record.metrics["test_epe"] == pytest.approx(float(tested["test/epe"]))
    assert record.metrics["test_epe_zero"] == pytest.approx(float(tested["test/epe_zero"]))


MISTYPED = {
    "--model.losess 3": "unknown argument 'model.losess' of OpticalFlow. Did you mean 'losses'?",
    "--model.losses 0": "losses takes an integer >= 1; given: 0",
    "--model.model mdeq_nano": "'mdeq_nano' is no model of optical flow; these are: deq_flow, deq_flow_base, ",
    "--model.schedule one_cycl": "'model.schedule' takes",
    "--model.weights_from nowhere.ckpt": "weights_from takes a file; there is none at nowhere.ckpt",
    "--data.hight 3": "unknown argument 'data.hight' of SyntheticFlowDataModule. Did you mean 'height'?",
}


@pytest.mark.parametrize("mistake", MISTYPED)
def test_what_is_mistyped(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--trainer.num_sanity_val_steps", "0", "--trainer.logger", "false")
    assert MISTYPED[mistake] in refused(capsys, "fit", *TYPED, *SHORT, *few, *mistake.split())

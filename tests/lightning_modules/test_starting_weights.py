"""Stages of training go on from each other: weights_from takes checkpoints of runs, our files and the originals'."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import zoo
from lightning_modules import OpticalFlow, SemanticSegmenter
from lightning_modules.checkpoints import CheckpointError
from tests.command_line import same
from tests.lightning_modules.flows import SMALL, pairs, small
from tests.lightning_modules.runs import train
from zoo import WeightsError
from zoo.originals.flow import original_names


def state(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def other(**arguments: Any) -> OpticalFlow:
    """Of other random weights than ``small()``."""
    torch.manual_seed(1)
    return OpticalFlow(model_args=SMALL, **arguments)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    """The weights of a run, and the folder where they are in a checkpoint, and in a file of ours."""
    folder, module = tmp_path_factory.mktemp("stage"), small(lr=0.01)
    run = train(module, loader=DataLoader(pairs(2), batch_size=2), limit_val_batches=0)
    run.save_checkpoint(folder / "things.ckpt", weights_only=False)
    zoo.save_weights(module.model, folder / "things.safetensors")
    return state(module), folder


@pytest.mark.parametrize("name", ["things.ckpt", "things.safetensors"])
def test_a_stage_starts_where_the_one_before_ended(stage: Any, name: str, tmp_path: Path) -> None:
    """With a new optimizer; and its checkpoints need the file no more."""
    weights, folder = stage
    module = other(weights_from=str(folder / name), lr=0.0, freeze_batch_norm=True)
    assert same(state(module), dict(weights))
    assert not same(state(other()), dict(weights))
    module.model.deq.on_failure = "ignore"
    run = train(module, loader=DataLoader(pairs(2), batch_size=2), limit_val_batches=0)
    assert {int(values["step"]) for values in run.optimizers[0].state.values()} == {1}
    run.save_checkpoint(tmp_path / "next.ckpt", weights_only=False)
    again = OpticalFlow.load_from_checkpoint(tmp_path / "next.ckpt", weights_only=True)
    assert again.hparams["weights_from"] is None
    assert same(state(again), dict(weights))


@pytest.mark.parametrize("version", [1, 2])
def test_an_original_checkpoint(stage: Any, version: int, tmp_path: Path) -> None:
    """The model says what no shape does: 18 channels are two levels of 9, or 18 of 1."""
    model = zoo.create_model("deq_flow", **{**SMALL, "corr_levels": 2})
    theirs = {name: x for key, x in model.state_dict().items() for name in original_names(key, version=version)}
    torch.save({f"module.{name}": value for name, value in theirs.items()}, tmp_path / "theirs.pth")
    options: dict[str, Any] = {"model": "deq_flow", "weights_from": str(tmp_path / "theirs.pth")}
    module = OpticalFlow(model_args={**SMALL, "corr_levels": 2}, **options)
    assert same(state(module), {name: value.clone() for name, value in model.state_dict().items()})
    with pytest.raises((WeightsError, ValueError), match="hidden"):
        OpticalFlow(model_args={**SMALL, "corr_levels": 2, "hidden": 8}, **options)


def test_weights_of_another_model_are_listed(stage: Any) -> None:
    _, folder = stage
    wider = {**SMALL, "hidden": 8, "gma": True}
    with pytest.raises(CheckpointError) as error:
        OpticalFlow(model_args=wider, weights_from=str(folder / "things.ckpt"))
    message = str(error.value)
    assert "things.ckpt are of another model than the one asked for: in it 4 keys are missing: 'attention.to" in message
    assert "keys have another shape or kind: " in message
    assert "is float32 (6,) and should be float32 (8,)" in message
    assert "more. Ask for the model, and the model_args" in message
    assert message.count(" and should be ") == 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights_from takes a file; there is none at nowhere\.ckpt"):
        other(weights_from="nowhere.ckpt")
    for name in ("text.ckpt", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises((CheckpointError, WeightsError), match=f"{name} is damaged, or not a"):
            other(weights_from=str(tmp_path / name))
    torch.save({"some": torch.zeros(3)}, tmp_path / "some.pth")
    with pytest.raises(WeightsError, match="is of no family that load_original knows"):
        other(weights_from=str(tmp_path / "some.pth"))


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
@pytest.mark.parametrize("start", ["pretrained", "weights_from", "backbone"])
def test_nothing_is_executed(start: str, suffix: str, zipped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / f"mine{suffix}", tmp_path / "executed"
    content = {"state_dict": {"a": torch.zeros(2)}, "more": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    task = partial(SemanticSegmenter, model="mdeq_nano_scenes", num_classes=4) if start == "backbone" else other
    with pytest.raises((CheckpointError, WeightsError), match=r"could run code.*It asks for posix\.mkdir"):
        task(**{start: str(path)})
    assert not marker.exists()


@pytest.mark.parametrize("form", ["folder", "file:"])
def test_any_source(stage: Any, form: str, tmp_path: Path) -> None:
    weights, folder = stage
    (tmp_path / "model.safetensors").write_bytes((folder / "things.safetensors").read_bytes())
    source = str(tmp_path) if form == "folder" else f"file:{folder}/things.ckpt"
    for start in ("weights_from", "pretrained"):
        assert same(state(other(**{start: source})), dict(weights))


def test_paths_and_suffixes_are_the_users(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, folder = stage
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.bin").write_bytes((folder / "things.ckpt").read_bytes())
    assert same(state(other(weights_from="~/a.bin")), dict(weights))


@pytest.mark.parametrize("name", ["things.ckpt", "things.safetensors"])
def test_what_no_shape_tells_is_compared(stage: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    weights, folder = stage
    other(weights_from=str(folder / name))
    assert not caplog.messages
    module = OpticalFlow(model_args={**SMALL, "all_grad": False, "solver": "Anderson"}, weights_from=str(folder / name))
    assert same(state(module), dict(weights))
    (message,) = caplog.messages
    assert message == (
        f"the weights in {folder / name} fit, but were trained with other arguments: all_grad=True, and now False"
    )


@pytest.mark.parametrize("beside", [{"pretrained": "deq_flow_nano.x"}, {"backbone": "deq_flow_nano.x"}])
def test_one_start_is_enough(beside: dict[str, str]) -> None:
    with pytest.raises(
        ValueError, match="weights_from has all weights: give it without pretrained and backbone; given"
    ):
        other(weights_from="some.ckpt", **beside)

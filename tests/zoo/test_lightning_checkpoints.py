"""Checkpoints of runs are sources of weights: the model as it is tested, averaged where its weights were."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from lightning_modules import ImageClassifier, LanguageModel
from tests.command_line import DIGITS, QUIET, ROOT, TINY, Fitted, fit, main, metrics, same, weights

EMA = ("-c", str(ROOT / "configs" / "ema.yaml"), "--trainer.callbacks.decay", "0.5")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A run with averaged weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("averaged"))
        return fit("-c", DIGITS, *TINY, *EMA, "--test_after_fit", "false")


def model_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in state.items()}


def raw(path: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["current_model_state"]
    return state


# ----------------------------------------------------------------------------------------------------------- of any run


@pytest.mark.parametrize("form", ["path", "file:", "file://", "run", "folder"])
def test_a_run_is_loaded(fitted: Fitted, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its best checkpoint, in one line, as it is tested."""
    monkeypatch.chdir(fitted.folder.parent)
    source = {
        "path": fitted.best,
        "file:": f"file:{fitted.folder.name}/checkpoints/best.ckpt",
        "file://": Path(fitted.best).as_uri(),
        "run": fitted.folder,
        "folder": f"{fitted.folder.name}/checkpoints",
    }[form]
    loaded = zoo.load_pretrained(source)
    module = ImageClassifier.load_from_checkpoint(fitted.best, weights_only=True, map_location="cpu").eval()
    assert same(dict(loaded.state_dict()), model_of(weights(fitted.best)))
    assert zoo.spec_of(loaded) == zoo.spec_of(module.model)
    x = torch.rand(3, 1, 8, 8)
    assert same(loaded(x), module.model(x))
    assert not loaded.training


def test_the_model_has_its_own_memory(fitted: Fitted) -> None:
    """And no random number is drawn for it."""
    state = torch.get_rng_state()
    first, second = (zoo.load_pretrained(fitted.best) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        first.classifier.weight.zero_()
    assert second.classifier.weight.any()
    assert all(p.requires_grad and p.device.type == "cpu" for p in first.parameters())


def test_overrides(fitted: Fitted) -> None:
    with pytest.warns(zoo.ReinitializedWarning, match=r"best\.ckpt was trained for 10 classes, and 4 were asked for"):
        loaded = zoo.load_pretrained(fitted.best, num_classes=4, solver="Broyden")
    assert loaded(torch.rand(2, 64)).shape == (2, 4)


def test_a_checkpoint_without_its_model(fitted: Fitted, tmp_path: Path) -> None:
    """Of a run before checkpoints said which model they hold, or of another project."""
    content = torch.load(fitted.best, weights_only=True)
    del content["deq_zoo_model"]
    torch.save(content, tmp_path / "before.ckpt")
    with pytest.raises(
        zoo.WeightsError, match=r"before\.ckpt is of a run before .*like ImageClassifier\.load_from_check"
    ):
        zoo.load_pretrained(tmp_path / "before.ckpt")
    del content["deq_zoo_classes"]
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(zoo.WeightsError, match=r"other\.ckpt is no checkpoint of this zoo: .*zoo\.load_original"):
        zoo.load_pretrained(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"deq_zoo_model": {"model": "os.system", "arguments": {}}}, "names a model 'os.system' that cannot be made"),
        ({"deq_zoo_model": {"model": 3, "arguments": {}}}, "its 'deq_zoo_model' names no model and arguments"),
        ({"deq_zoo_model": {"model": "tanh_deq", "arguments": {"width": 10**9}}}, "another shape"),
        ({"deq_zoo_model": {"model": "tanh_deq", "arguments": {"width": 10**30}}}, "that cannot be made"),
        ({"state_dict": [1]}, "its 'state_dict' is no mapping of names to tensors"),
        ({"state_dict": {"model.a": 3}}, "its 'state_dict' is no mapping of names to tensors"),
        ({"state_dict": {}}, "keys are missing"),
    ],
)
def test_what_a_stranger_wrote(fitted: Fitted, change: dict[str, Any], told: str, tmp_path: Path) -> None:
    torch.save({**torch.load(fitted.best, weights_only=True), **change}, tmp_path / "mine.ckpt")
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_pretrained(tmp_path / "mine.ckpt")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_of_another_package_is_not_imported(fitted: Fitted, tmp_path: Path) -> None:
    content = torch.load(fitted.best, weights_only=True)
    for kind in ("solver", "gradient"):
        arguments = {**content["deq_zoo_model"]["arguments"], kind: {"class_path": "os.system", "init_args": {}}}
        torch.save({**content, "deq_zoo_model": {"model": "tanh_deq", "arguments": arguments}}, tmp_path / "mine.ckpt")
        with pytest.raises(zoo.WeightsError, match=f"unknown {kind} 'os.system'"):
            zoo.load_pretrained(tmp_path / "mine.ckpt")


def test_a_language_model_remembers_as_in_validation() -> None:
    module = LanguageModel(model="deq_transformer_nano", model_args={"memory_length": 3}, eval_memory_length=7)
    assert zoo.spec_of(module.model).arguments["memory_length"] == 3
    assert module.inference_spec().arguments["memory_length"] == 7
    module = LanguageModel(model="deq_transformer_nano", model_args={"memory_length": 3})
    assert module.inference_spec() == zoo.spec_of(module.model)


# ----------------------------------------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize("file", ["best", "last"])
def test_averaged_weights_are_taken_and_that_is_said(
    averaged: Fitted, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = getattr(averaged, file)
    taken, left = model_of(weights(path)), model_of(raw(path))
    assert not same(taken, left)
    with caplog.at_level(logging.WARNING, logger="zoo"):
        loaded = zoo.load_pretrained(path)
    assert same(dict(loaded.state_dict()), taken)
    assert caplog.messages == [
        f"{path} has averaged weights, and they are taken; averaged=False takes those of the last step"
    ]
    caplog.clear()
    assert same(dict(zoo.load_pretrained(path, averaged=False).state_dict()), left)
    assert caplog.messages == []


def test_weights_that_are_not_averaged_are_taken_in_silence(fitted: Fitted, caplog: pytest.LogCaptureFixture) -> None:
    for choice in (True, False):
        loaded = zoo.load_pretrained(fitted.best, averaged=choice)
        assert same(dict(loaded.state_dict()), model_of(weights(fitted.best)))
    assert caplog.messages == []


def test_averaged_weights_are_tested(averaged: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, from the checkpoint alone; and a run can start from them."""
    monkeypatch.chdir(tmp_path)
    tested = main("test", "--ckpt_path", averaged.best, *QUIET)
    model = zoo.load_pretrained(averaged.best)
    assert same(dict(tested.model.model.state_dict()), dict(model.state_dict()))
    data = tested.datamodule
    hits = [model(image).argmax(dim=1) == label for image, label in data.test_dataloader()]
    assert metrics(tested)["test/accuracy"] == pytest.approx(torch.cat(hits).double().mean().item())
    for start in ("pretrained", "weights_from"):
        module = ImageClassifier(model="tanh_deq", num_classes=10, **_arguments(start, averaged.best))
        assert same(dict(module.model.state_dict()), dict(model.state_dict()))


def test_the_test_that_ends_a_fit_is_of_the_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``test --ckpt_path`` of the same file is: Lightning's callback would put the raw weights back."""
    monkeypatch.chdir(tmp_path)
    fitted = fit("-c", DIGITS, *TINY, *EMA)
    at_the_end = metrics(fitted.cli)["test/loss"]
    assert same(dict(fitted.cli.model.state_dict()), weights(fitted.best))
    assert at_the_end == metrics(main("test", "--ckpt_path", fitted.best, *QUIET))["test/loss"]


def _arguments(start: str, path: str) -> dict[str, Any]:
    made_of = dict(zoo.spec_of(zoo.load_pretrained(path)).arguments)
    sizes = {key: made_of[key] for key in ("in_features", "width", "contraction", "mean", "std")}
    return {start: path, "model_args": sizes}


GOES_ON = "the checkpoint has averaged weights, and training goes on from them; give the callback that averages"


def test_training_that_goes_on_without_averages_says_so(
    averaged: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    limits = ("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1")
    limits += ("--trainer.log_every_n_steps", "1")
    main("fit", "--ckpt_path", averaged.last, *QUIET, *limits, "--test_after_fit", "false")
    assert caplog.text.count(GOES_ON) == 1


def test_training_goes_on_from_both(
    averaged: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One more step: the raw weights are those that are trained, the averages go on being counted."""
    monkeypatch.chdir(tmp_path)
    limits = ("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1")
    limits += ("--trainer.log_every_n_steps", "1")
    again = main("fit", "--ckpt_path", averaged.last, *QUIET, *limits, *EMA, "--test_after_fit", "false")
    assert GOES_ON not in caplog.text
    callback = again.trainer.checkpoint_callback
    assert callback is not None
    path = str(Path(callback.best_model_path).with_name("last.ckpt"))
    before, trained, after = weights(averaged.last), raw(path), weights(path)
    for key, value in after.items():
        torch.testing.assert_close(value, torch.lerp(before[key], trained[key], 0.5))
    assert int(torch.load(path, weights_only=True)["averaging_state"]["n_averaged"]) == 3

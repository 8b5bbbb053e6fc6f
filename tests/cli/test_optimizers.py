"""The optimizer and its schedule from the command line, at the start of a run and when it is resumed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import cli
from commands.training import ZooCLI
from tests.command_line import DIGITS, QUIET, RESUME, TINY, Fitted, fit, main, refused, rows
from tests.lightning_modules.runs import Rates

SGD = ("--model.optimizer", "SGD", "--model.optimizer_args", "{momentum: 0.9, nesterov: true}")


def test_an_optimizer_of_the_recipe() -> None:
    run = fit("-c", DIGITS, *TINY, *SGD, "--model.min_lr", "1e-6", "--test_after_fit", "false")
    (optimizer,) = run.cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)
    again = main("validate", "--ckpt_path", run.best, *QUIET)
    assert (again.model.optimizer, again.model.optimizer_args) == ("SGD", {"momentum": 0.9, "nesterov": True})


def test_lightnings_own_option_wins() -> None:
    typed = ("--optimizer", "Adam", "--optimizer.lr", "0.003", "--test_after_fit", "false")
    with pytest.warns(UserWarning, match="configure_optimizers` will be overridden"):
        run = fit("-c", DIGITS, *TINY, *SGD, *typed)
    (optimizer,) = run.cli.trainer.optimizers
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 0.003
    assert not run.cli.trainer.lr_scheduler_configs


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--model.optimizer AdmW", "unknown optimizer 'AdmW'. Did you mean 'AdamW'?"),
        ("--model.optimizer SGD --model.optimizer_args.momentun 0.9", "SGD has no argument 'momentun'. Did you mean"),
        (
            "--model.pretrain_step 3",
            "unknown argument 'model.pretrain_step' of ImageClassifier. Did you mean 'pretrain",
        ),
        ("--model.jacobian_pretrain_weight=-1", "jacobian_growth and jacobian_pretrain_weight take numbers >= 0"),
        ("--model.min_lr 1", "min_lr takes a number from 0 to lr; given: 1.0 and 0.01"),
    ],
)
def test_mistakes(typed: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "fit", "-c", DIGITS, "--trainer.fast_dev_run", "1", *typed.split())


def test_a_resumed_run_keeps_its_optimizer(fitted: Fitted, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit", "--ckpt_path", fitted.last, *RESUME, "--trainer.max_epochs", "4", *SGD)
    assert message == (
        f"fit --ckpt_path goes on with the optimizer state of {fitted.last}, which is one of AdamW, not of SGD. "
        "To train with another optimizer, start a fit without --ckpt_path"
    )
    main("validate", "--ckpt_path", fitted.last, *QUIET, *SGD)  # where there is nothing to optimize


def test_the_optimizers_arguments_are_the_checkpoints_too(fitted: Fitted) -> None:
    with pytest.warns(UserWarning, match=r"model.optimizer_args={'amsgrad': True} has NO effect here: fit --ckpt_path"):
        fit(
            *("--ckpt_path", fitted.last, *RESUME, "--trainer.max_epochs", "4", "--test_after_fit", "false"),
            *("--model.optimizer_args", "{amsgrad: true}"),
        )


def test_a_resumed_run_that_is_longer_does_not_climb(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default recipe's schedule, over three epochs of two batches, then over six."""
    seen = Rates()
    make = ZooCLI.before_fit
    monkeypatch.setattr(ZooCLI, "before_fit", lambda self: (self.trainer.callbacks.append(seen), make(self)))
    fit("--ckpt_path", fitted.last, *RESUME, "--trainer.max_epochs", "6", "--test_after_fit", "false")
    assert len(seen.rates) == 6
    assert all(a > b > 0 for a, b in itertools.pairwise(seen.rates))
    assert seen.rates[0] == pytest.approx(0.005)


def test_an_unrolled_start_is_in_the_log() -> None:
    run = fit("-c", DIGITS, *TINY, "--model.pretrain_steps", "1", "--model.pretrain_depth", "3")
    train = [row for row in rows(run.folder / "metrics.csv") if row["train/loss"]]
    assert [(float(row["train/unrolled"]), float(row["train/steps"]) == 3) for row in train] == [(1, True), (0, False)]


def test_every_argument_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, own in (("ImageClassifier", "label_smoothing"), ("SemanticSegmenter", "class_weights")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["fit", "--model.help", name])
        assert exit_.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for key in (own, "num_classes", "pretrain_steps", "jacobian_growth_interval", "optimizer_args", "min_lr"):
            assert f"--model.{key} {key.upper()}" in text
        assert "--model.options" not in text
        assert "random vectors of the estimate" in text


def test_a_segmenter_is_configured(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "model:\n  class_path: SemanticSegmenter\n  init_args:\n    model: mdeq_segmenter\n    num_classes: 3\n"
        "    class_weights: [1.0, 0.5, 2]\n    model_args: {channels: [8], in_channels: 1}\n    lr: 0.2\n"
        "    optimizer: SGD\n    optimizer_args: {momentum: 0.9}\n"
    )
    message = refused(
        capsys, "fit", "-c", "mine.yaml", "--data", "DigitsDataModule", "--trainer.fast_dev_run", "1", *QUIET
    )
    assert message.startswith("the data have 10 classes, and the model was asked for 3")

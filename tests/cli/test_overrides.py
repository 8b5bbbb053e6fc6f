"""What is typed beats the checkpoint and the configuration, and is said where it replaces a checkpoint's value."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier
from tests.command_line import DIGITS, QUIET, RESUME, ROOT, TINY, Fitted, fit, main, refused, rows, said
from zoo.implicit import (
    GMRES,
    Anderson,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    Gradient,
    ImplicitGradient,
    Newton,
    PhantomGradient,
    Solver,
    UnrolledGradient,
)

PRESETS: dict[str, tuple[Solver, Gradient]] = {
    "broyden_gmres": (Broyden(tol=1e-4), ImplicitGradient(GMRES(tol=1e-4))),
    "anderson_implicit": (Anderson(tol=1e-4), ImplicitGradient(Anderson(tol=1e-4))),
    "jacobian_free": (Anderson(tol=1e-4), PhantomGradient(steps=1, damping=1.0)),
    "mixed_precision": (Anderson(tol=1e-4, compact=True, bfloat16_until=5e-3), ImplicitGradient(Anderson(tol=1e-4))),
    "newton_implicit": (Newton(tol=1e-4), ImplicitGradient(Newton(tol=1e-4))),
    "newton_unrolled": (Newton(tol=1e-4), UnrolledGradient()),
    "plain_unrolled": (FixedPointIteration(tol=1e-4), UnrolledGradient()),
}


def replaced(messages: list[str]) -> list[str]:
    return [message for message in messages if " as given, in place of " in message]


def test_another_class_has_nothing_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the default, nor of the configuration, though arguments have the same names."""
    monkeypatch.chdir(tmp_path)
    typed = (
        "--model.solver",
        "Broyden",
        "--model.gradient.solver",
        "Broyden",
        "--model.gradient.solver.max_steps",
        "9",
    )
    model = fit("-c", DIGITS, *TINY, *typed).cli.model.model
    assert model.deq.solver == Broyden()
    assert model.deq.gradient == ImplicitGradient(Broyden(max_steps=9))


# ---------------------------------------------------------------------------------------------- over a checkpoint's


def test_a_typed_solver_option_beats_the_checkpoints(fitted: Fitted) -> None:
    with said() as messages, pytest.warns(ConvergenceWarning, match="max_steps=7.* did not converge for every sample"):
        done = main("test", "--ckpt_path", fitted.best, "--model.solver.max_steps", "7", *QUIET)
    assert replaced(messages) == [f"model.solver.max_steps: 7 as given, in place of 50 in {fitted.best}"]
    assert done.model.model.deq.solver == Anderson(tol=1e-4, max_steps=7)
    assert done.trainer.callback_metrics["test/steps"] == 7
    assert done.trainer.callback_metrics["test/converged"] < 1


def test_a_typed_batch_size_beats_the_checkpoints(fitted: Fitted) -> None:
    with said() as messages:
        done = main("validate", f"--ckpt_path={fitted.best}", "--data.batch_size=50", *QUIET)
    assert replaced(messages) == [f"data.batch_size: 50 as given, in place of 64 in {fitted.best}"]
    assert done.datamodule.batch_size == 50
    assert done.trainer.num_val_batches == [4]


@pytest.mark.parametrize("same", [[], ["-c", DIGITS, "--model.model_args.width", "8"], ["--data.batch_size", "64"]])
def test_nothing_is_said_where_nothing_differs(fitted: Fitted, same: list[str]) -> None:
    with said() as messages:
        main("validate", "--ckpt_path", fitted.best, *same, *QUIET)
    assert not replaced(messages)


def test_another_class_is_said_whole(fitted: Fitted) -> None:
    """Its arguments are its own: none of the checkpoint's class are left."""
    with said() as messages:
        done = main("validate", "--ckpt_path", fitted.best, "--model.gradient", "PhantomGradient", *QUIET)
    assert done.model.model.deq.gradient == PhantomGradient()
    anderson = repr(Anderson(tol=0.0001))
    assert replaced(messages) == [
        "model.gradient: PhantomGradient(steps=1, damping=1.0, advance=False) as given, in place of "
        f"ImplicitGradient(solver={anderson}) in {fitted.best}"
    ]


def test_a_configuration_beats_the_checkpoint(fitted: Fitted) -> None:
    with said() as messages:
        done = main(
            *("validate", "--ckpt_path", fitted.best, "-c", str(ROOT / "configs/solvers/newton_unrolled.yaml")), *QUIET
        )
    assert [message.partition(":")[0] for message in replaced(messages)] == ["model.gradient", "model.solver"]
    assert (done.model.model.deq.solver, done.model.model.deq.gradient) == (Newton(tol=1e-4), UnrolledGradient())
    assert done.config["validate"].model.init_args.model_args == {
        "in_features": 64,
        "width": 8,
        "contraction": 0.9,
        "mean": 0.305,
        "std": 0.376,
    }


def test_an_argument_that_the_checkpoint_leaves_to_the_default_is_said(tmp_path: Path) -> None:
    module = ImageClassifier(model_args={"width": 8})
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, datamodule=DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "script.ckpt", weights_only=False)
    with said() as messages:
        done = main(
            *("test", "--ckpt_path", "script.ckpt", "--model.solver", "Newton"),
            *("--model.model_args.std", "0.5", *QUIET),
        )
    assert replaced(messages) == [
        "model.model_args.std: 0.5 as given, in place of None in script.ckpt",
        f"model.solver: {Newton()} as given, in place of None in script.ckpt",
    ]
    assert (done.model.model.std, done.model.model.deq.solver) == (0.5, Newton())


def test_the_last_checkpoint_typed_is_the_one_that_is_used(fitted: Fitted, tmp_path: Path) -> None:
    """Both forms of the option, and a configuration after them that names a third."""
    other = fit("-c", DIGITS, *TINY, "--model.model_args.width", "5", "--test_after_fit", "false")
    (tmp_path / "third.yaml").write_text("ckpt_path: nowhere.ckpt\n")
    done = main("validate", f"--ckpt_path={fitted.best}", "--ckpt_path", other.best, "-c", "third.yaml", *QUIET)
    assert done.model.model.classifier.in_features == 5
    assert done.trainer.ckpt_path == other.best
    done = main("validate", "--ckpt_path", other.best, f"--ckpt_path={fitted.best}", *QUIET)
    assert done.model.model.classifier.in_features == 8


def test_a_checkpoint_that_a_configuration_names_is_checked_too(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The saved configuration of a resumed run is such a one."""
    (tmp_path / "resume.yaml").write_text(f"ckpt_path: {fitted.best}\n")
    message = refused(capsys, "test", "-c", DIGITS, "-c", "resume.yaml", *QUIET)
    assert message.startswith(f"{fitted.best} is a checkpoint of another model than the one asked for")
    with said() as messages:
        done = main(
            "validate", "-c", DIGITS, "-c", "resume.yaml", "--model.model_args.width", "8", "--model.lr=0.5", *QUIET
        )
    assert replaced(messages) == [f"model.lr: 0.5 as given, in place of 0.01 in {fitted.best}"]
    assert done.trainer.ckpt_path == fitted.best


@pytest.mark.parametrize(("key", "value", "was"), [("lr", 0.5, 0.01), ("weight_decay", 0.2, 0.01)])
def test_on_resuming_the_optimizer_is_the_checkpoints_and_that_is_said(
    fitted: Fitted, key: str, value: float, was: float
) -> None:
    arguments = ("--ckpt_path", fitted.last, *RESUME, "--trainer.max_epochs", "4", "--test_after_fit", "false")
    expected = (
        rf"model\.{key}={value} has NO effect here: fit --ckpt_path goes on with the optimizer state of .*last.ckpt"
    )
    with said() as messages, pytest.warns(UserWarning, match=expected):
        changed = fit(*arguments, f"--model.{key}", str(value))
    assert replaced(messages) == [f"model.{key}: {value} as given, in place of {was} in {fitted.last}"]
    (group,) = torch.load(changed.last, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["weight_decay"]) == (0.01, 0.01)


def test_what_has_an_effect_on_resuming_is_not_warned_of(fitted: Fitted) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = fit(
            *("--ckpt_path", fitted.last, *RESUME, "--trainer.max_epochs", "4", "--test_after_fit", "false"),
            *("--model.jacobian_weight", "0.5"),
        )
    assert [float(row["train/jacobian"]) > 0 for row in rows(resumed.folder / "metrics.csv") if row["train/loss"]] == [
        True,
        True,
    ]


# ------------------------------------------------------------------------------------------ over a configuration's


def test_every_preset_of_a_solver_is_tested() -> None:
    assert set(PRESETS) == {path.stem for path in (ROOT / "configs" / "solvers").glob("*.yaml")}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_top_of_a_recipe(preset: str) -> None:
    run = fit("-c", DIGITS, "-c", str(ROOT / "configs" / "solvers" / f"{preset}.yaml"), *TINY)
    deq = run.cli.model.model.deq
    assert (deq.solver, deq.gradient) == PRESETS[preset]
    assert deq.cell.linear.in_features == 8
    train = [row for row in rows(run.folder / "metrics.csv") if row["train/loss"]]
    assert len(train) == 2
    assert all(row["train/converged"] == "1.0" for row in train)
    assert all(("train/adjoint_steps" in row) == isinstance(deq.gradient, ImplicitGradient) for row in train)


def test_the_readmes_typed_choices() -> None:
    run = fit("-c", DIGITS, *TINY, "--model.solver", "Newton", "--model.lr", "3e-3", "--test_after_fit", "false")
    assert run.cli.model.model.deq.solver == Newton()
    assert run.cli.model.lr == 3e-3
    (optimizer,) = run.cli.trainer.optimizers
    assert optimizer.param_groups[0]["initial_lr"] == 3e-3

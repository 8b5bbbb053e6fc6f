"""A language model on a folder of text, from the command line: fit, test, predict, go on, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from tests.command_line import QUIET, Fitted, fit, main, metrics, refused, rows, said

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 12
SHORT = (
    *QUIET,
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"),
)


def typed(root: Path) -> list[str]:
    """The smallest model that there can be, nearly, and a folder with one file."""
    model = {
        "model": "deq_transformer", "model_args.d_model": 8, "model_args.num_heads": 2, "model_args.d_inner": 8,
        "model_args.memory_length": 12, "eval_memory_length": 20, "solver": "Anderson", "solver.tol": 0.5,
        "gradient": "PhantomGradient", "warmup_steps": 1, "max_steps_jitter": "[-2, 0]", "jacobian_weight": 0.1,
    }  # fmt: skip
    data = {"root": root, "val_fraction": 0.2, "test_fraction": 0.2, "batch_size": 3, "segment_length": 32}
    return [
        *("--model", "LanguageModel", *(f"--model.{name}={value}" for name, value in model.items())),
        *("--data", "TextFolderDataModule", *(f"--data.{name}={value}" for name, value in data.items())),
        *("--data.eval_batch_size", "4"),
    ]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    (root / "hamlet.txt").write_text(TEXT)
    return root


@pytest.fixture(scope="session")
def read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A run of two steps. Nobody writes there."""
    with contextlib.chdir(tmp_path_factory.mktemp("read")):
        return fit(*typed(folder), *SHORT)


def test_the_figures_of_text(read: Fitted) -> None:
    table = rows(read.folder / "metrics.csv")
    for stage in ("val", "test"):
        (row,) = [row for row in table if row[f"{stage}/loss"]]
        assert 0 < float(row[f"{stage}/bits_per_byte"]) < 9
        assert float(row[f"{stage}/bits_per_byte"]) == pytest.approx(float(row[f"{stage}/loss"]) / 0.693147, rel=1e-4)
        assert 1 < float(row[f"{stage}/perplexity"]) < 500
        assert row[f"{stage}/converged"] == "1.0"
    steps = [row for row in table if row["train/loss"]]
    assert [row["step"] for row in steps] == ["0", "1"]
    assert all(float(row["train/jacobian"]) > 0 for row in steps)
    assert "test/bits_per_byte" in read.output


def test_a_checkpoint_is_all_that_a_test_needs(read: Fitted) -> None:
    again = main("test", "--ckpt_path", read.best, *QUIET)
    (row,) = [row for row in rows(read.folder / "metrics.csv") if row["test/loss"]]
    assert metrics(again) == {name: float(row[name]) for name in row if name.startswith("test/")}
    assert (again.model.model.memory_length, again.model.eval_memory_length) == (12, 20)
    assert again.model.max_steps_jitter == [-2, 0]


def test_another_memory_is_typed(read: Fitted) -> None:
    found = [
        metrics(main("validate", "--ckpt_path", read.best, *QUIET, "--model.eval_memory_length", length))["val/loss"]
        for length in ("0", "20")
    ]
    assert found[0] != found[1]


def test_predictions_are_the_rows_of_the_test_text(read: Fitted, tmp_path: Path) -> None:
    main("predict", "--ckpt_path", read.best, *QUIET)
    (file,) = tmp_path.rglob("predictions.csv")
    table = rows(file)
    assert list(table[0]) == ["index", "tokens", "log_prob", "bits_per_byte"]
    assert [row["index"] for row in table] == [str(i) for i in range(len(table))]
    tokens = sum(int(row["tokens"]) for row in table)
    (measured,) = [row for row in rows(read.folder / "metrics.csv") if row["test/loss"]]
    nats = -sum(float(row["log_prob"]) for row in table)
    assert nats / tokens == pytest.approx(float(measured["test/loss"]), rel=1e-5)


def test_a_run_is_resumed_with_its_memory(read: Fitted) -> None:
    assert len(torch.load(read.last, weights_only=True)["deq_zoo_memory"]) == 2
    with said() as messages:
        again = fit("--ckpt_path", read.last, *SHORT, "--trainer.max_epochs", "2", "--test_after_fit", "false")
    assert not any("without memory" in message for message in messages)
    assert [row["step"] for row in rows(again.folder / "metrics.csv") if row["train/loss"]] == ["2", "3"]
    with said() as messages:
        fit("--ckpt_path", read.last, *SHORT, "--trainer.max_epochs", "2", "--data.batch_size", "2")
    assert any(
        "the checkpoint's is of batches of 3 rows a process, and now they have 2" in message for message in messages
    )


def test_a_run_is_resumed_within_an_epoch(folder: Path) -> None:
    """The same weights as those of a run that did not stop: it goes on in the text where it was."""

    unprobed = ("--model.jacobian_weight", "0")  # a resumed run draws other probes

    def run(steps: int, *more: str) -> Path:
        length = (
            "--trainer.max_steps",
            str(steps),
            "--trainer.val_check_interval",
            "3",
            "--trainer.log_every_n_steps",
            "1",
        )
        return Path(fit(*typed(folder), *QUIET, *length, "--model.schedule", "constant", *unprobed, *more).last)

    whole = torch.load(run(6), weights_only=True)
    resumed = torch.load(run(6, "--ckpt_path", str(run(3))), weights_only=True)
    assert (whole["global_step"], resumed["global_step"]) == (6, 6)
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())


TYPED = {
    "--model.vocab_siz 3": "unknown argument 'model.vocab_siz' of LanguageModel. Did you mean 'vocab_size'?",
    "--model.eval_memory 3": (
        "unknown argument 'model.eval_memory' of LanguageModel. Did you mean 'eval_memory_length'?"
    ),
    "--data.segment_lenght 3": (
        "unknown argument 'data.segment_lenght' of TextFolderDataModule. Did you mean 'segment_length'?"
    ),
    "--model LanguageModl": "unknown class 'LanguageModl' for 'model'. Did you mean 'LanguageModel'?",
    "--model.model deq_transformr": "unknown model 'deq_transformr'. Did you mean 'deq_transformer'?",
    "--model.model_args.d_modl 8": "model 'deq_transformer' has no argument 'd_modl'. Did you mean 'd_model'?",
    "--model.model mdeq_tiny": "'mdeq_tiny' is no language model; these are: deq_lm_wt103, deq_transformer, ",
    "--model.model_args.norm sub": "norm='sub' takes unrolled=..., like 12",
    "--model.model_args.vocab_size 8": "vocab_size is an argument of its own, beside model_args",
    "--model.eval_memory_length=-1": "eval_memory_length takes an integer >= 0, or None; given: -1",
    "--model.max_steps_jitter=[0,-2]": "two integers [low, high] with low <= high; given: [0, -2]",
    "--model.max_steps_jitter=few": "'model.max_steps_jitter' takes a value of type int or list; given: 'few'",
    "--model.warmup_steps=-1": "warmup_steps takes an integer >= 0; given: -1",
    "--model.vocab_size 300": (
        "the data have vocab_size=256, and the model was asked for 300: give it vocab_size=256 (--model.vocab_size 256)"
    ),
}


@pytest.mark.parametrize("mistake", TYPED)
def test_what_is_mistyped(mistake: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TYPED[mistake] in refused(capsys, "fit", *typed(folder), *SHORT, *mistake.split())

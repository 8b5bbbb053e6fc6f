"""Runs of which steps are skipped: counted, told of, agreed upon by all processes, and ended where it persists."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import TensorDataset

from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier, InterruptCheckpoint, SkippedSteps, TrainingError, WholeModelSharded
from lightning_modules.trouble import Trouble
from tests.command_line import DIGITS, TINY, refused, said, same
from tests.lightning_modules import joint
from tests.lightning_modules.poison import INF, NAN, Watch, digits, fit, loader, told_once
from tests.lightning_modules.runs import Steps, small, trainer
from tests.lightning_modules.test_processes import Data
from tests.lightning_modules.test_processes import module as in_processes
from tests.lightning_modules.test_processes import trainer as of_processes
from tests.lightning_modules.test_sharding import under_torchrun
from zoo.implicit import FixedPointIteration

pytestmark = [
    pytest.mark.filterwarnings("ignore::zoo.implicit.report.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
]

# ---------------------------------------------------------------------------------------------------- where it persists


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """And leave a checkpoint that knows of them."""
    with told_once(), pytest.raises(TrainingError) as error:
        fit(
            small(), loader(digits(), {0, 2, 3, 4, 5}), InterruptCheckpoint(), SkippedSteps(max_consecutive=3),
            default_root_dir=tmp_path,
        )  # fmt: skip
    assert str(error.value) == (
        "training was stopped: steps 2 to 4, as many in a row as max_consecutive=3 allows, had no finite gradient and "
        "were skipped, 4 in all. In the last of them batch[0], float32 of shape (4, 1, 8, 8), has NaN or infinity; "
        "the solve of 1 of 4 samples met NaN or infinity. Look at the data: at the samples of this batch, and at what "
        "reads, normalises and augments them. A model cannot learn from NaN"
    )
    (path,) = tmp_path.rglob("interrupted.ckpt")
    kept = torch.load(path, weights_only=True)
    assert kept["global_step"] == 5
    assert kept["callbacks"]["SkippedSteps"] == {"skipped": 4, "in_a_row": 3}
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_many_that_are_not_in_a_row_do_not() -> None:
    callback = SkippedSteps(max_consecutive=3)
    with told_once():
        fit(small(), loader(digits(), {1, 2, 4, 5}), callback, max_epochs=2)
    assert (callback.skipped, callback.in_a_row) == (8, 2)


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    data = loader(digits(), {1, 4, 5})
    with told_once():
        fit(small(), data).save_checkpoint(tmp_path / "run.ckpt")
    module, callback = small(), SkippedSteps(max_consecutive=4)
    bad = loader(digits(), {0, 1})
    with told_once(), pytest.raises(TrainingError, match=r"steps 4 to 7, as many.* 5 in all"):
        fit(module, bad, callback, max_epochs=2, ckpt_path=tmp_path / "run.ckpt")
    assert (callback.skipped, callback.in_a_row) == (5, 4)


def test_the_command_line_ends_with_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = ImageClassifier.training_step
    monkeypatch.setattr(ImageClassifier, "training_step", lambda *args: step(*args) * (NAN if args[2] else 1))
    few = ("--trainer.limit_train_batches", "14", "--trainer.callbacks+=lightning_modules.SkippedSteps")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="training step 1 was skipped")
        told = refused(capsys, "fit", "-c", DIGITS, *TINY, *few, "--trainer.callbacks.max_consecutive", "12")
    assert told == (
        "training was stopped: steps 1 to 12, as many in a row as max_consecutive=12 allows, had no finite gradient "
        "and were skipped, 12 in all. In the last of them the loss is NaN. Try a smaller learning rate than 0.01 "
        "(--model.lr), a warm-up (--model.warmup_steps 100), clipped gradients (--trainer.gradient_clip_val 1.0)"
    )
    assert list(Path.cwd().rglob("interrupted.ckpt"))


def test_how_many_there_were_is_said_at_the_end() -> None:
    with said() as messages, told_once():
        fit(small(), loader(digits(), {1, 3}))
    assert "2 of 6 training steps were skipped: not finite" in messages
    with said() as messages:
        fit(small(), loader(digits(), set()))
    assert not any("skipped" in message for message in messages)


ARGUMENTS = {"lr": 0.1, "schedule": "cosine", "model": "tanh_deq", "model_args": {}}


@pytest.mark.parametrize(
    ("trouble", "arguments", "clipped", "precision", "expected"),
    [
        (Trouble(loss="infinite"), ARGUMENTS, True, "bf16-mixed", ["--trainer.precision 32-true", "--model.lr"]),
        (
            Trouble(loss="NaN"),
            {**ARGUMENTS, "warmup_steps": 5},
            False,
            "32-true",
            ["--model.lr", "gradient_clip_val 1"],
        ),
        (
            Trouble(samples=4, failed=(0, 4), too_many=True),
            ARGUMENTS,
            True,
            "32-true",
            [
                *("Of the solves: the solve moved away", "--model.jacobian_weight", "--model.pretrain_steps"),
                "--model.model_args.contraction 0.9",
            ],
        ),
        (
            Trouble(samples=4, failed=(1, 0), gradients=("a.weight", "b.weight")),
            {**ARGUMENTS, "jacobian_weight": 1.0, "pretrain_steps": 7, "model_args": {"contraction": 0.9}},
            True,
            "32-true",
            ["Of the solves: f returned NaN or infinity", "--model.lr"],
        ),
    ],
)
def test_advice(trouble: Trouble, arguments: Any, clipped: bool, precision: str, expected: list[str]) -> None:
    told = trouble.advice(arguments, clipped, precision)
    assert all(text in told for text in expected), told
    knobs = ("precision", "clip_val", "warmup_steps", "jacobian_weight", "pretrain_steps", "contraction")
    named = [knob for knob in knobs if knob in told]
    assert all(any(knob in text for text in (*expected, "--model.warmup_steps")) for knob in named), named


def test_what_is_told_of_gradients() -> None:
    assert Trouble(gradients=("a.weight", "b.weight")).told() == (
        "the gradient of a.weight, and 1 more, has NaN or infinity"
    )
    assert Trouble(loss="NaN", gradients=("a.weight",)).told() == "the loss is NaN"


# ------------------------------------------------------------------------------------------------------- solves diverge


def expanding() -> ImageClassifier:
    """Its solves move away: the slopes of tanh near 0 are 1, and its weights are large."""
    module = small(model_args={"width": 6}, solver=FixedPointIteration(max_steps=4))
    with torch.no_grad():
        module.model.deq.cell.linear.weight.copy_(3 * torch.eye(6))
        module.model.injection.weight.mul_(1e-3)
        module.model.injection.bias.mul_(1e-3)
    return module


def test_a_solve_that_diverges_is_logged_and_skipped_only_where_that_is_asked_for() -> None:
    steps, watch = Steps(), Watch()
    fit(expanding(), loader(digits(), set()), watch, logger=steps)
    assert steps.logged[0]["train/diverged"] == 1
    assert steps.logged[-1]["train/skipped"] == 0
    module, watch = expanding(), Watch()
    with told_once() as told:
        fit(module, loader(digits(), set()), SkippedSteps(max_diverged=0.5), watch)
    assert "the solve of 4 of 4 samples diverged" in told[0]
    assert same(watch.states[0], watch.states[-1])


def test_what_is_unrolled_does_not_diverge() -> None:
    steps = Steps()
    module = expanding()
    module.pretrain_steps, module.pretrain_depth = 100, 4
    fit(module, loader(digits(), set()), SkippedSteps(max_diverged=0.0), logger=steps)
    assert all("train/diverged" not in logged for logged in steps.logged)
    assert steps.logged[-1]["train/skipped"] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"max_consecutive": 0}, "an integer >= 1; given: 0"), ({"max_diverged": 1.5}, r"in \[0, 1\]; given: 1.5")],
)
def test_arguments(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SkippedSteps(**arguments)


# ------------------------------------------------------------------------------------------------------------ processes


STEP = 2


class Poisoned(Data):
    """Of this batch one sample that process 1 sees, of two, has NaN; or the batch is not there, for either."""

    def __init__(self, *, there: bool, nan: bool) -> None:
        super().__init__(5 * 16)
        images, labels = self.samples.tensors
        if nan:
            images[16 * STEP + 5] = NAN
        keep = torch.arange(len(images)) // 16 != STEP
        self.samples = TensorDataset(images[keep | there], labels[keep | there])


class Keep(pl.Callback):
    """Each process writes what it ends with to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        (counts,) = [each for each in trainer.callbacks if isinstance(each, SkippedSteps)]  # type: ignore[attr-defined]
        weights = {name: joint.whole(value) for name, value in module.state_dict().items()}
        torch.save((weights, counts.state_dict()), self.folder / f"{trainer.global_rank}.pt")


def two_processes(folder: Path, *, there: bool, kind: str, strategy: str) -> list[Any]:
    """The weights and the counts of each, where one of them has a bad batch of this kind; or neither has it."""
    folder.mkdir(parents=True)
    module, data = in_processes(), Poisoned(there=there, nan=there and kind == "inputs")
    step = module.training_step

    def infinite(*args: Any) -> Any:
        """Its gradient is that of the loss, and finite."""
        mine = module.trainer.global_rank == 1 and module.trainer.global_step == STEP
        return step(*args) + (INF if mine else 0)

    if there and kind == "loss":
        module.training_step = infinite  # type: ignore[method-assign]
    if strategy == "ddp":
        of_processes(2, Keep(folder)).fit(module, datamodule=data)
    else:
        under_torchrun(lambda: of_processes(2, Keep(folder), strategy=WholeModelSharded()).fit(module, datamodule=data))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.filterwarnings("ignore:training step 2 was skipped:UserWarning")
@pytest.mark.parametrize("kind", ["inputs", "loss"])
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_one_process_of_two_has_a_bad_batch(strategy: str, kind: str, tmp_path: Path) -> None:
    """Both skip the step, count it, stay equal, and are as if there had been no such step."""
    first, second = two_processes(tmp_path / "bad", there=True, kind=kind, strategy=strategy)
    assert same(first, second)
    assert first[1] == {"skipped": 1, "in_a_row": 0}
    without, _ = two_processes(tmp_path / "without", there=False, kind=kind, strategy=strategy)
    assert same(first[0], without[0])
    assert without[1] == {"skipped": 0, "in_a_row": 0}


def test_it_is_told_which_process_has_it(tmp_path: Path) -> None:
    """Both end: none waits for the other."""

    def ended() -> None:
        data = Poisoned(there=True, nan=True)
        with pytest.raises(TrainingError) as error:
            of_processes(2, SkippedSteps(1), strategy="ddp").fit(in_processes(), datamodule=data)
        Path(tmp_path, f"{os.environ['RANK']}.txt").write_text(str(error.value))

    under_torchrun(ended)
    told = [Path(tmp_path, f"{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert "stopped: step 2, as many in a row" in told[0]
    assert "In the last of them on process 1, batch[0], float32 of shape (8, 1, 8, 8), has NaN or infinity" in told[0]


# --------------------------------------------------------------------------------------------------------- a whole run


class Poison(pl.Callback):
    """A number of the batches of these steps is replaced, before anyone looks at them."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step in self.values:
            batch[0][3, 0, 4, 4] = self.values[trainer.global_step]


def after_200_steps(seed: int, values: dict[int, float]) -> tuple[int, float]:
    """How many steps a small run of the default recipe skips, and its loss on samples that it has not seen."""
    pl.seed_everything(seed, verbose=False)
    model_args = {"width": 32, "contraction": 0.9, "mean": 0.305, "std": 0.376}
    module = ImageClassifier(model_args=model_args, lr=1e-2, weight_decay=1e-2, label_smoothing=0.1)
    skipped = SkippedSteps()
    once = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": None, "val_check_interval": 200}
    run = trainer(Poison(values), skipped, max_epochs=-1, max_steps=200, **once)
    run.fit(module, datamodule=DigitsDataModule(batch_size=64, max_shift=0.75))
    return skipped.skipped, run.callback_metrics["val/loss"].item()


@pytest.mark.filterwarnings("ignore:training step 61 was skipped:UserWarning")
def test_one_percent_of_the_batches_is_poisoned() -> None:
    """That changes the final loss by less than another seed does: of five the standard deviation was 0.012."""
    (none, clean), (two, poisoned) = (after_200_steps(0, values) for values in ({}, {61: NAN, 140: INF}))
    assert (none, two) == (0, 2)
    assert clean < 1, "it learns"
    assert poisoned == pytest.approx(clean, abs=5e-3)

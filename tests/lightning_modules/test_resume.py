"""A run that stops and goes on from a checkpoint, in a process with another seed, ends bit for bit where it would have.

Everything random is on: the order of the samples, what they are augmented by, dropout, the steps that have the Jacobian
penalty, its probes. So is all that a step remembers: momentum, averages of the weights, the schedule, a text's memory.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

from datamodules import DigitScenesDataModule, DigitsDataModule, SyntheticFlowDataModule
from lightning_modules import EquilibriumModule, ImageClassifier, InterruptCheckpoint, SemanticSegmenter
from tests.command_line import same
from tests.datamodules.loading import two_workers
from tests.lightning_modules import flows, texts
from zoo.implicit import Anderson, FixedPointIteration

# From Python 3.12 a fork of a process with threads is warned of; Lightning's ddp_fork is such a fork.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),  # true: each run has its own folder
]

EPOCH, EPOCHS = 4, 3
"""Batches of an epoch, and epochs."""

Made = tuple[EquilibriumModule, pl.LightningDataModule]


def ignoring(module: EquilibriumModule) -> EquilibriumModule:
    """Untrained models of a few steps do not converge, and need not."""
    for deq in module.equilibria().values():
        deq.on_failure = "ignore"
    return module


def tanh(num_workers: int = 0, batch_size: int = 10) -> Made:
    data = DigitsDataModule(batch_size=batch_size, num_workers=num_workers)
    penalty = {"jacobian_weight": 0.5, "jacobian_frequency": 0.6, "max_steps_jitter": 2}
    return ImageClassifier(model_args={"width": 8, "contraction": 0.9}, lr=0.01, **penalty), data


def transformer(num_workers: int = 0, batch_size: int = 4) -> Made:
    sizes = {"dropout": 0.2, "memory_length": 6}
    return ignoring(texts.small(sizes=sizes, jacobian_weight=0.1)), texts.texts(batch_size=batch_size)


def mdeq(num_workers: int = 0, batch_size: int = 4) -> Made:
    data = DigitsDataModule(batch_size=batch_size, num_workers=num_workers)
    sizes = {"channels": (8, 8), "head_widths": (2, 2), "final_width": 8, "expansion": 1, "dropout": 0.3}
    solver = Anderson(tol=1e-3, max_steps=6)
    module = ImageClassifier("mdeq_nano", model_args=sizes, jacobian_weight=0.5, solver=solver, pretrain_steps=2)
    return ignoring(module), data


def segmenter(num_workers: int = 0, batch_size: int = 4) -> Made:
    data = DigitScenesDataModule(
        batch_size=batch_size, num_workers=num_workers, scene_size=18, max_digits=3, train_size=16, val_size=4
    )
    sizes = {"channels": (8, 8), "expansion": 1}
    solver = FixedPointIteration(tol=1e-3, max_steps=5)
    return ignoring(SemanticSegmenter("mdeq_nano_scenes", 11, sizes, solver=solver)), data


def flow(num_workers: int = 0, batch_size: int = 2) -> Made:
    data = SyntheticFlowDataModule(
        batch_size=batch_size, num_workers=num_workers, height=16, width=24, train_size=8, val_size=2, test_size=1
    )
    return flows.small(schedule="one_cycle"), data


class Save(ModelCheckpoint):
    """Saves all there is, where it says; several of them may be in a run."""

    def __init__(self, folder: Path, name: str, **when: Any) -> None:
        super().__init__(folder, f"{name}-{{step}}", save_top_k=-1, auto_insert_metric_name=False, **when)
        self.name = name

    @property
    def state_key(self) -> str:
        return self.name


def run(make: Callable[..., Made], folder: Path, start: Path | None = None, **arguments: Any) -> None:
    """Three epochs, from their start or from a checkpoint, with checkpoints wherever one can be.

    ``step-*`` are written after training steps, ``val-*`` after validations, ``end-*`` at the end of epochs.
    """
    names = ("num_workers", "batch_size")
    module, data = make(**{name: arguments.pop(name) for name in names if name in arguments})
    averages, given = EMAWeightAveraging(decay=0.9), arguments.pop("callbacks", [])
    callbacks = [
        *([*given, averages] if arguments.pop("averages_last", False) else [averages, *given]),
        Save(folder, "step", every_n_train_steps=1),
        Save(folder, "val", save_on_train_epoch_end=False),
        Save(folder, "end", save_on_train_epoch_end=True),
    ]
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    few = {"limit_train_batches": EPOCH, "limit_val_batches": 1, "max_epochs": EPOCHS, "devices": 1}
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, **{**quiet, **few, **arguments})
    trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True if start else None)


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - the global one is the point


KEPT = (
    *("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"),
    *("deq_zoo_memory", "deq_zoo_run_seed", "epoch", "global_step"),
)


def final(folder: Path) -> dict[str, Any]:
    """What a run ended with."""
    (path,) = [path for path in folder.glob("end-*.ckpt") if torch.load(path, weights_only=True)["epoch"] == EPOCHS - 1]
    content = torch.load(path, weights_only=True)
    found = {key: content[key] for key in KEPT if key in content}
    progress = content["loops"]["fit_loop"]
    return {**found, **{key: progress[key] for key in ("epoch_progress", "epoch_loop.batch_progress")}}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The keys of what is not the same, bit by bit."""
    assert list(a) == list(b)
    return [key for key in a if not same(a[key], b[key])]


def check(make: Callable[..., Made], folder: Path, starts: list[str], **arguments: Any) -> None:
    """Runs that go on from these checkpoints of a run end as it does."""
    seed(1)
    run(make, folder / "whole", **arguments)
    whole = final(folder / "whole")
    assert {"current_model_state", "averaging_state", "deq_zoo_run_seed"} < set(whole)
    for n, start in enumerate(starts):
        seed(2 + n)
        run(make, folder / f"from_{start}", folder / "whole" / f"{start}.ckpt", **arguments)
        assert differing(whole, final(folder / f"from_{start}")) == [], f"after {start}"


STARTS = ["step-2", "step-4", "val-4", "end-4", "step-7"]
"""Within the first epoch; at its end, after its last step, its validation, and all of it; and within the second."""


@pytest.mark.parametrize(
    ("make", "starts"),
    [
        (tanh, STARTS),
        (transformer, STARTS),
        (mdeq, ["end-4", "step-7"]),
        (segmenter, ["val-4", "step-7"]),
        (flow, ["step-4", "val-4"]),
    ],
)
def test_every_family_goes_on_exactly(make: Callable[..., Made], starts: list[str], tmp_path: Path) -> None:
    check(make, tmp_path, starts)


@pytest.mark.parametrize("num_workers", [pytest.param(2, marks=two_workers)])
def test_worker_processes_change_nothing(num_workers: int, tmp_path: Path) -> None:
    check(tanh, tmp_path, ["end-4", "step-7"], num_workers=num_workers)
    seed(1)
    run(tanh, tmp_path / "alone")
    assert differing(final(tmp_path / "whole"), final(tmp_path / "alone")) == []


@pytest.mark.parametrize(("make", "starts"), [(tanh, STARTS), (transformer, ["end-4"])])
def test_a_run_whose_length_is_a_number_of_steps_goes_on_exactly(
    make: Callable[..., Made], starts: list[str], tmp_path: Path
) -> None:
    check(make, tmp_path, starts, max_steps=EPOCHS * EPOCH, max_epochs=-1)


def test_steps_of_several_batches(tmp_path: Path) -> None:
    """Six steps in all: within an epoch, at its end, and within the second."""
    check(tanh, tmp_path, ["step-1", "step-2", "val-2", "end-2", "step-3"], accumulate_grad_batches=2)


def test_validation_within_epochs(tmp_path: Path) -> None:
    check(transformer, tmp_path, ["val-2", "end-4"], val_check_interval=2)


def test_a_run_that_is_stopped_again_and_again(tmp_path: Path) -> None:
    """Each time after another step, and that of the end of an epoch among them."""
    seed(1)
    run(tanh, tmp_path / "0")
    whole = final(tmp_path / "0")
    for n, step in enumerate((3, 4, 6, 8, 11), start=1):
        seed(1 + n)
        run(tanh, tmp_path / str(n), tmp_path / str(n - 1) / f"step-{step}.ckpt")
        assert differing(whole, final(tmp_path / str(n))) == [], f"after {step}"


class Fail(pl.Callback):
    """An error in the middle of a step, when its batch was given but nothing was made of it."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("in the middle of a step")


@pytest.mark.parametrize("make", [tanh, transformer])
def test_a_step_that_failed_is_made_with_the_same_batch(make: Callable[..., Made], tmp_path: Path) -> None:
    seed(1)
    run(make, tmp_path / "whole")
    seed(1)
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        run(make, tmp_path / "failed", callbacks=[Fail(), InterruptCheckpoint()], default_root_dir=tmp_path)
    seed(2)
    run(make, tmp_path / "resumed", tmp_path / "checkpoints" / "interrupted.ckpt")
    assert differing(final(tmp_path / "whole"), final(tmp_path / "resumed")) == []


@pytest.mark.parametrize(
    ("make", "batch_size", "starts"), [(tanh, 5, ["step-4", "end-4", "step-7"]), (transformer, 2, ["step-7"])]
)
def test_two_processes_go_on_exactly(
    make: Callable[..., Made], batch_size: int, starts: list[str], tmp_path: Path
) -> None:
    check(make, tmp_path, starts, devices=2, strategy="ddp_fork", batch_size=batch_size)


@pytest.mark.parametrize(("make", "before", "now", "unit"), [(tanh, 10, 8, "samples"), (transformer, 4, 2, "streams")])
@pytest.mark.parametrize(("start", "is_told"), [("step-2", True), ("end-4", False)])
def test_batches_of_another_size_within_an_epoch(
    make: Callable[..., Made], before: int, now: int, unit: str, start: str, is_told: bool, tmp_path: Path
) -> None:
    """What is left of it cannot be the same; the next epoch is a whole one."""
    run(make, tmp_path / "first", batch_size=before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(make, tmp_path / "second", tmp_path / "first" / f"{start}.ckpt", batch_size=now)
    told = [str(each.message) for each in caught if "within an epoch" in str(each.message)]
    expected = (
        f"training goes on within an epoch, after 2 batches that had {before} {unit}, of all processes together, and "
        f"have {now} now: of this epoch some is seen twice, or not at all. To go on exactly, let batch_size times the "
        f"number of processes be {before}"
    )
    assert told == ([expected] if is_told else [])


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    """So that the tests above can fail."""
    for number in (1, 2):
        seed(number)
        run(tanh, tmp_path / str(number))
    found = differing(final(tmp_path / "1"), final(tmp_path / "2"))
    assert {"state_dict", "optimizer_states", "current_model_state", "deq_zoo_run_seed"} <= set(found)

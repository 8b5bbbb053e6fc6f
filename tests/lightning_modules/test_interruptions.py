"""Wherever a run fails or is interrupted, it goes on from ``interrupted.ckpt`` as if it had not."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EarlyStopping, EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier, InterruptCheckpoint
from tests.lightning_modules.test_resume import Made, differing, final, mdeq, run, seed, segmenter, tanh, transformer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning")  # true: each its own folder


class FailAt(Callback):
    """Fails the n-th time that a hook is called.

    Args:
        hook: its name.
        n: from 1 on.
    """

    def __init__(self, hook: str, n: int) -> None:
        self._left = n
        setattr(self, hook, self._called)

    def _called(self, trainer: pl.Trainer, *args: Any) -> None:
        self._left -= not trainer.sanity_checking
        if self._left == 0:
            raise RuntimeError("something is wrong here")


def check(
    hook: str, n: int, folder: Path, *, make: Callable[..., Made] = tanh, is_first: bool = False, **arguments: Any
) -> None:
    """It ends bit for bit as a run that did not fail there.

    Args:
        is_first: fail before :class:`InterruptCheckpoint` has its turn in this hook.
    """
    seed(1)
    run(make, folder / "whole", **arguments)
    callbacks = [InterruptCheckpoint(), FailAt(hook, n)]
    seed(1)
    with pytest.raises(RuntimeError, match="something is wrong here"):
        run(
            make,
            folder / "failed",
            callbacks=callbacks[::-1] if is_first else callbacks,
            default_root_dir=folder,
            **arguments,
        )
    seed(2)
    run(make, folder / "resumed", folder / "checkpoints" / "interrupted.ckpt", **arguments)
    assert differing(final(folder / "whole"), final(folder / "resumed")) == []
    saved = {path.name for part in ("failed", "resumed") for path in (folder / part).glob("[ev]*.ckpt")}
    assert saved == {path.name for path in (folder / "whole").glob("[ev]*.ckpt")}


IN_STEPS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_zero_grad"]
IN_VALIDATION = [
    *("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start"),
    *("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"),
]


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("hook", [*IN_STEPS, "on_train_batch_end"])
def test_within_a_step(hook: str, n: int, tmp_path: Path) -> None:
    """Within an epoch, at its last step, and at the first of the next one."""
    check(hook, n, tmp_path)


@pytest.mark.parametrize(
    ("make", "hook", "n"),
    [
        (transformer, "on_before_backward", 5),
        (transformer, "on_before_zero_grad", 3),
        (mdeq, "on_after_backward", 5),
        (segmenter, "on_after_backward", 4),
    ],
)
def test_what_a_step_leaves_behind_is_undone(make: Callable[..., Made], hook: str, n: int, tmp_path: Path) -> None:
    """The memory of a text, and running statistics: they are those of before the step, which is made again."""
    check(hook, n, tmp_path, make=make)


def test_the_memory_of_several_batches_is_undone(tmp_path: Path) -> None:
    check("on_train_batch_end", 5, tmp_path, make=transformer, accumulate_grad_batches=2)


@pytest.mark.parametrize("hook", IN_VALIDATION)
def test_within_validation(hook: str, tmp_path: Path) -> None:
    """While the averages of the weights are in their place, for most of it."""
    check(hook, 1, tmp_path)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
@pytest.mark.parametrize("length", [{}, {"max_steps": 12, "max_epochs": -1}])
def test_between_epochs(hook: str, length: dict[str, int], tmp_path: Path) -> None:
    check(hook, 2, tmp_path, **length)


@pytest.mark.parametrize("validation", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
def test_without_a_validation(validation: dict[str, int], tmp_path: Path) -> None:
    check("on_train_batch_end", 3, tmp_path, **validation)


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_what_counts_validations_counts_each_once(hook: str, tmp_path: Path) -> None:
    """It has had its turn when another callback fails, and has another one."""

    def stopping() -> EarlyStopping:
        return EarlyStopping("val/loss", mode="max", patience=9, check_on_train_epoch_end=hook == "on_train_epoch_end")

    whole, resumed = stopping(), stopping()
    callbacks = [InterruptCheckpoint(), stopping(), FailAt(hook, 2)]
    seed(1)
    run(tanh, tmp_path / "whole", callbacks=[whole])
    seed(1)
    with pytest.raises(RuntimeError, match="something is wrong here"):
        run(tanh, tmp_path / "failed", callbacks=callbacks, default_root_dir=tmp_path)
    run(tanh, tmp_path / "resumed", tmp_path / "checkpoints" / "interrupted.ckpt", callbacks=[resumed])
    assert resumed.wait_count == whole.wait_count > 0


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize(
    ("hook", "n"), [("on_train_batch_end", 5), ("on_train_batch_end", 8), ("on_after_backward", 8)]
)
def test_within_a_step_of_several_batches(hook: str, n: int, is_first: bool, tmp_path: Path) -> None:
    """Of none of its batches the gradients are kept."""
    check(hook, n, tmp_path, is_first=is_first, accumulate_grad_batches=2)


@pytest.mark.parametrize(
    ("hook", "n"), [("on_validation_batch_end", 1), ("on_validation_end", 2), ("on_before_backward", 3)]
)
def test_with_validations_within_epochs(hook: str, n: int, tmp_path: Path) -> None:
    check(hook, n, tmp_path, val_check_interval=2)


@pytest.mark.parametrize(("every", "n"), [((3, 2), 3), ((2, 3), 2)])
def test_validation_within_a_step_of_several_batches(every: tuple[int, int], n: int, tmp_path: Path) -> None:
    """It comes again by itself, as the batches before it do."""
    accumulated, validated = every
    arguments = {"accumulate_grad_batches": accumulated, "val_check_interval": validated}
    check("on_validation_end", n, tmp_path, **arguments)


@pytest.mark.parametrize("order", ["fail first", "fail in the middle"])
def test_averages_that_have_not_had_their_turn(order: str, tmp_path: Path) -> None:
    """They are of the step that the checkpoint is of."""
    fail, keep = FailAt("on_train_batch_end", 6), InterruptCheckpoint()
    callbacks = [fail, keep] if order == "fail first" else [keep, fail]
    seed(1)
    run(tanh, tmp_path / "whole", averages_last=True)
    seed(1)
    with pytest.raises(RuntimeError, match="something is wrong here"):
        run(tanh, tmp_path / "failed", callbacks=callbacks, default_root_dir=tmp_path, averages_last=True)
    seed(2)
    run(tanh, tmp_path / "resumed", tmp_path / "checkpoints" / "interrupted.ckpt", averages_last=True)
    assert differing(final(tmp_path / "whole"), final(tmp_path / "resumed")) == []


def test_averages_that_are_half_made_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their checkpoint would be of no step."""
    update = AveragedModel.update_parameters

    def half(self: AveragedModel, model: nn.Module) -> None:
        update(self, model)
        if int(self.n_averaged) == 5:
            raise RuntimeError("something is wrong here")

    monkeypatch.setattr(AveragedModel, "update_parameters", half)
    told = pytest.warns(UserWarning, match="It was within an update of the parameters, which is not saved by half")
    with told, pytest.raises(RuntimeError, match="something is wrong here"):
        run(tanh, tmp_path / "failed", callbacks=[InterruptCheckpoint()], default_root_dir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_what_fails_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    """The checkpoint that the run goes on from has all there is."""
    run(tanh, tmp_path / "first")
    callbacks = [InterruptCheckpoint(), FailAt("on_train_start", 1)]
    with pytest.raises(RuntimeError, match="something is wrong here"):
        run(
            tanh,
            tmp_path / "second",
            tmp_path / "first" / "step-2.ckpt",
            callbacks=callbacks,
            default_root_dir=tmp_path,
        )
    assert not (tmp_path / "checkpoints").exists()


def test_what_fails_after_the_last_step_leaves_nothing(tmp_path: Path) -> None:
    """The averages are in the place of the weights by then; they are no weights to go on from."""
    callbacks = [FailAt("on_train_end", 1), InterruptCheckpoint()]
    with pytest.raises(RuntimeError, match="something is wrong here"):
        run(tanh, tmp_path / "failed", callbacks=callbacks, default_root_dir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_two_of_them(tmp_path: Path) -> None:
    """As from the command line, which has one of its own; the first one acts."""
    callbacks = [InterruptCheckpoint(), InterruptCheckpoint()]
    seed(1)
    run(tanh, tmp_path / "whole", callbacks=callbacks, default_root_dir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    seed(1)
    with pytest.raises(RuntimeError, match="something is wrong here"):
        run(
            tanh,
            tmp_path / "failed",
            callbacks=[*callbacks, FailAt("on_validation_batch_end", 2)],
            default_root_dir=tmp_path,
        )
    run(tanh, tmp_path / "resumed", tmp_path / "checkpoints" / "interrupted.ckpt")
    assert differing(final(tmp_path / "whole"), final(tmp_path / "resumed")) == []


class FailAfterwards(ImageClassifier):
    """Its own code after an update fails."""

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        if self.trainer.global_step == 5:
            raise RuntimeError("something is wrong here")


def test_an_update_that_was_not_counted_is_not_saved(tmp_path: Path) -> None:
    def make() -> Made:
        return FailAfterwards(model_args={"width": 8}), DigitsDataModule(batch_size=10)

    told = pytest.warns(UserWarning, match="It was within an update of the parameters, which is not saved by half")
    with told, pytest.raises(RuntimeError, match="something is wrong here"):
        run(make, tmp_path / "run", callbacks=[InterruptCheckpoint()], default_root_dir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


class ControlC(Callback):
    """Ctrl-C at so many calls of a function from the beginning of training on; -1 only counts them."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def on_train_start(self, *args: Any) -> None:
        sys.setprofile(self._count)

    def on_exception(self, *args: Any) -> None:
        sys.setprofile(None)

    def on_train_end(self, *args: Any) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.calls += event in ("call", "c_return")
        if self.calls == self.at:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def _control_c() -> Iterator[None]:
    """Lightning leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_control_c")
@pytest.mark.parametrize(("make", "accumulated"), [(tanh, 1), (tanh, 3), (transformer, 1)])
def test_control_c_at_random_moments(make: Callable[..., Made], accumulated: int, tmp_path: Path) -> None:
    counting = ControlC(-1)
    seed(1)
    run(make, tmp_path / "whole", callbacks=[counting], accumulate_grad_batches=accumulated)
    rng = random.Random(0)
    for n in range(5):
        folder = tmp_path / str(n)
        at = rng.randrange(counting.calls // 3, counting.calls)  # by then a step was made
        signal.signal(signal.SIGINT, signal.default_int_handler)
        seed(1)
        with pytest.raises(SystemExit):
            run(
                make,
                folder / "failed",
                callbacks=[InterruptCheckpoint(), ControlC(at)],
                default_root_dir=folder,
                accumulate_grad_batches=accumulated,
            )
        seed(2)
        start = folder / "checkpoints" / "interrupted.ckpt"
        run(make, folder / "resumed", start, accumulate_grad_batches=accumulated)
        assert differing(final(tmp_path / "whole"), final(folder / "resumed")) == [], at


def test_averages_that_are_used_again(tmp_path: Path) -> None:
    """Nothing stays behind on a callback of the user's."""
    averages = EMAWeightAveraging(decay=0.9)
    for _ in range(2):
        module, data = tanh()
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        few = {"limit_train_batches": 1, "limit_val_batches": 1, "max_epochs": 1, "accelerator": "cpu"}
        few["enable_checkpointing"] = False
        pl.Trainer(callbacks=[InterruptCheckpoint(), averages], default_root_dir=tmp_path, **quiet, **few).fit(
            module, datamodule=data
        )
        assert not {"_swap_models", "_copy_average_to_current", "on_train_batch_end"} & vars(averages).keys()

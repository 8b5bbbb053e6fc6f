"""Wherever a run fails or is interrupted, it goes on from ``interrupted.ckpt`` as if it had not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging

from lightning_modules import InterruptCheckpoint
from tests.lightning_modules.test_resume import differing, final, run, seed, tanh

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


def check(hook: str, n: int, folder: Path, *, is_first: bool = False, **arguments: Any) -> None:
    """It ends bit for bit as a run that did not fail there.

    Args:
        is_first: fail before :class:`InterruptCheckpoint` has its turn in this hook.
    """
    seed(1)
    run(tanh, folder / "whole", **arguments)
    callbacks = [InterruptCheckpoint(), FailAt(hook, n)]
    seed(1)
    with pytest.raises(RuntimeError, match="something is wrong here"):
        run(
            tanh,
            folder / "failed",
            callbacks=callbacks[::-1] if is_first else callbacks,
            default_root_dir=folder,
            **arguments,
        )
    seed(2)
    run(tanh, folder / "resumed", folder / "checkpoints" / "interrupted.ckpt", **arguments)
    assert differing(final(folder / "whole"), final(folder / "resumed")) == []
    validated = {path.name for part in ("failed", "resumed") for path in (folder / part).glob("val-*")}
    assert validated == {path.name for path in folder.glob("whole/val-*")}


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


@pytest.mark.parametrize("hook", IN_VALIDATION)
def test_within_validation(hook: str, tmp_path: Path) -> None:
    """While the averages of the weights are in their place, for most of it."""
    check(hook, 1, tmp_path)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
@pytest.mark.parametrize("length", [{}, {"max_steps": 12, "max_epochs": -1}])
def test_between_epochs(hook: str, length: dict[str, int], tmp_path: Path) -> None:
    check(hook, 2, tmp_path, **length)


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
        assert "_swap_models" not in vars(averages)

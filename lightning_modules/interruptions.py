"""What is left when training stops before its end: a checkpoint that it can go on from exactly, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from .checkpoints import CheckpointError
from .run_folder import run_dir
from .skipped_steps import SkippedSteps
from .validate_first import begin_validation_again, validation_is_due

T = TypeVar("T", bound=Callback)


class StoppedBySignal(SystemExit):
    """Training was asked to stop; all is saved, and what there is to say was said."""


def interrupted_path(trainer: pl.Trainer) -> Path:
    """Where the checkpoint of a run that was stopped is, beside the others."""
    return run_dir(trainer) / "checkpoints" / "interrupted.ckpt"


def how_to_go_on(trainer: pl.Trainer, path: Path) -> str:
    """The commands that do, and that test what is there."""
    # The checkpoint knows the model and the data; the number of epochs, the logger and the rest are in this file.
    config = run_dir(trainer) / "config.yaml"
    is_there = config.is_file()
    return (
        f"To go on:    python cli.py fit {f'-c {config} ' if is_there else ''}--ckpt_path {path}\n"
        + ("             or, in the same folder, the same command as before with --resume auto\n" if is_there else "")
        + f"To test it:  python cli.py test --ckpt_path {path}"
    )


class InterruptCheckpoint(Callback):
    """Writes a checkpoint when training is interrupted or fails, and says where it is and how to go on.

    What was done of a step that did not end does not count, nor what it made of running statistics and memory: the run
    goes on as from the end of the step before. Where validation was interrupted, or the end of an epoch, both are made
    again, from the validation's beginning.

    Of several processes one may have failed alone, so that nothing can be done together any more: the first one writes
    what it has, where that is all there is, as with ``ddp``.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._batch = 0
        self._behind = 0
        self._updating = False
        self.moving_averages = False
        self._before_validation: dict[str, Any] = {}
        self._averages: list[_Averages] = []

    @property
    def within_update(self) -> bool:
        """Whether parameters, or their averages, may be half changed."""
        return self._updating or self.moving_averages

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look where averages of weights go."""
        self._step = None
        is_first = _of_kind(trainer, InterruptCheckpoint)[0] is self
        self._averages = [_Averages(self, each) for each in _of_kind(trainer, WeightAveraging)] if is_first else []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """From here on there is something that the checkpoint which the run goes on from has not."""
        if self._step is None:
            self._step, self._batch = trainer.global_step, _processed(trainer)
            self._behind, self._updating, self.moving_averages = 0, False, False

    def on_before_optimizer_step(self, *args: Any) -> None:
        """From here on parameters may be those of one step or of the next."""
        self._updating = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count the batches whose gradients are accumulated, which no checkpoint has."""
        self._updating = False
        self._count(trainer)
        self._before_validation = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What counts validations, or epochs, counts this one again if it is made again."""
        states = {each.state_key: each.state_dict() for each in _of_kind(trainer, Callback)}
        self._before_validation = copy.deepcopy({key: state for key, state in states.items() if state})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is left to save."""
        self.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write ``interrupted.ckpt`` beside the other checkpoints, if a step was made."""
        began, averages = self._step is not None, self._averages
        within_update = (self._updating and trainer.global_step == self._step) or self.moving_averages
        self._count(trainer)  # what failed may have been another callback, before the turn of this one
        self.end()
        if trainer.state.fn != "fit" or not began or trainer.global_step == 0:
            return
        if _of_kind(trainer, InterruptCheckpoint)[0] is not self:  # the command line has one, and so has its user
            return
        if isinstance(exception, StoppedBySignal | CheckpointError):  # all is said; there is no room
            return
        name = f"Stopped at step {trainer.global_step} by {type(exception).__name__}."
        if within_update:
            rank_zero_warn(f"{name} It was within an update of the parameters, which is not saved by half")
            return
        path = interrupted_path(trainer)
        try:
            for each in averages:
                each.bring_up_to_date(trainer, pl_module)
            for step in _of_kind(trainer, SkippedSteps):
                step.undo(pl_module)
            saved = self._save(trainer, path)
        except Exception as failure:  # noqa: BLE001 - whatever it is, it must not hide what came first
            rank_zero_warn(f"{name} Its state could not be saved: {failure}")
            return
        if saved:
            rank_zero_info(f"{name} The state is saved in {path}\n{how_to_go_on(trainer, path)}")
        else:
            rank_zero_warn(
                f"{name} Its state is spread over the processes, and was not saved; go on from the last checkpoint"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count nothing that was not brought to its end."""
        if not trainer.interrupted:
            return
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        # Where no validation comes with it, Lightning would go on with a further batch, and the end is not made again.
        ends = epochs["total"]["processed"] > epochs["total"]["completed"] and validation_is_due(trainer)
        if ends or (trainer.validating and self._behind == 0):
            for count in epochs.values():
                count["processed"] = count["completed"]
            checkpoint["callbacks"].update(self._before_validation)
            begin_validation_again(checkpoint)
        else:  # a validation between the batches of one step comes again by itself
            self._begin_step_again(checkpoint)

    def _count(self, trainer: pl.Trainer) -> None:
        """Once for each batch."""
        before, self._batch = self._batch, _processed(trainer)
        if self._batch != before:
            self._behind = self._behind + 1 if trainer.global_step == self._step else 0
            self._step = trainer.global_step

    def end(self) -> None:
        """Training is over: from here on there is nothing to save."""
        self._step = None
        for each in self._averages:
            each.look_no_longer()
        self._averages = []

    def _save(self, trainer: pl.Trainer, path: Path) -> bool:
        """Without the other processes, if there are some."""
        strategy = trainer.strategy
        if isinstance(strategy, SingleDeviceStrategy):
            trainer.save_checkpoint(path, weights_only=False)
            return True
        if not isinstance(strategy, DDPStrategy):
            return False
        # Trainer.save_checkpoint would wait for the other processes.
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # noqa: SLF001
        strategy.save_checkpoint(content, path)
        return True

    def _begin_step_again(self, checkpoint: dict[str, Any]) -> None:
        """Let the count of batches be that at the end of the last step."""
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        epochs = loops["epoch_progress"]
        if epochs["total"]["ready"] > epochs["total"]["started"]:
            # The next one was about to begin: it does, and has no batches yet, where those of the one before are still.
            for count in epochs.values():
                count["ready"] = count["completed"]
            progress["current"].update(ready=0, started=0, processed=0, completed=0)
            progress["is_last_batch"] = False
            return
        if progress["total"]["processed"] == progress["total"]["ready"] and self._behind == 0:
            return  # it ended, and only hooks were left
        ended = progress["current"]["processed"] - self._behind
        before = progress["current"]["completed"] - ended
        for count in (progress["total"], progress["current"]):
            done = count["completed"] - before
            count.update(ready=done, started=done, processed=done, completed=done)
        progress["is_last_batch"] = False


class _Averages:
    """Sees when the averages of the weights change, and when they are where the weights belong, as while validating."""

    def __init__(self, keeper: InterruptCheckpoint, averaging: WeightAveraging) -> None:
        self._keeper, self._averaging, self._are_in_place = keeper, averaging, False
        swap, copy_over = averaging._swap_models, averaging._copy_average_to_current  # noqa: SLF001 - nothing else tells

        def swapped(pl_module: pl.LightningModule) -> None:
            swap(pl_module)
            self._are_in_place = not self._are_in_place

        def copied(pl_module: pl.LightningModule) -> None:
            keeper.end()
            copy_over(pl_module)

        self._watched = {
            "_swap_models": self._moving(swapped),
            "_copy_average_to_current": copied,
            "on_train_batch_end": self._moving(averaging.on_train_batch_end),
        }
        vars(averaging).update(self._watched)

    def _moving(self, change: Callable[..., None]) -> Callable[..., None]:
        """Let it be known while this changes them; what it fails in stays half changed."""

        def changing(*args: Any) -> None:
            self._keeper.moving_averages = True
            change(*args)
            self._keeper.moving_averages = False

        return changing

    def bring_up_to_date(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let weights and averages be in their places again, and the averages those of the last step."""
        if self._are_in_place:
            self._averaging._swap_models(pl_module)  # noqa: SLF001
            self._are_in_place = False
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if current.processed > current.completed:  # it knows if it has had its turn
            self._averaging.on_train_batch_end(trainer, pl_module, None, None, 0)

    def look_no_longer(self) -> None:
        """Leave the callback as it was."""
        for name in self._watched:
            vars(self._averaging).pop(name, None)


def _of_kind(trainer: pl.Trainer, kind: type[T]) -> list[T]:
    return [each for each in trainer.callbacks if isinstance(each, kind)]  # type: ignore[attr-defined]


def _processed(trainer: pl.Trainer) -> int:
    """Batches of the run whose step, or part of a step, was made."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined,no-any-return]

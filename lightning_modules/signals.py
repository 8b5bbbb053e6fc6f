"""Training that is told to stop, or to save, by a signal: at the end of the step, in all processes together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from .interruptions import InterruptCheckpoint, StoppedBySignal, how_to_go_on, interrupted_path

Handler = Callable[[int, Any], Any]
_RANKS = (0, signal.SIGUSR1, signal.SIGTERM)  # the later one counts where both came


class StopOnSignal(Callback):
    """SIGTERM saves and ends training, and SIGUSR1 saves: at the next end of a step from which it goes on exactly.

    SIGTERM ends the run with exit status 143. After SIGUSR1 training goes on; but in a job of SLURM, which sends it
    some time before the job's end, the job is put back into its queue, and the run ends with status 0. (Where the
    Trainer's SLURMEnvironment has ``auto_requeue=False``, training goes on there too.)

    Lightning's own handlers of both are replaced while training: they save, and wait for the other processes, wherever
    the program happens to be. It puts those back that were there before, when training ends. One of yours for SIGTERM
    is called too, and one for SIGUSR1 is left in its place.

    All processes stop at the same step, though only one may have got the signal. One that comes within an epoch's last
    step, or in validation, is obeyed after that: the epoch counts as done. In any case there is a checkpoint after the
    first step, for who is killed while waiting.

    Ctrl-C, too, waits while parameters are updated; the second one does not.

    Nothing of this is done where the Trainer saves no checkpoints; in a thread no signal is seen.
    """

    def __init__(self) -> None:
        self._received = 0
        self._agreed = 0
        self._step = 0
        self._written: int | None = None
        self._epoch_saved = False
        self._passed_over = False
        self._updating = False
        self._interrupted = False
        self._keepers: list[InterruptCheckpoint] = []
        self._users: dict[int, Handler] = {}

    # --- signals

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's handlers are there by now."""
        self._install(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise where nothing was checked."""
        self._install(trainer)
        self._step, self._written = trainer.global_step, None
        self._epoch_saved = self._passed_over = self._updating = self._interrupted = False

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning would take no notice of SIGTERM here; there is nothing to save."""
        _let_it_end(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise."""
        _let_it_end(trainer)

    def _install(self, trainer: pl.Trainer) -> None:
        if trainer.checkpoint_callback is None or threading.current_thread() is not threading.main_thread():
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._keepers = [each for each in callbacks if isinstance(each, InterruptCheckpoint)]
        self._users = _handlers_of_the_user(trainer)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if number == signal.SIGTERM or number not in self._users:
                signal.signal(number, self._remember)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._control_c)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, number, key=_RANKS.index)
        if number in self._users:
            self._users[number](number, frame)

    def _control_c(self, number: int, frame: FrameType | None) -> None:
        updating = self._updating or any(each.within_update for each in self._keepers)
        if not updating or self._interrupted:
            signal.default_int_handler(number, frame)
        self._interrupted = True

    # --- steps

    def on_before_optimizer_step(self, *args: Any) -> None:
        """From here on parameters may be those of one step or of the next."""
        self._updating = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save, if a signal asked for it and the step is a whole one."""
        self._updating = False
        if self._interrupted:
            raise KeyboardInterrupt
        before, self._step = self._step, trainer.global_step
        if self._agree(trainer) and self._step != before:
            trainer.save_checkpoint(interrupted_path(trainer), weights_only=False)
            self._written = self._step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """All that belongs to the step before is done, and in the log."""
        if self._written == trainer.global_step:
            self._obey(trainer, interrupted_path(trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What belongs to the step is not all done."""
        if trainer.state.fn == "fit":
            self._pass_over(trainer)
        else:
            _let_it_end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise."""
        self._pass_over(trainer)
        self._epoch_saved = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """One at the end of an epoch is as good as one of this callback."""
        self._epoch_saved = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop between epochs, where there is a checkpoint of the last one's end."""
        ended, self._epoch_saved = self._epoch_saved, False
        if self._agree(trainer) and ended and (path := trainer.strategy.broadcast(_newest(trainer))):
            self._obey(trainer, path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """There is nothing to go on with."""
        agreed = self._agree(trainer)
        self._received = 0
        if agreed == signal.SIGTERM:
            rank_zero_info(f"Stopped by SIGTERM, when training had just ended, at step {trainer.global_step}")
            raise StoppedBySignal(_status(trainer, 128 + signal.SIGTERM))

    def _pass_over(self, trainer: pl.Trainer) -> None:
        """Wait for the next step, but not for ever, where each is the last of an epoch."""
        if self._written is None:
            return
        if self._passed_over:
            self._obey(trainer, interrupted_path(trainer))
        self._passed_over, self._written = True, None

    def _agree(self, trainer: pl.Trainer) -> int:
        """The signal that one of the processes got; they wait for each other here."""
        if trainer.checkpoint_callback is None:
            return 0
        self._agreed = self._received
        if trainer.world_size > 1:
            mine = torch.tensor(_RANKS.index(self._received), device=trainer.strategy.root_device)
            self._agreed = _RANKS[int(trainer.strategy.reduce(mine, reduce_op="max"))]
        return self._agreed

    def _obey(self, trainer: pl.Trainer, path: Path) -> None:
        name = signal.Signals(self._agreed).name
        where = f"at step {trainer.global_step} by {name}. The state is saved in {path}"
        job = slurm_job(trainer)
        if self._agreed == signal.SIGUSR1 and job is None:
            rank_zero_info(f"Asked {where}. Training goes on")
            self._received = 0 if self._received == signal.SIGUSR1 else self._received
            self._written, self._passed_over = None, False
            return
        rank_zero_info(f"Stopped {where}\n{how_to_go_on(trainer, path)}")
        if self._agreed == signal.SIGUSR1 and job is not None:
            if trainer.is_global_zero:
                requeue(job)
            raise StoppedBySignal(0)
        raise StoppedBySignal(_status(trainer, 128 + self._agreed))


def _handlers_of_the_user(trainer: pl.Trainer) -> dict[int, Handler]:
    """Those that were there before Lightning's, by signal."""
    before = trainer._signal_connector._original_handlers  # noqa: SLF001 - it alone knows them by now
    return {int(number): handler for number, handler in before.items() if callable(handler)}


def _let_it_end(trainer: pl.Trainer) -> None:
    """Let SIGTERM end the run here and now."""
    users = _handlers_of_the_user(trainer)

    def end(number: int, frame: FrameType | None) -> None:
        if number in users:
            users[number](number, frame)
        raise StoppedBySignal(_status(trainer, 128 + number))

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def slurm_job(trainer: pl.Trainer) -> str | None:
    """The number of the SLURM job that this is, as ``scontrol`` takes it; None where it is none, or an interactive one.

    None too where the Trainer was told not to requeue.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, SLURMEnvironment) and not environment.auto_requeue:
        return None
    if "SLURM_JOB_ID" not in os.environ or SLURMEnvironment.job_name() in ("bash", "interactive"):
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def requeue(job: str) -> None:
    """Put a job of SLURM back into its queue, or say why that failed."""
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)  # noqa: S603 - no shell
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        rank_zero_warn(f"`{' '.join(command)}` failed, and the job ends here: {reason}")
    else:
        rank_zero_info(
            f"Job {job} is back in the queue of SLURM. It goes on from here if its command has --resume auto"
        )


def _newest(trainer: pl.Trainer) -> Path | None:
    """The file that ModelCheckpoint wrote last."""
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    paths = [Path(name) for each in callbacks for name in (each.last_model_path, each.best_model_path) if name]
    return max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime_ns, default=None)


def _status(trainer: pl.Trainer, status: int) -> int:
    """The exit status; 0 in a process that another one of Lightning started, which would kill itself otherwise."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return 0 if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0 else status

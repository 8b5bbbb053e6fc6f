"""A step of training without a finite gradient is skipped and counted; where that goes on, the run ends with advice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoo.implicit import DEQ
from zoo.implicit.report import SolverStatus
from zoo.implicit.solvers.base import is_count

from .trouble import TrainingError, Trouble, gradients_not_finite, inputs_not_finite, largest, norm

if TYPE_CHECKING:
    from .base import EquilibriumModule


@dataclass
class _Seen:
    """What one process saw of a step, of all its micro-batches; tensors, so that nothing waits for the device."""

    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    statuses: list[Tensor] = field(default_factory=list)

    def failed(self) -> Tensor | None:
        """The fraction of the samples whose solve diverged or met NaN; None where nothing was solved."""
        if not self.statuses:
            return None
        return (torch.cat(self.statuses) >= SolverStatus.DIVERGED).float().mean()


class SkippedSteps(Callback):
    """Every run of an :class:`EquilibriumModule` has it: a step whose loss or gradient is not finite is skipped.

    A skipped step leaves the weights, the optimizer's state and the model's buffers, like the running statistics of
    batch norms, as they were; the learning rate's schedule, the step's number and the run's length go on. Under
    ``accumulate_grad_batches`` all that was accumulated is skipped. Epoch figures do not take up a loss that is not
    finite. The first time it is told what was found; ``train/skipped`` in the log counts those of the run so far.

    All processes decide alike without asking each other: where a loss is not finite its gradient is made NaN, which
    the mean over processes passes on to all. With fp16 (``16-mixed``) an overflow of the scaled gradient is the
    scaler's, and no trouble as long as its scale is 1 or more; a loss, or inputs, that are not finite are, and leave
    the scale as it was.

    ``train/diverged`` in the log is the fraction of the samples of a step whose solve diverged or met NaN. By itself
    that is no reason to skip: a model that has only begun to learn may have no equilibrium yet (of DEQ flow without
    unrolled steps whole batches diverge at first), and learns all the same.

    Args:
        max_consecutive: so many skipped steps in a row end the run.
        max_diverged: skip a step too where a larger fraction of its samples diverged, on one process at least; 1 never
            does.

    Raises:
        TrainingError: too many in a row; it says what was found, since when, and what to try.
        ValueError: an argument is out of its range.
    """

    def __init__(self, max_consecutive: int = 10, max_diverged: float = 1.0) -> None:
        if not is_count(max_consecutive, 1):
            raise ValueError(f"max_consecutive takes an integer >= 1; given: {max_consecutive!r}")
        if not 0 <= max_diverged <= 1:
            raise ValueError(f"max_diverged takes a number in [0, 1]; given: {max_diverged!r}")
        self.max_consecutive = max_consecutive
        self.max_diverged = max_diverged
        self.skipped = 0
        self.in_a_row = 0
        self._told = False
        self._stop: TrainingError | None = None
        self._seen: _Seen | None = None
        self._scale: float | None = None
        self._failed: Tensor | None = None
        self._buffers: list[tuple[nn.Module, str]] = []
        self._copies: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []

    # --- a run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the solves, and make room for copies of the buffers."""
        self._seen = self._stop = None
        self._told = False
        kept = pl_module.state_dict().keys()
        names = [name for name, _ in pl_module.named_buffers() if name in kept]
        places = [name.rpartition(".")[::2] for name in names]
        self._buffers = [(pl_module.get_submodule(module), name) for module, name in places]
        self._copies = [torch.empty_like(buffer) for buffer in self._current_buffers()]
        layers = [module for module in pl_module.modules() if isinstance(module, DEQ)]
        self._hooks = [layer.register_forward_hook(self._look) for layer in layers]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember how the model is before the step."""
        if self._seen is None:
            self._seen = _Seen()
            _copy(self._current_buffers(), self._copies)
            cast("EquilibriumModule", pl_module).on_step_begin()
        self._seen.inputs += inputs_not_finite(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let the gradient of a loss that does not count be NaN, on all processes."""
        seen = self._seen = self._seen or _Seen()  # an optimizer like LBFGS evaluates the loss of a step again
        seen.losses.append(loss.detach())
        counts = loss.detach().isfinite()
        if self.max_diverged < 1 and (failed := seen.failed()) is not None:
            counts = counts & (failed <= self.max_diverged)
        factor = torch.where(counts, 1.0, torch.nan).to(loss.dtype)
        loss.register_hook(lambda gradient: gradient * factor)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients away, where they are not finite: then the optimizer does nothing."""
        seen, self._seen = cast(_Seen, self._seen), None
        self._failed = seen.failed()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if norm(gradients).isfinite() or largest(gradients).isfinite():  # the former is faster, and may overflow
            self.in_a_row = 0
            return
        troubles = _of_all_processes(trainer, self._trouble(seen, pl_module))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            optimizer.zero_grad()
        elif any(trouble.is_own for trouble in troubles) or scaler.get_scale() < 1:  # no scale made it overflow then
            self._scale = scaler.get_scale()
        else:
            return
        _copy(self._copies, self._current_buffers())
        cast("EquilibriumModule", pl_module).on_step_skipped()
        self._count(trainer, pl_module, troubles)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Count in the log; end the run if it is time."""
        if self._scale is not None:
            trainer.precision_plugin.scaler.update(self._scale)  # type: ignore[attr-defined]
            self._scale = None
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._seen is None and (self.in_a_row > 0 or trainer.global_step % every == 0):
            # Not at each step: two calls of Lightning's log are a twentieth of the smallest models' steps.
            pl_module.log("train/skipped", torch.tensor(float(self.skipped)))
            if self._failed is not None:
                pl_module.log("train/diverged", self._failed)
        if self._stop is not None:
            raise self._stop

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how many there were."""
        self._remove_hooks()
        if self.skipped:
            rank_zero_info(f"{self.skipped} of {trainer.global_step} training steps were skipped: not finite")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._remove_hooks()

    def undo(self, pl_module: pl.LightningModule) -> None:
        """Let buffers and memory be as before the step that has begun, if one has, and its update has not."""
        if self._seen is not None:
            self._seen = None
            _copy(self._copies, self._current_buffers())
            cast("EquilibriumModule", pl_module).on_step_undone()

    # --- what is kept

    def state_dict(self) -> dict[str, Any]:
        """The counts: a run that is resumed counts on."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    # --- how it is done

    def _look(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Keep how the solves of a step ended; a layer that is unrolled solves nothing."""
        if self._seen is not None and torch.is_grad_enabled() and cast(DEQ, layer).unrolled is None:
            self._seen.statuses.append(output[1].status)

    def _current_buffers(self) -> list[Tensor]:
        return [getattr(module, name) for module, name in self._buffers]

    def _trouble(self, seen: _Seen, module: nn.Module) -> Trouble:
        """What this process found, now that there is time to look."""
        losses = torch.stack(seen.losses)
        statuses = torch.cat(seen.statuses) if seen.statuses else torch.zeros(0)
        non_finite, diverged = (
            int((statuses == kind).sum()) for kind in (SolverStatus.NON_FINITE, SolverStatus.DIVERGED)
        )
        failed = seen.failed()
        return Trouble(
            inputs=tuple(dict.fromkeys(name for name, bad in seen.inputs if bad)),
            loss="" if losses.isfinite().all() else "NaN" if losses.isnan().any() else "infinite",
            samples=len(statuses),
            failed=(non_finite, diverged),
            too_many=failed is not None and float(failed) > self.max_diverged,
            gradients=tuple(gradients_not_finite(module)),
        )

    def _count(self, trainer: pl.Trainer, module: pl.LightningModule, troubles: list[Trouble]) -> None:
        """One more; say so the first time, and prepare to stop where there are too many."""
        self.skipped += 1
        self.in_a_row += 1
        step = trainer.global_step
        rank = next((rank for rank, trouble in enumerate(troubles) if trouble.is_own), 0)
        found = troubles[rank]
        told = found.told() if len(troubles) == 1 else f"on process {rank}, {found.told()}"
        if self.in_a_row >= self.max_consecutive:
            clipped = trainer.gradient_clip_val is not None
            since = f"steps {step - self.in_a_row + 1} to {step}" if self.in_a_row > 1 else f"step {step}"
            self._stop = TrainingError(
                f"training was stopped: {since}, as many in a row as max_consecutive={self.max_consecutive} allows, "
                f"had no finite gradient and were skipped, {self.skipped} in all. In the last of them {told}. "
                f"{found.advice(module.hparams, clipped, str(trainer.precision))}"
            )
        elif not self._told:
            self._told = True
            rank_zero_warn(
                f"training step {step} was skipped, since it has no finite gradient: {told}. Further ones are skipped "
                f"too, and counted as train/skipped; {self.max_consecutive} in a row end the run"
            )

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:
        torch._foreach_copy_(targets, sources)  # one call for all, as torch's optimizers do


def _of_all_processes(trainer: pl.Trainer, trouble: Trouble) -> list[Trouble]:
    """That of each process: all are here, since all have the same gradients."""
    if trainer.world_size == 1:
        return [trouble]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, trouble)
    return found

"""Where memory runs out: which knobs of this run make it enough, with the run's own numbers."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils import _pytree as pytree

from zoo.implicit import PhantomGradient, Solver, solvers
from zoo.implicit.driver import solve

if TYPE_CHECKING:
    from .base import EquilibriumModule

_TEXTS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "bad_alloc")


class NotEnoughMemoryError(RuntimeError):
    """Memory ran out; the message says what of this run can be smaller."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: a device's, or the host's, whose allocator raises a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


@contextmanager
def told_of_memory() -> Iterator[None]:
    """Within this context an error of that kind is an :class:`NotEnoughMemoryError` with all that was noted."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemoryError("\n".join((str(error), *getattr(error, "__notes__", ())))) from error


class MemoryAdvice(Callback):
    """Every run of an :class:`EquilibriumModule` has it: where memory runs out, what to do is a note of the exception.

    It names the solve, if it was in one, and what that keeps; and of the knobs of the command line those that make a
    difference to this model, this solver and this gradient.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Add the note."""
        if is_out_of_memory(exception):
            exception.add_note(advice(trainer, cast("EquilibriumModule", pl_module), exception))


def advice(trainer: pl.Trainer, module: EquilibriumModule, error: BaseException) -> str:
    """Where memory ran out, and what takes less, one knob a line, as it is typed on the command line."""
    training = trainer.state.fn == "fit" and not (trainer.validating or trainer.sanity_checking)
    found = _solve_of(error)
    if found is None:
        where, knobs = "outside of a solve", []
    else:
        B, N = found.states.shape
        kind = "an adjoint solve" if found.adjoint else "a solve"
        ours = type(found.solver).__module__.startswith(solvers.__name__)  # what another one keeps is not known
        kept = f", which keeps {_mebibytes(found.solver, found.states)} of states" if ours else ""
        where = f"in {kind} with {type(found.solver).__name__}{kept}: each state is of {B} x {N} numbers"
        knobs = list(_of_solver(found)) if ours else []
    knobs += [*_of_batches(trainer, training=training), *(_of_training(trainer, module) if training else ())]
    return "\n".join((f"Memory ran out {where}. What takes less:", *(f"  {knob}" for knob in knobs)))


@dataclass(frozen=True)
class _Found:
    """A solve that was going on."""

    solver: Solver
    states: Tensor  # (B, N)
    adjoint: bool


def _solve_of(error: BaseException) -> _Found | None:
    """The innermost one, from the frame of its loop."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is solve.__code__]
    if not frames:
        return None
    values = frames[-1].f_locals
    return _Found(values["solver"], values["z0"], adjoint=values["scale"] is not None)


def _mebibytes(solver: Solver, states: Tensor) -> str:
    """What the solver keeps besides the state at hand; ``init`` makes all of it, here of tensors without content."""
    z0 = torch.empty_like(states, device="meta")
    kept = {id(x): x for x in pytree.tree_leaves(solver.init(cast(Any, None), z0)) if isinstance(x, Tensor)}
    return f"{sum(x.numel() * x.element_size() for x in kept.values() if x is not z0) / 2**20:.1f} MiB"


def _of_solver(found: _Found) -> Iterator[str]:
    solver, name = found.solver, type(found.solver).__name__
    typed = "--model.gradient ImplicitGradient --model.gradient.solver" if found.adjoint else "--model.solver"
    key = next((key for key in ("memory", "restart") if hasattr(solver, key)), None)
    if key is None:
        return
    now, multiple = getattr(solver, key), getattr(solver, "mix_every", 1)
    half = max(1, now // 2 // multiple) * multiple
    if half < now:
        less = _mebibytes(replace(solver, **{key: half}), found.states)
        option = f"{typed.rpartition(' ')[2]}.{key}"
        yield f"{typed} {name} {option} {half} (now {now}): {less}, and perhaps more steps"
    if found.adjoint:
        yield f"{typed} BiCGSTAB: seven states, however many steps"
    else:
        yield f"{typed} FixedPointIteration: keeps none, and takes more steps"


def _of_batches(trainer: pl.Trainer, *, training: bool) -> Iterator[str]:
    data: Any = getattr(trainer, "datamodule", None)
    name = "eval_batch_size" if not training and hasattr(data, "eval_batch_size") else "batch_size"
    size = getattr(data, name, None)
    if size == 1:
        return
    smaller = f"--data.{name} {size // 2} (now {size})" if isinstance(size, int) else "smaller batches"
    alike = f" with --trainer.accumulate_grad_batches {2 * trainer.accumulate_grad_batches} for steps as large"
    yield smaller + (alike if training else "")


def _of_training(trainer: pl.Trainer, module: EquilibriumModule) -> Iterator[str]:
    """What backpropagation keeps."""
    layers = list(module.equilibria().values())
    unrolled = module.pretrain_depth if trainer.global_step < module.pretrain_steps else None
    takes = inspect.signature(type(module.model)).parameters
    if "recompute" in takes and not all(layer.recompute for layer in layers):
        yield "--model.model_args.recompute true: keeps nothing of what a cell computes, and computes it again"
    if unrolled is not None and unrolled > 1:
        yield f"--model.pretrain_depth {unrolled - 1} (now {unrolled}): all of the unrolled applications are kept"
    for gradient in dict.fromkeys(layer.gradient for layer in layers if unrolled is None):
        if gradient.through_solver:
            yield f"--model.gradient ImplicitGradient: {type(gradient).__name__} keeps all iterations"
        if isinstance(gradient, PhantomGradient) and gradient.steps > 1:
            yield (
                f"--model.gradient PhantomGradient --model.gradient.steps {gradient.steps - 1} (now {gradient.steps}): "
                "all of them are kept"
            )
    if trainer.precision in ("32-true", "64-true"):
        yield f"--trainer.precision bf16-mixed (now {trainer.precision})"

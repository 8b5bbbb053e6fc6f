"""What can be wrong with a step of training, told in one sentence, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from zoo.implicit.report import SolverStatus


class TrainingError(RuntimeError):
    """Training cannot go on as it is; the message says why, and what to try."""


@dataclass(frozen=True)
class Trouble:
    """What one process found wrong with a step, as plain data.

    Attributes:
        inputs: the tensors of the batch that are not finite, described.
        loss: a loss that is not finite, in words; empty if all are finite.
        samples: how many were solved.
        failed: how many of them ended with the status NON_FINITE, and with DIVERGED.
        too_many: whether these are more than the run allows.
        gradients: the names of the parameters whose gradients, over all processes, are not finite.
    """

    inputs: tuple[str, ...] = ()
    loss: str = ""
    samples: int = 0
    failed: tuple[int, int] = (0, 0)
    too_many: bool = False
    gradients: tuple[str, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether this process has it from its own batch: where another has it, all gradients are not finite."""
        return bool(self.inputs or self.loss or self.too_many)

    def told(self) -> str:
        """In one sentence, the cause first as far as it is known."""
        found = [f"{name} has NaN or infinity" for name in self.inputs]
        for count, how in zip(self.failed, ("met NaN or infinity", "diverged"), strict=True):
            found += [f"the solve of {count} of {self.samples} samples {how}"] if count else []
        found += [f"the loss is {self.loss}"] if self.loss else []
        if self.gradients and not self.is_own:
            first, *others = self.gradients
            more = f", and {len(others)} more," if others else ""
            found.append(f"the gradient of {first}{more} has NaN or infinity")
        return "; ".join(found)

    def advice(self, arguments: Mapping[str, Any], clipped: bool, precision: str) -> str:
        """What to try, as it is typed on the command line.

        Args:
            arguments: of the module, like ``lr``.
            clipped: whether gradients are.
            precision: the trainer's.
        """
        if self.inputs:
            return (
                "Look at the data: at the samples of this batch, and at what reads, normalises and augments them. "
                "A model cannot learn from NaN"
            )
        tries = []
        if precision not in ("32-true", "64-true"):
            tries.append(f"more precision than {precision} (--trainer.precision 32-true)")
        tries.append(f"a smaller learning rate than {arguments.get('lr')} (--model.lr)")
        if not arguments.get("warmup_steps") and arguments.get("schedule") != "one_cycle":
            tries.append("a warm-up (--model.warmup_steps 100)")
        if not clipped:
            tries.append("clipped gradients (--trainer.gradient_clip_val 1.0)")
        if any(self.failed):
            if not arguments.get("jacobian_weight"):
                tries.append("Jacobian regularisation (--model.jacobian_weight 0.1)")
            if not arguments.get("pretrain_steps"):
                tries.append("unrolled steps before the first solve (--model.pretrain_steps 1000)")
            if arguments.get("model") == "tanh_deq" and "contraction" not in (arguments.get("model_args") or {}):
                tries.append("bounded weights (--model.model_args.contraction 0.9)")
        worst = SolverStatus.NON_FINITE if self.failed[0] else SolverStatus.DIVERGED
        of_solves = f"Of the solves: {worst.advice}. " if any(self.failed) else ""
        return f"{of_solves}Try {', '.join(tries)}"


def inputs_not_finite(batch: Any) -> list[tuple[str, Tensor]]:
    """The floating tensors of a batch by their places in it, and whether each is not finite, as scalars."""
    leaves, _ = pytree.tree_flatten_with_path(batch)
    return [
        (f"batch{pytree.keystr(path)}, {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)},", _is_bad(x))
        for path, x in leaves
        if isinstance(x, Tensor) and x.is_floating_point()
    ]


def gradients_not_finite(module: nn.Module) -> list[str]:
    """The names of the parameters whose gradients are not finite: the same on all processes, sharded or not."""
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return [name for name, gradient in gradients.items() if not largest([gradient]).isfinite()]


def norm(gradients: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm of all of them as one vector: the same on all processes, sharded or not."""
    found = torch.nn.utils.get_total_norm(gradients, order)
    return found.full_tensor() if isinstance(found, DTensor) else found


def largest(gradients: Sequence[Tensor]) -> Tensor:
    """The largest absolute value in them, which no sum makes infinite."""
    return norm(gradients, math.inf)


def _is_bad(x: Tensor) -> Tensor:
    return ~x.isfinite().all()

"""Optimizers of ``torch.optim`` by name, and the learning rate's way up and down."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from zoo.implicit.choices import nearest


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """``torch.optim.<name>`` over these parameters.

    Args:
        name: a class of ``torch.optim``.
        parameters: what it trains.
        lr: learning rate.
        weight_decay: its own kind of it, decoupled in AdamW and an L2 penalty in SGD and Adam.
        arguments: its further ones, like ``{"momentum": 0.9}``.

    Raises:
        ValueError: there is no such optimizer, it has no such argument, or it refuses a value; or its eps is 0 in the
            dtype of the parameters, and it would divide 0 by 0.
    """
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        key: cls
        for key, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    if name not in classes:
        raise ValueError(f"unknown optimizer {name!r}.{nearest(name, sorted(classes))}")
    takes = inspect.signature(classes[name]).parameters
    valid = [key for key in takes if key not in ("params", "lr", "weight_decay")]
    for key in arguments:
        if key in ("lr", "weight_decay"):
            raise ValueError(f"{key} is an argument of its own, beside optimizer_args, and not one of them")
        if key not in valid:
            raise ValueError(f"optimizer {name} has no argument {key!r}.{nearest(key, valid)}")
    decay = {"weight_decay": weight_decay} if weight_decay or "weight_decay" in takes else {}
    parameters = list(parameters)
    try:
        optimizer = classes[name](parameters, lr=lr, **decay, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer {name} cannot be made with lr={lr!r}, weight_decay={weight_decay!r} and "
            f"optimizer_args={dict(arguments)!r}: {error}"
        ) from error
    eps = optimizer.defaults.get("eps")
    for dtype in {p.dtype for p in parameters}:
        if isinstance(eps, float) and eps > 0 and not torch.tensor(eps, dtype=dtype, device="cpu"):
            raise ValueError(
                f"optimizer {name} divides by sqrt(v) + eps, and eps={eps} is 0 in {dtype}, that of the weights: give "
                "it one from 1e-7 on (--model.optimizer_args.eps 1e-4), or take --trainer.precision bf16-true"
            )
    return optimizer


class WarmUp(LRScheduler):
    """The learning rate lr t / warmup at step t < warmup, and from there on that of :meth:`rate`: here lr.

    What it depends on is that of the run at hand: a resumed run whose warm-up or length is another goes on as if it
    had been so from the start.

    Args:
        optimizer: whose learning rate it sets.
        warmup: steps; 0 starts with ``rate``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int = 0) -> None:
        self.warmup = warmup
        super().__init__(optimizer)

    def rate(self, lr: float | Tensor, t: int) -> float | Tensor:
        """The learning rate of step t, for a parameter group whose peak is lr."""
        return lr

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of this step, one a parameter group."""
        t = self.last_epoch
        return [lr * (t / self.warmup) if t < self.warmup else self.rate(lr, t) for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to know: not how long this run is."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch, "_last_lr": self._last_lr}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at the step of the checkpoint."""
        self.base_lrs, self.last_epoch = list(state_dict["base_lrs"]), state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


class Cosine(WarmUp):
    """The learning rate min_lr + (lr - min_lr) (1 + cos(pi t / T)) / 2 at step t of T, and min_lr after them.

    Loshchilov and Hutter, "SGDR" (ICLR 2017), equation 5, without restarts. t counts the steps of the warm-up too, as
    in the published training of DEQ transformers: after it the rate is what it would be without.

    Args:
        optimizer: whose learning rate it sets.
        steps: T.
        min_lr: where it ends.
        warmup: see :class:`WarmUp`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, min_lr: float = 0.0, warmup: int = 0) -> None:
        self.steps = steps
        self.min_lr = min_lr
        super().__init__(optimizer, warmup)

    def rate(self, lr: float | Tensor, t: int) -> float | Tensor:
        return self.min_lr + (lr - self.min_lr) * (1 + math.cos(math.pi * min(t / self.steps, 1))) / 2


class OneCycle(WarmUp):
    """The learning rate's way linearly from lr / 25 up to lr, and linearly down to lr / 250,000, where it stays.

    Smith and Topin, "Super-Convergence" (2019), as ``torch.optim.lr_scheduler.OneCycleLR(anneal_strategy="linear",
    cycle_momentum=False)`` has it: of the steps t from 0 to T - 1 the peak is at ``fraction`` T - 1.

    Args:
        optimizer: whose learning rate it sets.
        steps: T.
        fraction: of them in which it rises, in [0, 1).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, fraction: float) -> None:
        self.steps = steps
        self.fraction = fraction
        super().__init__(optimizer)

    def rate(self, lr: float | Tensor, t: int) -> float | Tensor:
        start, peak, last = lr / 25, self.fraction * self.steps - 1, self.steps - 1
        if t < peak:
            return start + (lr - start) * (t / peak)
        return lr + (start / 10_000 - lr) * ((min(t, last) - peak) / (last - peak))

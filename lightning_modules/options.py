"""The options that all tasks share: which values they take."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from zoo.implicit.solvers.base import is_count


def refuse_out_of_range(options: Mapping[str, Any]) -> None:
    """Raise ValueError where one of the arguments of :class:`EquilibriumModule` is out of its range, or two clash."""
    given = SimpleNamespace(**options)
    require(
        given.jacobian_weight >= 0 and 0 <= given.jacobian_frequency <= 1,
        "jacobian_weight takes a number >= 0 and jacobian_frequency one in [0, 1]",
        *(given.jacobian_weight, given.jacobian_frequency),
    )
    require(
        given.jacobian_growth >= 0 and given.jacobian_pretrain_weight >= 0,
        "jacobian_growth and jacobian_pretrain_weight take numbers >= 0",
        *(given.jacobian_growth, given.jacobian_pretrain_weight),
    )
    require(
        is_count(given.jacobian_probes, 1) and is_count(given.jacobian_growth_interval, 1),
        "jacobian_probes and jacobian_growth_interval take integers >= 1",
        *(given.jacobian_probes, given.jacobian_growth_interval),
    )
    require(
        given.jacobian_end_epoch is None or is_count(given.jacobian_end_epoch, 0),
        "jacobian_end_epoch takes an integer >= 0, or None",
        given.jacobian_end_epoch,
    )
    require(
        is_count(given.max_steps_jitter, 0) or _is_range(given.max_steps_jitter),
        "max_steps_jitter takes an integer >= 0, or two integers [low, high] with low <= high",
        given.max_steps_jitter,
    )
    require(
        is_count(given.pretrain_steps, 0) and is_count(given.pretrain_depth, 1),
        "pretrain_steps takes an integer >= 0 and pretrain_depth one >= 1",
        *(given.pretrain_steps, given.pretrain_depth),
    )
    require(
        given.lr >= 0 and given.weight_decay >= 0, "lr and weight_decay take numbers >= 0", given.lr, given.weight_decay
    )
    schedules = ("cosine", "one_cycle", "constant")
    require(given.schedule in schedules, "schedule takes 'cosine', 'one_cycle' or 'constant'", given.schedule)
    require(0 <= given.min_lr <= given.lr, "min_lr takes a number from 0 to lr", given.min_lr, given.lr)
    require(is_count(given.warmup_steps, 0), "warmup_steps takes an integer >= 0", given.warmup_steps)
    require(
        given.schedule != "one_cycle" or (given.warmup_steps == 0 and given.min_lr == 0),
        "schedule='one_cycle' rises and ends by itself, and takes warmup_steps=0 and min_lr=0",
        *(given.warmup_steps, given.min_lr),
    )
    require(0 <= given.warmup_fraction < 1, "warmup_fraction takes a number in [0, 1)", given.warmup_fraction)
    require(
        is_count(given.schedule_margin, 0) and is_count(given.show_every, 0),
        "schedule_margin and show_every take integers >= 0",
        *(given.schedule_margin, given.show_every),
    )
    require(
        given.pretrained is None or given.backbone is None,
        "give pretrained or backbone, not both",
        given.pretrained,
        given.backbone,
    )
    require(
        given.weights_from is None or (given.pretrained is None and given.backbone is None),
        "weights_from has all weights: give it without pretrained and backbone",
        *(given.weights_from, given.pretrained, given.backbone),
    )


def require(holds: bool, expected: str, *given: Any) -> None:
    """Raise ValueError with what was expected and what was given, unless this holds."""
    if not holds:
        raise ValueError(f"{expected}; given: {' and '.join(map(repr, given))}")


def with_own(model_args: Mapping[str, Any] | None, **own: Any) -> dict[str, Any]:
    """The model's arguments, those among them that are arguments of the module too, like the number of classes.

    Raises:
        ValueError: one was given twice.
    """
    for name in own.keys() & (model_args or {}).keys():
        raise ValueError(f"{name} is an argument of its own, beside model_args, and not one of them")
    return {**(model_args or {}), **own}


def _is_range(value: object) -> bool:
    """Whether it is ``[low, high]``, two integers."""
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(type(item) is int for item in value)):
        return False
    return bool(value[0] <= value[1])

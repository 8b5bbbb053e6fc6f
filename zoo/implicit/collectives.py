"""Cells in which processes wait for each other: what is refused, and how processes agree when to stop.

A solve stops when its own samples have converged, so processes evaluate f differently often. Where f holds a collective
(an all-reduce, an all-gather) the first one to stop leaves the others waiting for it, for good.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Agreement:
    """The processes of a group that evaluate f equally often."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def everywhere(self, here: bool, device: torch.device) -> bool:
        """Whether it holds in all processes, each of which has to ask. One all-reduce and one transfer."""
        holds = torch.tensor(int(here), dtype=torch.int32, device=device)
        dist.all_reduce(holds, dist.ReduceOp.MIN, group=self.group)
        return bool(holds.item())


_current: ContextVar[Agreement | None] = ContextVar("zoo.implicit agreement", default=None)


def current_agreement() -> Agreement | None:
    """That of the innermost :func:`agreeing`; None outside of all, and where there is one process only."""
    return _current.get()


def everywhere(here: bool, device: torch.device) -> bool:
    """Whether it holds in all processes that agree; ``here`` itself where none do."""
    agreement = _current.get()
    return here if agreement is None else agreement.everywhere(here, device)


@contextmanager
def in_agreement(agreement: Agreement | None) -> Iterator[None]:
    """Within this context it is the current one: a backward pass goes back to that of its forward pass."""
    token = _current.set(agreement)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def agreeing(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within this context the processes of ``group`` evaluate f equally often: each solve goes on until all can stop.

    For an f with a collective of its own, which no library can see from outside. Adjoint solves of what was solved in
    it agree too, wherever the backward pass runs. What the samples of a process converge to is frozen, and is not
    changed by evaluating longer; ``report.steps`` are those of each sample, ``report.evaluations`` those of all. Each
    evaluation costs a small all-reduce and a transfer to the host. Where torch.distributed is not initialized, or the
    group has one process, nothing is done. With ``on_failure="raise"`` all raise where a sample of any process fails.

    Solves in threads that the caller starts inside of it do not agree: a thread starts with a context of its own.

    Each process makes the same solves in the same order, with the same ``max_steps``; there may be no samples in some.
    Rows stay independent, as they are everywhere: what is exchanged are weights, or statistics of the inputs. An f that
    exchanges something of z (batch statistics of activations, say) couples samples that stop at different times, and
    the residual reported is then not that of the states returned.

    Args:
        group: all processes by default.

    Example:
        >>> with agreeing():
        ...     z, report = deq(x)
        >>> criterion(z).backward()
    """
    several = _is_distributed() and dist.get_world_size(group) > 1
    with in_agreement(Agreement(group) if several else None):
        yield


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def refuse_sharded(cell: nn.Module) -> None:
    """Raise where an evaluation of ``cell`` would gather weights, or reduce gradients, in step with other processes.

    Raises:
        ValueError: a part of it is a unit of FSDP or DDP of its own, or a weight is sharded.
    """
    if not _is_distributed():
        return
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    units: tuple[type, ...] = (DistributedDataParallel,)
    if fsdp is not None:  # what nobody has imported, nobody has used
        units += (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    sharded = () if tensor is None else (tensor.DTensor,)
    for name, module in cell.named_modules():
        if isinstance(module, units):
            raise ValueError(
                f"a part of the cell ({name or 'the cell itself'}, a {type(module).__name__}) is a unit of its own of "
                f"{'DDP' if isinstance(module, DistributedDataParallel) else 'FSDP'}, whose processes wait for each "
                "other at each evaluation; they evaluate a cell differently often, and would wait for good. Wrap the "
                "model as a whole, as one unit, and nothing within it"
            )
        for key, weight in module._parameters.items():  # noqa: SLF001 - parameters() would walk all modules again
            if isinstance(weight, sharded):
                raise ValueError(
                    f"a weight of the cell is sharded over processes ({f'{name}.{key}'.lstrip('.')}, a DTensor): each "
                    "evaluation would gather it, and processes evaluate a cell differently often. With fully_shard "
                    "make the model as a whole one unit, and call it by its forward method (or one registered by "
                    "register_fsdp_forward_method), within which weights are whole; or use DistributedDataParallel"
                )
